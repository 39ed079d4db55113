package v1alpha1

import (
	"strings"
	"testing"
)

const someDigest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func TestEventPattern(t *testing.T) {
	type event struct{ name, tag, digest, action string }
	for pattern, tests := range map[string]map[event]bool{
		"team/app:push": {
			{"team/app", "v1", someDigest, "push"}:   true,
			{"team/app", "", someDigest, "push"}:     true,
			{"team/app", "v1", someDigest, "delete"}: false,
			{"team/app2", "v1", someDigest, "push"}:  false,
			{"x/team/app", "v1", "", "push"}:         false,
		},
		"*:*":         {{"team/app", "", "", "delete"}: true, {"a", "v1", "", "push"}: true},
		"team/*:push": {{"team/a/b", "", "", "push"}: true, {"team", "", "", "push"}: false},
		"app:v1.*:delete": {
			{"app", "v1.2", "", "delete"}: true,
			{"app", "v1x2", "", "delete"}: false,
			{"app", "", "", "delete"}:     false,
		},
		"app@" + someDigest + ":push": {{"app", "v1", someDigest, "push"}: true, {"app", "v1", "sha256:0", "push"}: false},
		"app:v1@sha256:*:*":           {{"app", "v1", someDigest, "push"}: true, {"app", "v2", someDigest, "push"}: false, {"app", "v1", "", "push"}: false},
		"registry.example-x/a_b:push": {{"registry.example-x/a_b", "", "", "push"}: true, {"registryxexample-x/a_b", "", "", "push"}: false},
	} {
		p, err := ParseEventPattern(pattern)
		if err != nil {
			t.Errorf("%s: %v", pattern, err)
			continue
		}
		for e, want := range tests {
			if got := p.Match(e.name, e.tag, e.digest, e.action); got != want {
				t.Errorf("%s matches %v: %t", pattern, e, got)
			}
		}
	}
	for _, bad := range []string{
		"", ":", "app", "app:", "app:pull", ":push", "App:push", "a b:push", "app::push", "app:v 1:push", "app@:push", "app@sha256:12:push",
		"app@x:v1:push", strings.Repeat("*", 17) + ":push", strings.Repeat("a", 2000) + ":push", "../a:push", "/a:push",
	} {
		if _, err := ParseEventPattern(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	if (EventPattern{}).Match("", "", "", "") {
		t.Error("the zero pattern matches")
	}
}

func FuzzEventPattern(f *testing.F) {
	for _, seed := range []string{"team/app:push", "*:*", "app:v1@sha256:*:delete", "app@" + someDigest + ":push"} {
		f.Add(seed, "team/app", "v1", someDigest)
	}
	f.Fuzz(func(t *testing.T, pattern, name, tag, digest string) {
		p, err := ParseEventPattern(pattern)
		if err != nil {
			return
		}
		p.Match(name, tag, digest, "push") // never panics
		if strings.HasSuffix(pattern, ":push") && p.Match(name, tag, digest, "delete") {
			t.Errorf("%q matches a deletion", pattern)
		}
	})
}
