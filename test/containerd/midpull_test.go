package containerd

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/connected-registry/connected-registry/agent"
	"github.com/connected-registry/connected-registry/trust"
)

// TestCacheKilledInMidPull kills the node's cache while it passes a layer on:
// containerd takes the rest from the registry. The next cache makes do with
// what the first one left behind.
func TestCacheKilledInMidPull(t *testing.T) {
	for _, test := range midPullConfigs {
		t.Run(test.name, func(t *testing.T) {
			m := startMidPull(t, test.config)
			ref := m.LoginServer + "/" + repository + ":1"
			pulled := m.startPull(t, ref)
			m.cache.kill()
			m.gate.open()
			m.finish(t, pulled, test.attempts)

			traffic := m.daemon.exchanges(t)
			if diff := cmp.Diff([]string{m.cache.host, m.LoginServer}, traffic.served()); diff != "" {
				t.Errorf("hosts that served (-want +got):\n%s", diff)
			}
			if !traffic.resumed(m.LoginServer) {
				t.Errorf("the registry was not asked for the rest of a layer: %v", traffic)
			}

			m.daemon.remove(t, ref)
			m.startCache(t)
			pullAndCheck(t, m.daemon, ref, m.image)
			if diff := cmp.Diff([]string{m.cache.host}, m.daemon.exchanges(t).served()); diff != "" {
				t.Errorf("hosts that served with the next cache (-want +got):\n%s", diff)
			}
		})
	}
}

// TestRegistryLostInMidPull takes the registry away while the cache fetches a
// layer from it: containerd takes the rest from the image's own registry.
func TestRegistryLostInMidPull(t *testing.T) {
	for _, test := range midPullConfigs {
		t.Run(test.name, func(t *testing.T) {
			m := startMidPull(t, test.config)
			pulled := m.startPull(t, m.parent.host+"/"+repository+":1")
			m.gate.cut()
			m.registry.stop(t)
			m.finish(t, pulled, test.attempts)

			traffic := m.daemon.exchanges(t)
			if diff := cmp.Diff([]string{m.cache.host, m.parent.host}, traffic.served()); diff != "" {
				t.Errorf("hosts that served (-want +got):\n%s", diff)
			}
			if !traffic.resumed(m.parent.host) {
				t.Errorf("the parent was not asked for the rest of a layer: %v", traffic)
			}
		})
	}
}

// midPullConfigs are the ways to fetch a layer, with the number of attempts that
// a disturbed pull may take.
//
// With one request for a layer, containerd goes on at the next host. In chunks
// it does so only while every chunk's connection breaks within its body: when
// a chunk's request is refused instead, or when one worker's failure cancels
// another's body before that has broken too, the pull ends there (package
// docker, dockerFetcher.open in containerd 2.4.2). The kubelet then pulls once
// more, and so does the test.
var midPullConfigs = []struct {
	name     string
	config   daemonConfig
	attempts int
}{
	{"one request for a layer", daemonConfig{}, 1},
	{"layers in chunks", daemonConfig{FetchBuffer: 4 << 20}, 2},
}

// midPull is a system whose cache runs in a process of its own and reaches the
// registry through a gate.
type midPull struct {
	*system
	image     *testImage
	authority *trust.Authority // of the registry
	gate      *gate
	cacheDir  string
	cache     *cacheProcess
	daemon    *daemon
}

