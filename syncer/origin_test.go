package syncer

import (
	"strings"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// Several registries fill this one, each with its own credentials and prefix.
func TestSyncUpstreams(t *testing.T) {
	service := newTokenService(t, "u", "hunter2")
	first, second := newTestParent(t), newTestParent(t)
	second.setFault(service.guard)
	images := []ggcr.Image{
		testImage(t, "a", testLayer(1, 1000)),
		testImage(t, "b", testLayer(2, 1000), testLayer(1, 1000)),
		testImage(t, "c", testLayer(3, 1000)),
	}
	a := first.pushImage(t, "team/app:1", images[0])
	b := second.pushImage(t, "team/app:1", images[1])
	c := second.pushImage(t, "library/tool:2", images[2])
	root := t.TempDir()
	configure := func(upstream ...v1alpha1.Repository) func(*Config) {
		return func(c *Config) {
			c.Repositories = exactly("team/app")
			c.DeletePropagation, c.MaxRemovals = true, 100
			c.Upstreams = []Upstream{{
				Parent:       Parent{Endpoint: second.host, Insecure: true, Username: "u", Password: "hunter2"},
				Prefix:       "mirror/second",
				Repositories: upstream,
			}}
		}
	}
	f := newFixtureAt(t, root, first, configure(v1alpha1.Repository{Name: "team/app"}, v1alpha1.Repository{Name: "library/tool", Prefix: "tools"}))
	f.mustSync(t)
	for where, want := range map[string]string{
		"team/app:1":                         a.String(),
		"mirror/second/team/app:1":           b.String(),
		"mirror/second/tools/library/tool:2": c.String(),
	} {
		name, tag, _ := strings.Cut(where, ":")
		if got := f.tagDigest(t, name, tag); got.String() != want {
			t.Errorf("%s is %q, want %s", where, got, want)
		}
	}
	if got, want := first.bytesSent()+second.bytesSent(), uniqueBytes(t, images...); got != want {
		t.Errorf("%d bytes were sent, want %d: what both have is fetched once", got, want)
	}

	// What is no longer selected goes, and nothing else.
	f = newFixtureAt(t, root, first, configure(v1alpha1.Repository{Name: "team/app"}))
	f.mustSync(t)
	if f.tagDigest(t, "mirror/second/tools/library/tool", "2") != "" {
		t.Error("a tag that is no longer selected is here")
	}
	if f.tagDigest(t, "mirror/second/team/app", "1") != b || f.tagDigest(t, "team/app", "1") != a {
		t.Error("too much was removed")
	}
}

// Two registries with the same repository do not take turns in its tags.
func TestSyncSameNameTwice(t *testing.T) {
	first, second := newTestParent(t), newTestParent(t)
	a := first.pushImage(t, "app:1", testImage(t, "a", testLayer(1, 1000)))
	second.pushImage(t, "app:1", testImage(t, "b", testLayer(2, 1000)))
	f := newFixtureAt(t, t.TempDir(), first, func(c *Config) {
		c.Repositories = exactly("app")
		c.Upstreams = []Upstream{{Parent: Parent{Endpoint: second.host, Insecure: true}, Repositories: exactly("app")}}
	})
	_, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
	want := "repository app would come both from app of parent " + first.host + " and from app of parent " + second.host + ": give one of them another prefix"
	if err == nil || err.Error() != want {
		t.Errorf("%v\nwant %s", err, want)
	}
	if f.tagDigest(t, "app", "1") != a {
		t.Error("the first is not here")
	}
}

// One registry that is away keeps nobody from the others.
func TestSyncOneUpstreamAway(t *testing.T) {
	p := newTestParent(t)
	d := p.pushImage(t, "app:1", testImage(t, "a", testLayer(1, 1000)))
	f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Repositories = exactly("app")
		c.Upstreams = []Upstream{{Parent: Parent{Endpoint: "127.0.0.1:1", Insecure: true}, Prefix: "other", Repositories: append(exactly("app"), v1alpha1.Repository{Name: "x/*"})}}
	})
	f.limits.attempts = 1
	result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
	if want := "parent 127.0.0.1:1 refuses connections: is it running, and is spec.parent.endpoint its port?"; err == nil || err.Error() != want {
		t.Errorf("%v\nwant %s", err, want)
	}
	if f.tagDigest(t, "app", "1") != d {
		t.Error("the other's image is not here")
	}
	var names []string
	for _, r := range result.Repositories {
		names = append(names, r.Name)
	}
	if got := strings.Join(names, " "); got != "app other/app other/x/*" {
		t.Errorf("reported: %s", got)
	}
}
