package syncer

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

func TestSelectionTags(t *testing.T) {
	schema := "sha256-" + strings.Repeat("a", 64)
	listed := []string{"1.0.0", "1.1.0", "1.2.0", "2.0.0", "2.1.0-rc.1", "edge", "latest", schema, schema + ".sig", "v3"}
	tags := func(include, exclude string, newest int) v1alpha1.Repository {
		return v1alpha1.Repository{Name: "app", Tags: v1alpha1.Tags{
			Include: strings.FieldsFunc(include, func(r rune) bool { return r == ';' }),
			Exclude: strings.FieldsFunc(exclude, func(r rune) bool { return r == ';' }),
			Newest:  newest,
		}}
	}
	on := func(r v1alpha1.Repository, platforms ...string) v1alpha1.Repository {
		r.Platforms = platforms
		return r
	}
	for name, tt := range map[string]struct {
		entries []v1alpha1.Repository
		want    string // TAG or TAG=PLATFORM,PLATFORM
	}{
		"all":                 {[]v1alpha1.Repository{tags("", "", 0)}, "1.0.0 1.1.0 1.2.0 2.0.0 2.1.0-rc.1 edge latest v3"},
		"range":               {[]v1alpha1.Repository{tags("semver:>=1.1 <2", "", 0)}, "1.1.0 1.2.0"},
		"expression":          {[]v1alpha1.Repository{tags("regex:[a-z]+", "", 0)}, "edge latest"},
		"excluded range":      {[]v1alpha1.Repository{tags("", "semver:*;regex:.*-rc.*", 0)}, "edge latest"},
		"newest":              {[]v1alpha1.Repository{tags("", "", 2)}, "2.1.0-rc.1 v3"},
		"newest after all":    {[]v1alpha1.Repository{tags("semver:*", "2.*", 2)}, "1.2.0 v3"},
		"newest and a name":   {[]v1alpha1.Repository{tags("latest;semver:<2", "", 1)}, "1.2.0 latest"},
		"a name out of many":  {[]v1alpha1.Repository{tags("1.0.0;*", "", 1)}, "1.0.0 v3"},
		"entries add up":      {[]v1alpha1.Repository{tags("", "", 1), tags("edge", "", 0)}, "edge v3"},
		"schema tag by name":  {[]v1alpha1.Repository{tags(schema+";edge", "", 0)}, "edge " + schema},
		"schema tag excluded": {[]v1alpha1.Repository{tags(schema, "sha256-*", 0)}, ""},
		"schema tag by glob":  {[]v1alpha1.Repository{tags("sha256-*;regex:sha.*", "", 0)}, ""},
		"platforms": {[]v1alpha1.Repository{on(tags("edge;latest", "", 0), "linux/arm64"), on(tags("edge", "", 0), "linux/amd64", "linux/arm64"), on(tags("latest", "", 0)), on(tags("latest", "", 0), "linux/s390x")},
			"edge=linux/amd64,linux/arm64 latest"},
	} {
		s, err := newSelection("", tt.entries)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, w := range s.tags(listed) {
			tag := w.tag
			if len(w.platforms) > 0 {
				tag += "=" + strings.Join(w.platforms, ",")
			}
			got = append(got, tag)
		}
		if diff := cmp.Diff(tt.want, strings.Join(got, " ")); diff != "" {
			t.Errorf("%s: -want +got:\n%s", name, diff)
		}
	}
}

func TestSelectionNamed(t *testing.T) {
	for include, want := range map[string]bool{"": false, "a": true, "a*": false, "regex:a": false, "semver:1": false} {
		s, err := newSelection("", []v1alpha1.Repository{{Name: "app", Tags: v1alpha1.Tags{Include: strings.Fields(include), Newest: 1}}})
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := s.named(); ok != want {
			t.Errorf("%q needs a list: %t", include, !ok)
		}
	}
}