func startMidPull(t *testing.T, config daemonConfig) *midPull {
	t.Helper()
	m := &midPull{image: load(t, bigImage)}
	parent := startParent(t, true)
	parent.push(t, repository+":1", m.image)
	m.system = startSystem(t, parent, systemConfig{WithoutCache: true})

	var err error
	m.authority, err = trust.LoadOrCreateAuthority(filepath.Join(m.data, "ca"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	m.gate = startGate(t, "https://"+m.LoginServer, m.authority.Bundle().Pool())
	m.cacheDir = filepath.Join(t.TempDir(), "cache")
	m.startCache(t)
	config.CertsDir = m.certs
	m.daemon = startContainerd(t, config)
	return m
}

// startCache starts a cache on what the last one left and has the node use it.
func (m *midPull) startCache(t *testing.T) {
	t.Helper()
	m.cache = startCacheProcess(t, cacheProcessConfig{
		Dir:        m.cacheDir,
		Registries: []string{m.LoginServer, m.parent.host},
		Upstream:   m.gate.server.URL,
	})
	upstream, _, err := trust.ParseBundle(m.parent.certificate(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	configured, err := agent.New(agent.Config{
		NodeRoot: m.nodeRoot,
		Registry: m.LoginServer,
		CA:       m.authority.Bundle(),
		CacheURL: "http://" + m.cache.host,
		Mirrors:  []agent.Mirror{{Registry: m.parent.host, Server: m.parent.server.URL, ServerCA: upstream}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := configured.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// pullResult is what became of a pull.
type pullResult struct {
	ref, id string
	err     error
}

// startPull pulls ref in the background and returns when containerd has a part
// of a layer and the gate holds back the rest.
func (m *midPull) startPull(t *testing.T, ref string) <-chan pullResult {
	t.Helper()
	const part = 1 << 20
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	pulled := make(chan pullResult, 1)
	go func() {
		id, err := m.daemon.pull(ctx, ref)
		pulled <- pullResult{ref, id, err}
	}()
	for {
		select {
		case result := <-pulled:
			t.Fatalf("the pull of %s ended before it was disturbed: %v", ref, result.err)
		case <-time.After(10 * time.Millisecond):
		}
		if m.gate.holds() && m.received(t) >= part {
			return pulled
		}
	}
}

// received is how many bytes containerd has of the layer it has most of.
func (m *midPull) received(t *testing.T) int64 {
	t.Helper()
	ingests, err := m.daemon.client.ContentStore().ListStatuses(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var most int64
	for _, ingest := range ingests {
		most = max(most, ingest.Offset)
	}
	return most
}

// finish waits for the end of a disturbed pull, repeats it until it has been
// attempted as often as it may, and checks what came.
func (m *midPull) finish(t *testing.T, pulled <-chan pullResult, attempts int) {
	t.Helper()
	result := <-pulled
	for ; result.err != nil && attempts > 1; attempts-- {
		t.Logf("pulling %s: %v", result.ref, result.err)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		result.id, result.err = m.daemon.pull(ctx, result.ref)
		cancel()
	}
	if result.err != nil {
		t.Fatalf("pulling %s: %v", result.ref, result.err)
	}
	check(t, m.daemon, result.ref, result.id, m.image)
}

// gate passes requests on to a server, but holds back what is beyond the
// beginning of a large body until it is opened or cut.
type gate struct {
	server *httptest.Server

	mu     sync.Mutex
	holder bool          // whether a body is held back
	end    error         // what held bodies end with, once over is closed
	over   chan struct{} // closed by open and cut
	once   sync.Once
}

func startGate(t *testing.T, target string, roots *x509.CertPool) *gate {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy = nil
	transport.TLSClientConfig.RootCAs = roots
	g := &gate{over: make(chan struct{})}
	g.server = httptest.NewServer(&httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(u) },
		Transport: transport,
		ModifyResponse: func(r *http.Response) error {
			if strings.Contains(r.Request.URL.Path, "/blobs/") && r.Request.Method == http.MethodGet {
				r.Body = &heldBody{ReadCloser: r.Body, gate: g, ctx: r.Request.Context()}
			}
			return nil
		},
		ErrorLog: log.New(io.Discard, "", 0),
	})
	t.Cleanup(func() {
		g.open()
		g.server.CloseClientConnections()
		g.server.Close()
		transport.CloseIdleConnections()
	})
	return g
}

// open lets everything pass.
func (g *gate) open() { g.once.Do(func() { close(g.over) }) }

// cut breaks the connections of held bodies and refuses new ones.
func (g *gate) cut() {
	g.once.Do(func() {
		g.end = errors.New("cut")
		close(g.over)
	})
	g.server.Listener.Close()
	g.server.CloseClientConnections()
}

// holds says whether a body is held back.
func (g *gate) holds() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.holder
}

// heldBody is a body of which only the beginning passes a closed gate.
type heldBody struct {
	io.ReadCloser
	gate   *gate
	ctx    context.Context // of the request, which ends when its client leaves
	passed int64
}

func (b *heldBody) Read(p []byte) (int, error) {
	const beginning = 6 << 20
	if b.passed >= beginning {
		b.gate.mu.Lock()
		b.gate.holder = true
		b.gate.mu.Unlock()
		select {
		case <-b.gate.over:
			if b.gate.end != nil {
				return 0, b.gate.end
			}
		case <-b.ctx.Done():
			return 0, b.ctx.Err()
		}
	}
	n, err := b.ReadCloser.Read(p)
	b.passed += int64(n)
	return n, err
}
