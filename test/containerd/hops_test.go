package containerd

import (
	"context"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestHops pulls one image by both of its names while the hops are stopped one
// after the other.
func TestHops(t *testing.T) {
	for _, test := range []struct {
		name      string
		parentTLS bool
		system    systemConfig
		daemon    daemonConfig
	}{
		{"transfer service, parent over TLS", true,
			systemConfig{}, daemonConfig{}},
		{"transfer service in chunks, parent over HTTP", false,
			systemConfig{}, daemonConfig{FetchBuffer: 4 << 20}},
		{"local pull in chunks, registry on IPv6", true,
			systemConfig{Listen: ipv6Loopback(t)}, daemonConfig{LocalPull: true, FetchBuffer: 4 << 20}},
	} {
		t.Run(test.name, func(t *testing.T) {
			image := load(t, bigImage)
			parent := startParent(t, test.parentTLS)
			parent.push(t, repository+":1", image)
			s := startSystem(t, parent, test.system)
			test.daemon.CertsDir = s.certs
			h := &hops{system: s, daemon: startContainerd(t, test.daemon), image: image}

			viaCache := []string{h.cacheHost()}
			first := h.pulls(t, "cold cache", h.own(), viaCache, h.cacheHost())
			if !first.cacheMissed() {
				t.Errorf("a pull by a new cache: Cache-Status %v, want misses", first.cacheStatus())
			}
			for _, ref := range []string{h.own(), h.mirrored()} {
				if again := h.pulls(t, "warm cache", ref, viaCache, h.cacheHost()); again.cacheMissed() {
					t.Errorf("pulling %s again: Cache-Status %v, want hits", ref, again.cacheStatus())
				}
			}
			if asked := parent.seen(); len(asked) > 0 {
				t.Errorf("the parent was asked for what is kept here: %v", asked)
			}

			s.cache.stop(t)
			viaRegistry := []string{h.cacheHost(), s.LoginServer}
			h.pulls(t, "cache stopped", h.own(), viaRegistry, s.LoginServer)
			h.pulls(t, "cache stopped", h.mirrored(), viaRegistry, s.LoginServer)
			if asked := parent.seen(); len(asked) > 0 {
				t.Errorf("the parent was asked for what is kept here: %v", asked)
			}

			s.registry.stop(t)
			h.fails(t, "cache and registry stopped", h.own(), "connection refused", viaRegistry)
			toTheEnd := slices.Concat(viaRegistry, []string{parent.host})
			h.pulls(t, "cache and registry stopped", h.mirrored(), toTheEnd, parent.host)

			parent.stop()
			h.fails(t, "everything stopped", h.own(), "connection refused", viaRegistry)
			h.fails(t, "everything stopped", h.mirrored(), "connection refused", toTheEnd)
		})
	}
}

// TestOffline pulls again what the node has pulled before, with nothing left
// but the node itself.
func TestOffline(t *testing.T) {
	h := startHops(t, systemConfig{})
	onlyCache := []string{h.cacheHost()}
	h.pulls(t, "everything runs", h.own(), onlyCache, h.cacheHost())
	h.pulls(t, "everything runs", h.mirrored(), onlyCache, h.cacheHost())

	h.parent.stop()
	h.registry.stop(t)
	byDigest := h.parent.host + "/" + repository + "@" + h.image.digest
	for _, ref := range []string{h.own(), h.mirrored(), byDigest} {
		if traffic := h.pulls(t, "only the cache runs", ref, onlyCache, h.cacheHost()); traffic.cacheMissed() {
			t.Errorf("pulling %s with only the cache: Cache-Status %v, want hits", ref, traffic.cacheStatus())
		}
	}
}

// TestColdCache pulls, on a node that has nothing yet, what only the parent can
// still give.
func TestColdCache(t *testing.T) {
	h := startHops(t, systemConfig{})
	h.registry.stop(t)
	all := []string{h.cacheHost(), h.LoginServer, h.parent.host}
	h.pulls(t, "registry stopped", h.mirrored(), all, h.parent.host)
	h.fails(t, "registry stopped", h.own(), "502 Bad Gateway", all[:2])
}

// TestNotKept pulls an image that the registry does not keep: nodes ask for it
// by the parent's name, and nothing in between may stand in the way.
func TestNotKept(t *testing.T) {
	parent := startParent(t, true)
	parent.push(t, repository+":1", load(t, smallImage))
	s := startSystem(t, parent, systemConfig{})
	image := load(t, bigImage)
	parent.push(t, "other/app:2", image)
	d := startContainerd(t, daemonConfig{CertsDir: s.certs})

	ref := parent.host + "/other/app:2"
	pullAndCheck(t, d, ref, image)
	if diff := cmp.Diff([]string{parent.host}, d.exchanges(t).served()); diff != "" {
		t.Errorf("hosts that served %s (-want +got):\n%s", ref, diff)
	}
}

// TestTagsUpstream resolves tags with the parent and takes the content from
// the node's cache.
func TestTagsUpstream(t *testing.T) {
	h := startHops(t, systemConfig{Mirror: "resolveTags: false"})
	h.daemon.exchanges(t)
	pullAndCheck(t, h.daemon, h.mirrored(), h.image)
	traffic := h.daemon.exchanges(t)
	if diff := cmp.Diff([]string{h.parent.host, h.cacheHost()}, traffic.asked()); diff != "" {
		t.Errorf("hosts asked (-want +got):\n%s", diff)
	}
	for _, request := range h.parent.seen() {
		if !strings.HasPrefix(request, "HEAD ") {
			t.Errorf("the parent was asked for content: %s", request)
		}
	}
}

// TestNoFallback keeps nodes from the parent, as for content that must not
// come from elsewhere.
func TestNoFallback(t *testing.T) {
	h := startHops(t, systemConfig{Mirror: "fallback: false"})
	asked := []string{h.cacheHost(), h.LoginServer}
	h.pulls(t, "everything runs", h.mirrored(), asked[:1], h.cacheHost())
	h.cache.stop(t)
	h.pulls(t, "cache stopped", h.mirrored(), asked, h.LoginServer)
	h.registry.stop(t)
	h.fails(t, "cache and registry stopped", h.mirrored(), "connection refused", asked)
	if asked := h.parent.seen(); len(asked) > 0 {
		t.Errorf("the parent was asked: %v", asked)
	}
}

// hops is a system with a containerd that pulls image from it.
type hops struct {
	*system
	daemon *daemon
	image  *testImage
}

func startHops(t *testing.T, config systemConfig) *hops {
	t.Helper()
	image := load(t, bigImage)
	parent := startParent(t, true)
	parent.push(t, repository+":1", image)
	s := startSystem(t, parent, config)
	return &hops{system: s, daemon: startContainerd(t, daemonConfig{CertsDir: s.certs}), image: image}
}

// ipv6Loopback is a free port of ::1, or of 127.0.0.1 on a machine without
// IPv6.
func ipv6Loopback(t *testing.T) string {
	t.Helper()
	const wanted, instead = "[::1]:0", "127.0.0.1:0"
	l, err := net.Listen("tcp", wanted)
	if err != nil {
		t.Logf("%v: using 127.0.0.1", err)
		return instead
	}
	l.Close()
	return wanted
}

// own names the image by the registry's own address.
func (h *hops) own() string { return h.LoginServer + "/" + repository + ":1" }

// mirrored names the image as its parent does.
func (h *hops) mirrored() string { return h.parent.host + "/" + repository + ":1" }

func (h *hops) cacheHost() string { return strings.TrimPrefix(h.CacheURL, "http://") }

// pulls pulls ref, checks what came, which hosts were asked and which one
// served, and removes it again.
func (h *hops) pulls(t *testing.T, when, ref string, asked []string, served string) trace {
	t.Helper()
	h.daemon.exchanges(t)
	start := time.Now()
	pullAndCheck(t, h.daemon, ref, h.image)
	traffic := h.daemon.exchanges(t)
	t.Logf("%s: %s from %s in %v, Cache-Status %v", when, ref, traffic.served(), time.Since(start).Round(time.Millisecond), traffic.cacheStatus())
	if diff := cmp.Diff(asked, traffic.asked()); diff != "" {
		t.Errorf("%s: hosts asked for %s (-want +got):\n%s", when, ref, diff)
	}
	if diff := cmp.Diff([]string{served}, traffic.served()); diff != "" {
		t.Errorf("%s: hosts that served %s (-want +got):\n%s", when, ref, diff)
	}
	h.daemon.remove(t, ref)
	return traffic
}

// fails pulls ref, which must end within five seconds with an error that names
// the image and says why.
func (h *hops) fails(t *testing.T, when, ref, why string, asked []string) {
	t.Helper()
	const patience = 5 * time.Second
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	h.daemon.exchanges(t)
	start := time.Now()
	_, err := h.daemon.pull(ctx, ref)
	took := time.Since(start).Round(time.Millisecond)
	if err == nil {
		t.Fatalf("%s: %s was pulled, want an error", when, ref)
	}
	t.Logf("%s: after %v: %v", when, took, err)
	if took > patience {
		t.Errorf("%s: pulling %s failed after %v, want at most %v", when, ref, took, patience)
	}
	for _, want := range []string{ref, why} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%s: pulling %s: error %q does not say %q", when, ref, err, want)
		}
	}
	if diff := cmp.Diff(asked, h.daemon.exchanges(t).asked()); diff != "" {
		t.Errorf("%s: hosts asked for %s (-want +got):\n%s", when, ref, diff)
	}
}
