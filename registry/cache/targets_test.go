package cache

import (
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestTargetsAreBounded asks for more URLs than are remembered.
func TestTargetsAreBounded(t *testing.T) {
	n := start(t, Config{Registries: upstreams("http://127.0.0.1:1")})
	d := n.disk.Load()
	for i := range 2*maxTargets + 10 {
		u := &url.URL{Path: blobURL("app", digest.FromString(fmt.Sprint(i))), RawQuery: "ns=" + testHost}
		if _, _, err := n.target(d, u); err != nil {
			t.Fatal(err)
		}
		if len(d.targets.byURL) > maxTargets {
			t.Fatalf("%d are remembered", len(d.targets.byURL))
		}
	}
	before := len(d.targets.byURL)
	for _, query := range []string{"ns=unknown.test", "ns=" + testHost + "&x=" + strings.Repeat("x", 1<<20)} {
		_, _, _ = n.target(d, &url.URL{Path: manifestURL("app", "v1"), RawQuery: query})
	}
	if len(d.targets.byURL) != before {
		t.Errorf("%d are remembered after what should not be, %d before", len(d.targets.byURL), before)
	}
}

// TestTargetFollowsTheRegistry asks without a namespace while the only registry
// becomes another: what one allowed must not count for the other.
func TestTargetFollowsTheRegistry(t *testing.T) {
	n := start(t, Config{Registries: upstreams("http://127.0.0.1:1")})
	d := n.disk.Load()
	u := &url.URL{Path: blobURL("app", digest.FromString("x"))}
	var facts []*target
	for _, host := range []string{testHost, "other.test", testHost} {
		if err := n.SetRegistries(map[string]Registry{host: {Upstreams: []Upstream{{URL: "http://127.0.0.1:1"}}}}); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			got, reg, err := n.target(d, u)
			if err != nil || reg.host != host || got.host != host {
				t.Fatalf("%s: target of %v, %v", host, got, err)
			}
			facts = append(facts, got)
		}
	}
	if facts[0].reader == facts[2].reader || facts[0].member == facts[2].member {
		t.Error("two registries share facts")
	}
	if facts[0].reader != facts[4].reader || facts[0].member != facts[4].member || facts[0] != facts[1] {
		t.Error("one registry has different facts")
	}
}
