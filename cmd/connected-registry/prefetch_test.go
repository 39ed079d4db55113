package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// startReplica runs a replica that takes pushes, and gives to everybody what it
// holds under the name mirror.example.
func startReplica(t *testing.T) (address string, stop func()) {
	t.Helper()
	settings, log := t.TempDir(), new(lines)
	files := replicaFiles(t, v1alpha1.ModeReadWrite)
	files["resource.yaml"] = strings.Replace(files["resource.yaml"], "spec: {", `spec: {parent: {endpoint: mirror.example}, repositories: [{name: "**"}], mirrors: [{registry: mirror.example, anonymousPull: true}], `, 1)
	mount(t, settings, files)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, []string{
			"registry", "--replica", settings, "--data", t.TempDir(), "--plain-http", "--listen", "127.0.0.1:0",
			"--health-listen", "127.0.0.1:0", "--drain-delay", "0s",
		}, io.Discard, log)
	}()
	said := regexp.MustCompile(`msg=serving registry=(\S+)`)
	waitFor(t, "serving", log, func() bool { return said.MatchString(log.String()) })
	return said.FindStringSubmatch(log.String())[1], func() {
		t.Helper()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// pushRandom pushes an image of some layers.
func pushRandom(t *testing.T, address, ref string) v1.Image {
	t.Helper()
	image, err := random.Image(64<<10, 2)
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(address+"/"+ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, image, remote.WithAuth(&authn.Basic{Username: "ci", Password: "pw"})); err != nil {
		t.Fatal(err)
	}
	return image
}

// runNodeCache runs the cache of a node until stop is called.
func runNodeCache(t *testing.T, c nodeCacheConfig) (n *nodeCache, stop func()) {
	t.Helper()
	n, err := newNodeCache(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		n.run(ctx)
	}()
	return n, func() {
		cancel()
		<-ended
	}
}

// freeAddress is one that nobody has taken.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// gauge is a metric of the cache; -1: there is none.
func gauge(t *testing.T, n *nodeCache, name, label string) float64 {
	t.Helper()
	families, err := n.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == name && (label == "" || len(m.Label) == 1 && m.Label[0].GetValue() == label) {
				return m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
	}
	return -1
}

// TestNodeCachePrefetches brings what is meant for its node, and gives it to a
// client when the registry is away.
func TestNodeCachePrefetches(t *testing.T) {
	registry, stopRegistry := startReplica(t)
	image := pushRandom(t, registry, "team/app:1")
	other := pushRandom(t, registry, "team/other:1")
	const metric = "connected_registry_cache_prefetch_images"
	listen := freeAddress(t)
	n, stop := runNodeCache(t, nodeCacheConfig{dir: t.TempDir(), listen: listen, node: "node-a", log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	defer stop()
	configuration := &v1alpha1.NodeConfiguration{
		Registry: registry, PlainHTTP: true, Names: []string{registry},
		Mirrors:  []v1alpha1.NodeMirror{{Mirror: v1alpha1.Mirror{Registry: "mirror.example"}}},
		Prefetch: []v1alpha1.NodePrefetch{{Images: []string{"mirror.example/team/other:1"}, Nodes: []string{"node-b"}}},
	}
	if err := n.Configure(configuration, ""); err != nil {
		t.Fatal(err)
	}
	await(t, "nothing to prefetch", func() bool { return gauge(t, n, metric, "present") == 0 })
	configuration.Prefetch = append(configuration.Prefetch, v1alpha1.NodePrefetch{Images: []string{"mirror.example/team/app:1"}, Nodes: []string{"node-a", "node-b"}})
	if err := n.Configure(configuration, ""); err != nil {
		t.Fatal(err)
	}
	await(t, "the image is here", func() bool { return gauge(t, n, metric, "present") == 1 && gauge(t, n, metric, "missing") == 0 })
	stopRegistry()
	status := func(path string) int {
		t.Helper()
		resp, err := http.Get("http://" + listen + path + "?ns=mirror.example")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Error(err)
		}
		return resp.StatusCode
	}
	if got := status("/v2/team/app/manifests/1"); got != http.StatusOK {
		t.Errorf("manifest: %d", got)
	}
	for image, want := range map[v1.Image]int{image: http.StatusOK, other: http.StatusBadGateway} {
		layers, err := image.Layers()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range layers {
			d, err := l.Digest()
			if err != nil {
				t.Fatal(err)
			}
			repo := map[int]string{http.StatusOK: "app", http.StatusBadGateway: "other"}[want]
			if got := status(fmt.Sprintf("/v2/team/%s/blobs/%s", repo, d)); got != want {
				t.Errorf("a layer of %s: %d, want %d", repo, got, want)
			}
		}
	}
}

// TestNodeCachePrefetchesPrivate brings an image with the node's own credential,
// which is not there at first, and opens it to nobody.
func TestNodeCachePrefetchesPrivate(t *testing.T) {
	registry, stopRegistry := startReplica(t)
	defer stopRegistry()
	image := pushRandom(t, registry, "team/private:1")
	const metric = "connected_registry_cache_prefetch_images"
	listen, credentials := freeAddress(t), t.TempDir()
	n, stop := runNodeCache(t, nodeCacheConfig{
		dir: t.TempDir(), listen: listen, node: "node-a", credentials: credentials, log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	defer stop()
	order := func(bandwidth string) { // another order, so that it is looked at again now
		t.Helper()
		err := n.Configure(&v1alpha1.NodeConfiguration{
			Registry: registry, PlainHTTP: true, Names: []string{registry},
			NodeCache: v1alpha1.NodeCache{PrefetchBandwidth: new(resource.MustParse(bandwidth))},
			Prefetch:  []v1alpha1.NodePrefetch{{Images: []string{registry + "/team/private:1"}}},
		}, "")
		if err != nil {
			t.Fatal(err)
		}
	}
	order("1Gi")
	await(t, "it cannot be read", func() bool { return gauge(t, n, metric, "missing") == 1 })
	for file, content := range map[string]string{"username": "ci", "password": "pw\n"} {
		if err := os.WriteFile(filepath.Join(credentials, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	order("2Gi")
	await(t, "the image is here", func() bool { return gauge(t, n, metric, "present") == 1 })
	if user, password := n.credential("mirror.example"); user+password != "" {
		t.Error("another registry is shown the credential")
	}
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	d, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	// A wrong password comes last: it takes the registry so long, on purpose, that
	// on a slow machine the cache passes over the registry.
	for _, auth := range []string{"", "pw", "wrong"} {
		req, err := http.NewRequest(http.MethodGet, fmt.Sprintf("http://%s/v2/team/private/blobs/%s?ns=%s", listen, d, registry), nil)
		if err != nil {
			t.Fatal(err)
		}
		if auth != "" {
			req.SetBasicAuth("ci", auth)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Error(err)
		}
		resp.Body.Close()
		how := resp.Header.Get("Cache-Status")
		right := resp.StatusCode == http.StatusUnauthorized
		switch auth {
		case "pw":
			right = resp.StatusCode == http.StatusOK && strings.Contains(how, "hit")
		case "wrong":
			right = right || resp.StatusCode == http.StatusBadGateway
		}
		if !right {
			t.Errorf("with %q: %d: %s", auth, resp.StatusCode, how)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}
