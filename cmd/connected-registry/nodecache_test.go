package main

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// await waits for a condition. The limit is for a machine that is busy.
func await(t *testing.T, what string, check func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !check(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 seconds: %s", what)
		}
	}
}

// TestNodeCache: the cache waits for its address, takes new registries while it
// runs, and begins anew for other bounds.
func TestNodeCache(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := taken.Addr().String()
	n, err := newNodeCache(nodeCacheConfig{dir: t.TempDir(), listen: address, log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		n.run(ctx)
	}()
	defer func() {
		cancel()
		<-ended
		if n.Serving() {
			t.Error("serving after the end")
		}
	}()
	configuration := &v1alpha1.NodeConfiguration{Registry: "127.0.0.1:1", Names: []string{"registry.example.com"}}
	if n.Serving() || n.Fault() != nil {
		t.Error("serving, or at fault, without a configuration")
	}
	if err := n.Configure(configuration, ""); err != nil {
		t.Fatal(err)
	}
	await(t, "fault", func() bool { return n.Fault() != nil })
	if err := n.Fault().Error(); !strings.Contains(err, "--cache-listen") {
		t.Errorf("the fault has no remedy: %s", err)
	}
	taken.Close()
	await(t, "serving", func() bool { return n.Serving() && n.Fault() == nil })
	knows := func(registry string) bool {
		resp, err := http.Get("http://" + address + "/v2/?ns=" + registry)
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	}
	await(t, "own name", func() bool { return knows("registry.example.com") })
	if knows("docker.io") {
		t.Error("answers for a registry that is not mirrored")
	}
	configuration = &v1alpha1.NodeConfiguration{
		Registry: "127.0.0.1:1", Names: []string{"registry.example.com"},
		Mirrors: []v1alpha1.NodeMirror{{Mirror: v1alpha1.Mirror{Registry: "docker.io"}}},
	}
	n.mu.Lock()
	before := n.running
	n.mu.Unlock()
	if err := n.Configure(configuration, ""); err != nil {
		t.Fatal(err)
	}
	await(t, "mirror", func() bool { return knows("docker.io") })
	n.mu.Lock()
	same := n.running == before
	n.mu.Unlock()
	if !same {
		t.Error("began anew for another registry")
	}
	size := resource.MustParse("1Gi")
	for bounds, set := range map[string]func(*v1alpha1.NodeCache){
		"size":           func(c *v1alpha1.NodeCache) { c.MaxSize = &size },
		"offline access": func(c *v1alpha1.NodeCache) { c.OfflineAccess = "P7D" },
	} {
		set(&configuration.NodeCache)
		if err := n.Configure(configuration, ""); err != nil {
			t.Fatal(err)
		}
		await(t, bounds, func() bool {
			n.mu.Lock()
			now := n.running
			n.mu.Unlock()
			anew := now != nil && now != before && knows("docker.io")
			if anew {
				before = now
			}
			return anew
		})
	}
	if got := n.want.OfflineTTL; got != 7*24*time.Hour {
		t.Errorf("offline access for %s", got)
	}
	configuration.NodeCache.OfflineAccess = "a week"
	if err := n.Configure(configuration, ""); err == nil || !strings.Contains(err.Error(), "nodeCache.offlineAccess") {
		t.Errorf("no duration: %v", err)
	}
	if err := n.Configure(&v1alpha1.NodeConfiguration{}, ""); err == nil || !knows("docker.io") {
		t.Errorf("a configuration of no use: %v", err)
	}
	if families, err := n.Gather(); err != nil || len(families) == 0 {
		t.Errorf("no metrics: %v", err)
	}
}

func TestNodeCacheRefuses(t *testing.T) {
	for _, address := range []string{"0.0.0.0:5050", "192.0.2.1:5050", "localhost:5050", "nonsense"} {
		if _, err := newNodeCache(nodeCacheConfig{dir: t.TempDir(), listen: address, log: slog.Default()}); err == nil {
			t.Errorf("%s: no error", address)
		}
	}
}
