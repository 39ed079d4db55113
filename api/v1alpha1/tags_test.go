package v1alpha1

import (
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTagPattern(t *testing.T) {
	for pattern, tags := range map[string]struct{ yes, no string }{
		"1.2":               {"1.2", "1.2.0 v1.2"},
		"1.*":               {"1. 1.2 1.2.3", "1 2.1"},
		"regex:v[0-9]+":     {"v1 v27", "v v1.2 xv1 1"},
		"regex:a|b":         {"a b", "ab ac"},
		"regex:(?i)RC.*":    {"rc1 RC", "xrc"},
		"semver:*":          {"1 1.2 v1.2.3", "latest 1.2.3-rc.1 1.2.3.4"},
		"semver:>=1.2 <2":   {"1.2 1.2.0 v1.9.9", "1.1.9 2.0.0 2 1.5.0-rc.1 latest"},
		"semver:>=1.2, <2":  {"1.2", "2"},
		"semver:>=1.2.0-0":  {"1.2.0 1.2.0-rc.1 1.3.0-alpine", "1.1.0"},
		"semver:~1.2 || ^3": {"1.2.9 3.9", "1.3.0 4"},
		"semver:1.2 - 1.4":  {"1.2.0 1.4.0", "1.5.0"},
		"semver:1.2.x":      {"1.2.7", "1.3.0"},
		"semver:=1.2.3":     {"1.2.3 v1.2.3", "1.2.4 1.2.3-rc1"},
	} {
		p, err := ParseTagPattern(pattern)
		if err != nil {
			t.Errorf("%s %v", pattern, err)
			continue
		}
		for tag := range strings.FieldsSeq(tags.yes) {
			if !p.Match(tag) {
				t.Errorf("%s does not match %s", pattern, tag)
			}
		}
		for tag := range strings.FieldsSeq(tags.no) {
			if p.Match(tag) {
				t.Errorf("%s matches %s", pattern, tag)
			}
		}
		if p.String() != pattern || p.Literal() != (pattern == "1.2") {
			t.Errorf("%s is taken for %s, literal: %t", pattern, p, p.Literal())
		}
	}
	if (TagPattern{}).Match("") {
		t.Error("the zero pattern matches something")
	}
}

func TestTagPatternRefuses(t *testing.T) {
	for pattern, want := range map[string]string{
		"":                                  "is empty",
		"a/b":                               "has a slash, which no tag has",
		"-a":                                "is not a tag",
		"[a":                                `has "[" without "]"`,
		"regexp:a":                          `has a colon: only "regex:" and "semver:" may stand in front`,
		"regex:":                            "has no regular expression",
		"regex:(":                           "is not a regular expression of RE2: missing closing )",
		"regex:a)(b":                        "is not a regular expression of RE2: unexpected )",
		"regex:(?=a)":                       "is not a regular expression of RE2: invalid or unsupported Perl syntax",
		"semver:":                           `is not a range of versions: use for example "semver:>=1.2 <2"`,
		"semver:latest":                     `is not a range of versions: use for example "semver:>=1.2 <2"`,
		"semver:>=1.2 <":                    `is not a range of versions: use for example "semver:>=1.2 <2"`,
		"regex:" + strings.Repeat("a", 507): "is longer than 512 characters",
	} {
		if _, err := ParseTagPattern(pattern); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", pattern, err, want)
		}
	}
}

func TestNewestTags(t *testing.T) {
	tags := []string{"latest", "1.9.0", "1.10.0", "v1.11.0-rc.1", "1.10", "sha-12ab", "v1.10.0", "0.1", "1.10.0-alpine"}
	for n, want := range map[int]string{
		0:  "",
		1:  "v1.11.0-rc.1",
		3:  "v1.11.0-rc.1 v1.10.0 1.10.0",
		50: "v1.11.0-rc.1 v1.10.0 1.10.0 1.10 1.10.0-alpine 1.9.0 0.1",
	} {
		if diff := cmp.Diff(strings.Fields(want), append([]string{}, NewestTags(tags, n)...)); diff != "" {
			t.Errorf("%d: -want +got:\n%s", n, diff)
		}
	}
}

func FuzzTagPattern(f *testing.F) {
	f.Add("1.*", "1.2")
	f.Add("regex:v[0-9]+", "v1")
	f.Add("semver:>=1.2 <2 || ~3", "1.2.3-rc.1")
	f.Fuzz(func(t *testing.T, pattern, tag string) {
		p, err := ParseTagPattern(pattern)
		if err != nil {
			if err.Error() == "" || strings.ContainsAny(err.Error(), "\r\n") {
				t.Errorf("%q: %q", pattern, err)
			}
			return
		}
		matched := p.Match(tag)
		if p.Literal() && matched != (tag == pattern) {
			t.Errorf("the literal %q matches %q: %t", pattern, tag, matched)
		}
		_ = NewestTags([]string{tag, pattern}, 1)
	})
}

func TestParseReferenceGlobs(t *testing.T) {
	match, err := ParseReferenceGlobs([]string{"team/**:v1", "base", "tool:regex:v[0-9]+"})
	if err != nil {
		t.Fatal(err)
	}
	for reference, want := range map[string]bool{
		"team/app:v1": true, "team/app:v2": false, "base:any": true, "base/x:any": false, "tool:v12": true, "tool:v": false,
	} {
		name, tag, _ := strings.Cut(reference, ":")
		if got := match(name, tag); got != want {
			t.Errorf("%s: %t", reference, got)
		}
	}
	all, err := ParseReferenceGlobs(nil)
	if err != nil || !all("a", "b") {
		t.Errorf("no patterns match not everything (%v)", err)
	}
	for _, bad := range []string{":v1", "team/app:", "a:regex:("} {
		if _, err := ParseReferenceGlobs([]string{bad}); err == nil || !strings.Contains(err.Error(), strconv.Quote(bad)) {
			t.Errorf("%q: error %v", bad, err)
		}
	}
}
