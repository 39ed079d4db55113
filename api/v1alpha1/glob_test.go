package v1alpha1

import (
	"strings"
	"testing"
	"time"
)

func TestGlob(t *testing.T) {
	tests := []struct {
		pattern string
		match   string
		differ  string
	}{
		{"team/app", "team/app", "team/apps team/app/web eteam/app"},
		{"*", "app", "team/app"},
		{"team/*", "team/app team/x", "team team/app/web"},
		{"team/**", "team team/app team/app/web", "teams team-a/app"},
		{"**", "a a/b a/b/c", ""},
		{"**/app", "app team/app a/b/app", "team/apps app/b myapp"},
		{"a/**/z", "a/z a/b/z a/b/c/z", "az a/b a/bz"},
		{"**/**/x", "x a/x a/b/x", "ax"},
		{"1.?", "1.4 1.x", "1.10 1."},
		{"v[0-9]*", "v1 v12.3", "va v"},
		{"v[!0-9]", "va v-", "v1 v/"},
		{"[a-]x", "ax -x", "bx"},
		{"[-a]x", "ax -x", "bx"},
		{"[a.]x", "ax .x", "bx"},
		{"{stable,1.*}", "stable 1.4 1.", "1 unstable"},
		{"x{a,b}y", "xay xby", "xy xaby"},
		{"a.b", "a.b", "axb"},
		{"*-rc*", "1.0-rc1 -rc", "1.0"},
	}
	for _, tt := range tests {
		g, err := ParseGlob(tt.pattern)
		if err != nil {
			t.Errorf("%q: %v", tt.pattern, err)
			continue
		}
		for _, name := range strings.Fields(tt.match) {
			if !g.Match(name) {
				t.Errorf("%q does not match %q", tt.pattern, name)
			}
		}
		for _, name := range strings.Fields(tt.differ) {
			if g.Match(name) {
				t.Errorf("%q matches %q", tt.pattern, name)
			}
		}
	}
	if (Glob{}).Match("") {
		t.Error("the zero Glob matches")
	}
}

func TestGlobErrors(t *testing.T) {
	for pattern, want := range map[string]string{
		"":                       "is empty",
		"/a":                     "has an empty segment: a slash at an end, or two in a row",
		"a**":                    `has "**" beside other characters: it must be a whole segment between slashes`,
		"[a":                     `has "[" without "]"`,
		"[]":                     "has empty brackets",
		"[!]":                    "has empty brackets",
		"[z-a]":                  "has the range z-a, which runs backwards",
		"[a-/]":                  `has "[" without "]"`,
		"{a,b":                   `has "{" without "}"`,
		"{a,{b}}":                "has braces within braces",
		"a}":                     "has '}', which cannot occur in a name",
		"a,b":                    "has ',', which cannot occur in a name",
		"a b":                    "has ' ', which cannot occur in a name",
		`a\*`:                    `has '\\', which cannot occur in a name`,
		"[é]":                    "has 'é', which cannot occur in a name",
		"a:1":                    "has ':', which cannot occur in a name",
		strings.Repeat("a", 513): "is longer than 512 characters",
	} {
		if _, err := ParseGlob(pattern); err == nil || err.Error() != want {
			t.Errorf("%q: %v, want %s", pattern, err, want)
		}
	}
}

func TestGlobTakesLinearTime(t *testing.T) {
	g, err := ParseGlob(strings.Repeat("*a", 200) + "b")
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if g.Match(strings.Repeat("a", 255)) {
		t.Error("matches")
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("took %s", d)
	}
}

func FuzzGlob(f *testing.F) {
	f.Add("team/**/{a,b}[!x-z]?", "team/app/by")
	f.Add("[-a-c-]", "-")
	f.Add("**/**", "a/b")
	f.Fuzz(func(t *testing.T, pattern, name string) {
		g, err := ParseGlob(pattern)
		if err != nil {
			if strings.Contains(err.Error(), "\n") || err.Error() == "is not a glob" {
				t.Errorf("%q: %q", pattern, err)
			}
			return
		}
		g.Match(name)
		if g.Literal() && (!g.Match(pattern) || name != pattern && g.Match(name)) {
			t.Errorf("literal %q does not match exactly itself", pattern)
		}
		// A wildcard never reaches across a slash unless it is "**".
		if !strings.Contains(pattern, "**") && g.Match(name) && strings.Count(pattern, "/") != strings.Count(name, "/") {
			t.Errorf("%q matches %q", pattern, name)
		}
	})
}
