package cache

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(processDir) != "" {
		if err := runProcess(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

const testHost = "registry.example"

// origin is a registry for the cache to ask: content by digest, tags, and a
// record of what was asked. A handler set in front of it makes it misbehave.
type origin struct {
	*httptest.Server

	mu        sync.Mutex
	manifests map[string][]byte // repository/digest
	blobs     map[string][]byte // repository/digest
	tags      map[string]digest.Digest
	asked     []string // "GET /v2/…", in order
	ranges    []string // the Range of each
	auth      []string // the Authorization of each
	front     func(w http.ResponseWriter, r *http.Request) (done bool)
}

func newOrigin(t testing.TB) *origin {
	o := &origin{manifests: map[string][]byte{}, blobs: map[string][]byte{}, tags: map[string]digest.Digest{}}
	o.Server = httptest.NewServer(o)
	t.Cleanup(o.Close)
	return o
}

// Close ends the server without waiting for those who are stuck in it.
func (o *origin) Close() {
	o.CloseClientConnections()
	o.Server.Close()
}

func (o *origin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	o.mu.Lock()
	o.asked = append(o.asked, r.Method+" "+r.URL.Path)
	o.ranges = append(o.ranges, r.Header.Get("Range"))
	o.auth = append(o.auth, r.Header.Get("Authorization"))
	front := o.front
	o.mu.Unlock()
	if front != nil && front(w, r) {
		return
	}
	rt, err := parseRoute(r.URL)
	if err != nil {
		http.NotFound(w, r)
		return
	}
	o.mu.Lock()
	if rt.tag != "" {
		rt.digest = o.tags[rt.repo+":"+rt.tag]
	}
	body, ok := o.blobs[rt.repo+"/"+rt.digest.String()]
	if rt.kind == kindManifest {
		body, ok = o.manifests[rt.repo+"/"+rt.digest.String()]
	}
	o.mu.Unlock()
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Docker-Content-Digest", rt.digest.String())
	w.Header().Set("Content-Type", "application/octet-stream")
	if rt.kind == kindManifest {
		w.Header().Set("Content-Type", mediaTypeOf(body))
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
}

func (o *origin) setFront(front func(w http.ResponseWriter, r *http.Request) bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.front = front
}

func (o *origin) blob(repo string, body []byte) digest.Digest {
	d := digest.FromBytes(body)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.blobs[repo+"/"+d.String()] = body
	return d
}

func (o *origin) manifest(repo, tag, body string) digest.Digest {
	d := digest.FromString(body)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.manifests[repo+"/"+d.String()] = []byte(body)
	if tag != "" {
		o.tags[repo+":"+tag] = d
	}
	return d
}

// count returns how many requests began with prefix.
func (o *origin) count(prefix string) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := 0
	for _, a := range o.asked {
		if strings.HasPrefix(a, prefix) {
			n++
		}
	}
	return n
}

func (o *origin) forget() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.asked, o.ranges, o.auth = nil, nil, nil
}

// random returns n bytes that are the same for the same n and seed.
func random(n int, seed byte) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// testManifest returns an OCI manifest that names layers.
func testManifest(layers ...digest.Digest) string {
	var b strings.Builder
	b.WriteString(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",` +
		`"config":{"mediaType":"application/vnd.oci.image.config.v1+json","size":2,` +
		`"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"},"layers":[`)
	for i, l := range layers {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"%s","size":1}`, l)
	}
	b.WriteString("]}")
	return b.String()
}

// node is a running cache and a client of it.
type node struct {
	*Cache
	t      testing.TB
	cfg    Config
	url    string
	client *http.Client
	stop   func()
}

// patient are the timeouts of tests over a real network: nothing that works
// runs into them on a busy machine. What does is tested on a clock of its own.
var patient = Timeouts{
	Dial: 30 * time.Second, Headers: 30 * time.Second, Tag: 30 * time.Second, Stall: 30 * time.Second,
	MinRate: 1, Unread: time.Minute, Retry: time.Second, Peer: 30 * time.Second, Hedge: time.Minute,
}

func upstreams(urls ...string) map[string]Registry {
	var reg Registry
	for _, u := range urls {
		reg.Upstreams = append(reg.Upstreams, Upstream{URL: u})
	}
	return map[string]Registry{testHost: reg}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// start runs a cache; zero fields of cfg get values for tests.
func start(t testing.TB, cfg Config) *node {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	if cfg.Logger == nil {
		cfg.Logger = quiet()
	}
	if cfg.Timeouts == (Timeouts{}) {
		cfg.Timeouts = patient
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Listener = l
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	n := &node{Cache: c, t: t, cfg: cfg, url: "http://" + l.Addr().String()}
	n.client = newClient()
	n.stop = sync.OnceFunc(func() {
		n.client.CloseIdleConnections()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(n.stop)
	n.await(func() bool { return c.disk.Load() != nil })
	return n
}

func newClient() *http.Client {
	return &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 32, DisableCompression: true}}
}

func newGet(ctx context.Context, url string) *http.Request {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		panic(err)
	}
	return req
}

// restart stops the cache and runs another on the same directory.
func (n *node) restart() *node {
	n.t.Helper()
	n.stop()
	cfg := n.cfg
	cfg.Listener, cfg.Metrics = nil, nil
	return start(n.t, cfg)
}

// await polls for something that happens beside the requests.
func (n *node) await(cond func() bool) {
	n.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			n.t.Fatal("it did not happen within 10 seconds")
		}
		time.Sleep(time.Millisecond)
	}
}

// settled waits until nothing is being downloaded or written.
func (n *node) settled() {
	n.t.Helper()
	n.await(func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return len(n.fills) == 0
	})
	n.work.Wait()
}

// reply is a complete answer, or as much as came of it.
type reply struct {
	status int
	header http.Header
	body   []byte
	err    error // of reading the body
	took   time.Duration
}

func (r reply) cache() string {
	return strings.TrimPrefix(r.header.Get("Cache-Status"), "connected-registry; ")
}

func (n *node) do(method, path string, header ...string) reply {
	n.t.Helper()
	req, err := http.NewRequest(method, n.url+path, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	if !strings.Contains(path, "ns=") {
		req.URL.RawQuery = "ns=" + testHost
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	began := time.Now()
	resp, err := n.client.Do(req)
	if err != nil {
		n.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, body, err, time.Since(began)}
}

func (n *node) get(path string, header ...string) reply { return n.do(http.MethodGet, path, header...) }

// wantBlob checks that the answer is the whole of body.
func (n *node) wantBlob(r reply, body []byte, cacheStatus string) {
	n.t.Helper()
	if r.err != nil || r.status != http.StatusOK || !bytes.Equal(r.body, body) {
		n.t.Fatalf("status %d, %d of %d bytes, error %v, equal %v: %.200s", r.status, len(r.body), len(body), r.err, bytes.Equal(r.body, body), r.body)
	}
	if got, want := r.header.Get("Docker-Content-Digest"), digest.FromBytes(body).String(); got != want {
		n.t.Errorf("Docker-Content-Digest %q, want %q", got, want)
	}
	if got, want := r.header.Get("Content-Length"), strconv.Itoa(len(body)); got != want {
		n.t.Errorf("Content-Length %q, want %q", got, want)
	}
	if r.cache() != cacheStatus {
		n.t.Errorf("Cache-Status %q, want %q", r.cache(), cacheStatus)
	}
}

// wantRefused checks that the answer makes containerd ask its next host, soon.
func (n *node) wantRefused(r reply, status int, cacheStatus string) {
	n.t.Helper()
	if r.status != status {
		n.t.Fatalf("status %d, want %d: %s", r.status, status, r.body)
	}
	if r.cache() != cacheStatus {
		n.t.Errorf("Cache-Status %q, want %q", r.cache(), cacheStatus)
	}
}

func (n *node) stored(d digest.Digest) bool {
	_, err := os.Stat(n.disk.Load().store.blobPath(d))
	return err == nil
}

func blobURL(repo string, d digest.Digest) string { return "/v2/" + repo + "/blobs/" + d.String() }
func manifestURL(repo string, ref string) string  { return "/v2/" + repo + "/manifests/" + ref }
func TestServesAndStores(t *testing.T) {
	o := newOrigin(t)
	n := start(t, Config{Registries: upstreams(o.URL)})
	for _, size := range []int{0, 1, 1000, fillChunk, HoldBackWhole, HoldBackWhole + 1, 9<<20 + 17} {
		t.Run(strconv.Itoa(size), func(t *testing.T) {
			body := random(size, 1)
			d := o.blob("team/app", body)
			path := blobURL("team/app", d)
			n.wantBlob(n.get(path), body, "fwd=miss; stored")
			n.settled()
			o.forget()
			n.wantBlob(n.get(path), body, "hit")
			head := n.do(http.MethodHead, path)
			if head.status != 200 || head.header.Get("Content-Length") != strconv.Itoa(size) || head.cache() != "hit" {
				t.Errorf("HEAD: %d %v", head.status, head.header)
			}
			if len(o.asked) != 0 {
				t.Errorf("the upstream was asked again: %q", o.asked)
			}
			if size > 10 {
				part := n.get(path, "Range", "bytes=3-9")
				if part.status != 206 || !bytes.Equal(part.body, body[3:10]) ||
					part.header.Get("Content-Range") != fmt.Sprintf("bytes 3-9/%d", size) {
					t.Errorf("range: %d %v", part.status, part.header)
				}
			}
		})
	}
}

func TestRanges(t *testing.T) {
	o := newOrigin(t)
	n := start(t, Config{Registries: upstreams(o.URL)})
	body := random(6<<20, 2)
	d := o.blob("app", body)
	size := len(body)
	for _, warm := range []bool{false, true} {
		for _, tt := range []struct {
			header     string
			status     int
			start, end int
		}{
			{"bytes=0-", 206, 0, size},
			{"bytes=1000-", 206, 1000, size},
			{"bytes=5-5", 206, 5, 6},
			{"bytes=5-99999999", 206, 5, size},
			{"bytes=-7", 206, size - 7, size},
			{"bytes=-99999999", 206, 0, size},
			{"bytes=7-3", 200, 0, size},
			{"bytes=0-1,5-6", 200, 0, size},
			{"lines=1-2", 200, 0, size},
			{fmt.Sprintf("bytes=%d-", size), 416, 0, 0},
			{"bytes=-0", 416, 0, 0},
		} {
			r := n.get(blobURL("app", d), "Range", tt.header)
			if r.status != tt.status {
				t.Errorf("warm %v, %s: status %d, want %d: %.100s", warm, tt.header, r.status, tt.status, r.body)
				continue
			}
			if tt.status != 416 && !bytes.Equal(r.body, body[tt.start:tt.end]) {
				t.Errorf("warm %v, %s: wrong bytes", warm, tt.header)
			}
		}
		n.settled()
	}
	if r := n.get(blobURL("app", d), "Range", "bytes=5-9", "If-Range", `"other"`); r.status != 200 {
		t.Errorf("If-Range with another tag: status %d", r.status)
	}
	if r := n.get(blobURL("app", d), "If-None-Match", etag(d)); r.status != 200 {
		t.Errorf("If-None-Match must never lead to 304: status %d", r.status)
	}
}

func TestRefusesAtOnce(t *testing.T) {
	o := newOrigin(t)
	n := start(t, Config{Registries: upstreams(o.URL)})
	d := digest.FromString("x")
	for _, tt := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/v2/?ns=" + testHost, 200},
		{"GET", "/v2/app/blobs/" + d.String() + "?ns=other.example", 404},
		{"GET", "/v2/app/blobs/" + d.String() + "?ns=a&ns=b", 404},
		{"GET", "/v2/app/blobs/sha256:abc?ns=" + testHost, 404},
		{"GET", "/v2/app/blobs/" + d.String() + "?ns=" + testHost, 404},
		{"GET", "/v2/../app/blobs/" + d.String() + "?ns=" + testHost, 404},
		{"GET", "/v2/APP/blobs/" + d.String() + "?ns=" + testHost, 404},
		{"GET", "/metrics?ns=" + testHost, 404},
		{"GET", "/v2/app/tags/list?ns=" + testHost, 404},
		{"POST", "/v2/app/blobs/uploads/?ns=" + testHost, 405},
		{"PUT", "/v2/app/manifests/v1?ns=" + testHost, 405},
		{"DELETE", "/v2/app/manifests/v1?ns=" + testHost, 405},
	} {
		if r := n.do(tt.method, tt.path); r.status != tt.status {
			t.Errorf("%s %s: %d, want %d", tt.method, tt.path, r.status, tt.status)
		}
	}
	if got := len(o.asked); got != 1 {
		t.Errorf("the upstream was asked %d times: %q", got, o.asked)
	}
}

func TestLoopIsRefused(t *testing.T) {
	o := newOrigin(t)
	n := start(t, Config{Registries: upstreams(o.URL)})
	if err := n.SetRegistries(upstreams(n.url)); err != nil { // it leads to itself
		t.Fatal(err)
	}
	r := n.get(blobURL("app", digest.FromString("x")))
	n.wantRefused(r, 502, "fwd=miss; detail=unreachable")
	r = n.get(manifestURL("app", "v1"))
	n.wantRefused(r, 502, "fwd=miss; detail=unreachable")
}

func TestManifests(t *testing.T) {
	o := newOrigin(t)
	n := start(t, Config{Registries: upstreams(o.URL)})
	body := testManifest(digest.FromString("layer"))
	d := o.manifest("app", "v1", body)
	for _, tt := range []struct{ method, ref, cache string }{
		{"HEAD", "v1", "fwd=miss; stored"},
		{"HEAD", "v1", "hit; detail=checked"},
		{"GET", "v1", "hit; detail=checked"},
		{"GET", d.String(), "hit"},
		{"HEAD", d.String(), "hit"},
	} {
		r := n.do(tt.method, manifestURL("app", tt.ref), "Accept", "*/*")
		if r.status != 200 || r.cache() != tt.cache ||
			r.header.Get("Content-Length") != strconv.Itoa(len(body)) ||
			r.header.Get("Docker-Content-Digest") != d.String() ||
			r.header.Get("Content-Type") != "application/vnd.oci.image.manifest.v1+json" {
			t.Errorf("%s %s: %d %v", tt.method, tt.ref, r.status, r.header)
		}
		if tt.method == "GET" && string(r.body) != body {
			t.Errorf("%s %s: wrong body", tt.method, tt.ref)
		}
	}
	n.settled()
	n = n.restart()
	o.forget()
	if r := n.get(manifestURL("app", d.String())); r.status != 200 || r.cache() != "hit" || string(r.body) != body {
		t.Errorf("after a restart: %d %v", r.status, r.header)
	}
	if len(o.asked) != 0 {
		t.Errorf("the upstream was asked again: %q", o.asked)
	}
}

// TestAsHandler serves a cache by somebody else's server.
func TestAsHandler(t *testing.T) {
	o := newOrigin(t)
	body := random(1000, 3)
	d := o.blob("app", body)
	c, err := New(Config{Dir: t.TempDir(), Registries: upstreams(o.URL), Logger: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	get := func() *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		c.ServeHTTP(w, newGet(t.Context(), "http://cache"+blobURL("app", d))) // no ns: there is one registry
		return w
	}
	for range 2 { // it can be run again
		if w := get(); w.Code != http.StatusServiceUnavailable {
			t.Errorf("not running: %d", w.Code)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- c.Run(ctx) }()
		(&node{t: t}).await(func() bool { return c.disk.Load() != nil })
		if w := get(); w.Code != http.StatusOK || !bytes.Equal(w.Body.Bytes(), body) {
			t.Errorf("running: %d %s", w.Code, w.Body)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if got := o.count("GET"); got != 1 {
		t.Errorf("%d fetches", got)
	}
}

// lockedWriter makes a buffer safe for a logger.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func debugLog(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(&lockedWriter{w: w}, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
