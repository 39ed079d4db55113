package syncer

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

// testParent is a real registry. Tests push to it by one address; the syncer
// reads it by another, where requests are counted and can be made to fail.
type testParent struct {
	host    string       // for the syncer
	push    string       // for tests
	pusher  *http.Client // of tests
	handler http.Handler
	// dial connects to host. nil: by the loopback network.
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	mu       sync.Mutex
	requests []string         // METHOD PATH, of what the syncer asked
	sent     map[string]int64 // bytes of blobs sent, by digest
	// fault may answer a request itself, and returns true then.
	fault func(w http.ResponseWriter, r *http.Request) bool
}

func newTestParent(t testing.TB, opts ...registry.Option) *testParent {
	t.Helper()
	p := newHandler(opts)
	p.pusher = http.DefaultClient
	push := httptest.NewServer(p.handler)
	t.Cleanup(push.Close)
	front := httptest.NewServer(p)
	t.Cleanup(front.Close)
	p.push, p.host = strings.TrimPrefix(push.URL, "http://"), strings.TrimPrefix(front.URL, "http://")
	return p
}

func newHandler(opts []registry.Option) *testParent {
	return &testParent{
		sent:    make(map[string]int64),
		handler: registry.New(append([]registry.Option{registry.Logger(log.New(io.Discard, "", 0))}, opts...)...),
	}
}

// newTimedParent is a testParent for a synctest bubble: it is reached without
// the kernel's network, so that time passes when everyone waits for it, and
// however slow the machine is, not while anything is under way.
func newTimedParent(t testing.TB, opts ...registry.Option) *testParent {
	t.Helper()
	p := newHandler(opts)
	p.host, p.push = "127.0.0.1:1", "127.0.0.1:2"
	p.pusher = &http.Client{Transport: direct{p.handler}}
	l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	p.dial = l.dial
	server := &http.Server{Handler: p, ErrorLog: log.New(io.Discard, "", 0)}
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() {
		_ = server.Close()
		wg.Wait()
	})
	return p
}

// pipeListener accepts what its dial connects.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipeListener) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

// direct has requests answered by a handler without any network.
type direct struct{ http.Handler }

func (d direct) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body == nil {
		req = req.Clone(req.Context())
		req.Body = http.NoBody
	}
	rec := httptest.NewRecorder()
	d.ServeHTTP(rec, req)
	resp := rec.Result()
	resp.Request = req
	return resp, nil
}

var blobPath = regexp.MustCompile(`/blobs/(sha256:[0-9a-f]{64})$`)

func (p *testParent) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.requests = append(p.requests, r.Method+" "+r.URL.RequestURI())
	fault := p.fault
	p.mu.Unlock()
	if m := blobPath.FindStringSubmatch(r.URL.Path); m != nil && r.Method == http.MethodGet {
		w = &countingWriter{ResponseWriter: w, count: func(n int) {
			p.mu.Lock()
			p.sent[m[1]] += int64(n)
			p.mu.Unlock()
		}}
	}
	if fault != nil && fault(w, r) {
		return
	}
	p.handler.ServeHTTP(w, r)
}

type countingWriter struct {
	http.ResponseWriter
	count func(int)
}

func (w *countingWriter) Write(b []byte) (int, error) {
	n, err := w.ResponseWriter.Write(b)
	w.count(n)
	return n, err
}

func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (p *testParent) setFault(f func(w http.ResponseWriter, r *http.Request) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = f
}

// asked returns the requests since the last call whose method and path match.
func (p *testParent) asked(pattern string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	re := regexp.MustCompile(pattern)
	var found []string
	for _, r := range p.requests {
		if re.MatchString(r) {
			found = append(found, r)
		}
	}
	return found
}

func (p *testParent) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.requests = nil
	clear(p.sent)
}

func (p *testParent) bytesSent() (total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range p.sent {
		total += n
	}
	return total
}

// seeded makes content that is the same whenever the test runs, so that a
// failure can be looked at twice.
func seeded(seed uint64, size int) []byte {
	b := make([]byte, size)
	if _, err := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b); err != nil {
		panic(err)
	}
	return b
}

func testLayer(seed uint64, size int) ggcr.Layer {
	return static.NewLayer(seeded(seed, size), types.OCILayer)
}

// testImage is an image of the given layers. Its config is its own.
func testImage(t testing.TB, author string, layers ...ggcr.Layer) ggcr.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.Author = author
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.AppendLayers(img, layers...); err != nil {
		t.Fatal(err)
	}
	return img
}

func (p *testParent) ref(t testing.TB, s string) name.Reference {
	t.Helper()
	ref, err := name.ParseReference(p.push+"/"+s, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func (p *testParent) transport() []remote.Option {
	if p.pusher.Transport == nil {
		return nil
	}
	return []remote.Option{remote.WithTransport(p.pusher.Transport)}
}

// pushImage pushes under REPOSITORY:TAG and returns the digest.
func (p *testParent) pushImage(t testing.TB, where string, img ggcr.Image) digest.Digest {
	t.Helper()
	if err := remote.Write(p.ref(t, where), img, p.transport()...); err != nil {
		t.Fatal(err)
	}
	return digestOf(t, img)
}

func (p *testParent) pushIndex(t testing.TB, where string, index ggcr.ImageIndex) digest.Digest {
	t.Helper()
	if err := remote.WriteIndex(p.ref(t, where), index, p.transport()...); err != nil {
		t.Fatal(err)
	}
	return digestOf(t, index)
}

func digestOf(t testing.TB, x interface{ Digest() (ggcr.Hash, error) }) digest.Digest {
	t.Helper()
	h, err := x.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return digest.Digest(h.String())
}

// put uploads a manifest as it stands.
func (p *testParent) put(t testing.TB, path, mediaType string, body []byte) digest.Digest {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+p.push+"/v2/"+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := p.pusher.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatalf("PUT %s: %s", path, resp.Status)
	}
	return digest.FromBytes(body)
}

func (p *testParent) delete(t testing.TB, path string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, "http://"+p.push+"/v2/"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := p.pusher.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode >= 300 {
		t.Fatalf("DELETE %s: %s", path, resp.Status)
	}
}

// uniqueBytes is the size of everything in images, each blob once.
func uniqueBytes(t testing.TB, images ...ggcr.Image) (total int64) {
	t.Helper()
	seen := make(map[ggcr.Hash]bool)
	for _, img := range images {
		m, err := img.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		for _, desc := range append([]ggcr.Descriptor{m.Config}, m.Layers...) {
			if !seen[desc.Digest] {
				total += desc.Size
			}
			seen[desc.Digest] = true
		}
	}
	return total
}

// attach is an artifact that refers to a manifest.
func attach(t testing.TB, subject partial.Describable, artifactType, content string) ggcr.Image {
	t.Helper()
	desc, err := partial.Descriptor(subject)
	if err != nil {
		t.Fatal(err)
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.MediaType(artifactType))
	img, err = mutate.AppendLayers(img, static.NewLayer([]byte(content), "text/plain"))
	if err != nil {
		t.Fatal(err)
	}
	annotated := mutate.Annotations(img, map[string]string{"about": content}).(ggcr.Image)
	return mutate.Subject(annotated, *desc).(ggcr.Image)
}

// fixture is a Syncer over a real store.
type fixture struct {
	*Syncer
	parent *testParent
	root   string
	store  *storage.Store

	mu     sync.Mutex
	events []Event
}

func newFixture(t testing.TB, p *testParent, repositories ...v1alpha1.Repository) *fixture {
	t.Helper()
	return newFixtureAt(t, t.TempDir(), p, func(c *Config) { c.Repositories = repositories })
}

func newFixtureAt(t testing.TB, root string, p *testParent, configure func(*Config)) *fixture {
	t.Helper()
	store, err := storage.Open(t.Context(), storage.Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	f := &fixture{parent: p, root: root, store: store}
	config := Config{
		Store:     store.Namespace(),
		Driver:    store.Driver(),
		Parent:    Parent{Endpoint: p.host, Insecure: true},
		Referrers: true,
		Logger:    slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Progress: func(e Event) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.events = append(f.events, e)
		},
	}
	configure(&config)
	if f.Syncer, err = New(config); err != nil {
		t.Fatal(err)
	}
	f.dial = p.dial
	f.limits.backoff = time.Millisecond
	f.limits.maxBackoff = 5 * time.Millisecond
	return f
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// mustSync synchronises and fails the test unless everything was brought.
func (f *fixture) mustSync(t testing.TB) Result {
	t.Helper()
	result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
	if err != nil {
		t.Fatal(err)
	}
	if result.State != v1alpha1.SyncStateSucceeded {
		t.Fatalf("state %s", result.State)
	}
	for _, repo := range result.Repositories {
		if repo.TagsPresent != repo.TagsWanted || repo.BytesLeft != 0 || repo.Err != nil {
			t.Fatalf("not complete: %+v", repo)
		}
	}
	return result
}

// tagDigest is what a tag stands for here.
func (f *fixture) tagDigest(t testing.TB, repository, tag string) digest.Digest {
	t.Helper()
	d, err := f.Syncer.store.tag(t.Context(), repository, tag)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// read reads a blob of a repository and checks its digest.
func (f *fixture) read(ctx context.Context, repository string, d digest.Digest) error {
	repo, err := f.Syncer.store.repository(ctx, repository)
	if err != nil {
		return err
	}
	r, err := repo.Blobs(ctx).Open(ctx, d)
	if err != nil {
		return err
	}
	defer r.Close()
	if actual, err := digest.FromReader(r); err != nil || actual != d {
		return fmt.Errorf("%s has the bytes of %s: %w", d, actual, err)
	}
	return nil
}

// verifyHere reads everything that a manifest needs and checks every digest.
func (f *fixture) verifyHere(t testing.TB, repository string, d digest.Digest, wanted platforms) image {
	t.Helper()
	r := f.repository(repository)
	img, err := walk(t.Context(), d, wanted, r.stored)
	if err != nil {
		t.Fatalf("%s@%s: %v", repository, d, err)
	}
	for _, m := range img.manifests {
		if digest.FromBytes(m.body) != m.digest {
			t.Errorf("manifest %s has other bytes", m.digest)
		}
	}
	for _, blob := range img.blobs {
		if err := f.read(t.Context(), repository, blob.Digest); err != nil {
			t.Errorf("%s@%s: %v", repository, blob.Digest, err)
		}
	}
	return img
}

// repository is one of the parent's, in a run of its own.
func (f *fixture) repository(name string) *repository {
	r := f.newRun()
	return r.newRepository(r.origins[0], name, name, nil, nil)
}

// partialsLeft lists the files of unfinished transfers.
func (f *fixture) partialsLeft(t testing.TB) (files []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(f.root, "partial"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		files = append(files, e.Name())
	}
	return files
}

func exactly(names ...string) (repositories []v1alpha1.Repository) {
	for _, n := range names {
		repositories = append(repositories, v1alpha1.Repository{Name: n})
	}
	return repositories
}
