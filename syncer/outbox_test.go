package syncer

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/registry"
	"github.com/connected-registry/connected-registry/storage"
)

// outboxFixture is a registry that takes pushes, with a real one as its parent.
type outboxFixture struct {
	*Outbox
	here, there *storage.Store
	told        []storage.Entry
	requests    atomic.Int64
	// fault may answer a request of the parent itself, and returns true then.
	fault atomic.Pointer[func(http.ResponseWriter, *http.Request) bool]
}

func openStore(t *testing.T, root string) *storage.Store {
	t.Helper()
	s, err := storage.Open(t.Context(), storage.Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func newOutboxFixture(t *testing.T, configure func(*OutboxConfig)) *outboxFixture {
	t.Helper()
	f := &outboxFixture{here: openStore(t, t.TempDir()), there: openStore(t, t.TempDir())}
	parent, err := registry.New(registry.Config{Store: f.there})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.requests.Add(1)
		if fault := f.fault.Load(); fault != nil && (*fault)(w, r) {
			return
		}
		parent.Handler().ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	config := OutboxConfig{
		Store:  f.here,
		Parent: Parent{Endpoint: strings.TrimPrefix(server.URL, "http://"), Insecure: true},
		Notify: func(_ context.Context, e storage.Entry) error { f.told = append(f.told, e); return nil },
		Logger: slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
	if configure != nil {
		configure(&config)
	}
	if f.Outbox, err = NewOutbox(config); err != nil {
		t.Fatal(err)
	}
	f.limits.backoff, f.limits.maxBackoff = time.Millisecond, 5*time.Millisecond
	return f
}

func (f *outboxFixture) setFault(fault func(http.ResponseWriter, *http.Request) bool) {
	f.fault.Store(&fault)
}

// push stores an image here, as a client does.
func (f *outboxFixture) push(t *testing.T, name, tag string, img ggcr.Image) digest.Digest {
	t.Helper()
	previous, _ := (&store{f.here.Namespace(), f.here}).tag(t.Context(), name, tag)
	c := storage.Change{Action: storage.ActionPush, Repository: name, Tag: tag, Digest: digestOf(t, img), Previous: previous}
	err := f.here.Journal().Record(t.Context(), c, func() error { put(t, f.here, name, tag, img); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return c.Digest
}

func (f *outboxFixture) deleteTag(t *testing.T, name, tag string) {
	t.Helper()
	repo, err := f.here.Repository(name)
	if err != nil {
		t.Fatal(err)
	}
	d, err := repo.Tag(t.Context(), tag)
	if err != nil {
		t.Fatal(err)
	}
	c := storage.Change{Action: storage.ActionDelete, Repository: name, Tag: tag, Digest: d}
	if err := f.here.Journal().Record(t.Context(), c, func() error { return repo.DeleteTag(t.Context(), tag) }); err != nil {
		t.Fatal(err)
	}
}

// put stores an image in a store.
func put(t *testing.T, to *storage.Store, name, tag string, img ggcr.Image) {
	t.Helper()
	s := &store{to.Namespace(), to}
	repo, err := s.repository(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	blobs := [][]byte{config}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		r, err := l.Compressed()
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		blobs = append(blobs, content)
	}
	for _, b := range blobs {
		if _, err := repo.Blobs(t.Context()).Put(t.Context(), "", b); err != nil {
			t.Fatal(err)
		}
	}
	body, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	r, err := to.Repository(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.PutManifest(t.Context(), digest.FromBytes(body), body, tag); err != nil {
		t.Fatal(err)
	}
}

// tags are those of a store, each with its digest, and with "!" where something
// of the image is missing.
func tags(t *testing.T, in *storage.Store) map[string]digest.Digest {
	t.Helper()
	s := &store{in.Namespace(), in}
	found := make(map[string]digest.Digest)
	for name, err := range in.Repositories(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		names, err := s.tags(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		for _, tag := range names {
			d, err := s.tag(t.Context(), name, tag)
			if err != nil {
				t.Fatal(err)
			}
			found[name+":"+tag] = d
			r := &repository{run: &run{store: s}, name: name, seen: make(map[digest.Digest]bool), left: make(map[digest.Digest]int64)}
			if whole, err := r.whole(t.Context(), d, nil); err != nil || !whole {
				t.Errorf("%s:%s is not whole (%v)", name, tag, err)
			}
		}
	}
	return found
}

func (f *outboxFixture) mustLook(t *testing.T) {
	t.Helper()
	if err := f.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := f.Status(); len(s.Problems) > 0 {
		t.Fatalf("problems: %v", s.Problems)
	}
}

func (f *outboxFixture) waiting(t *testing.T) int {
	t.Helper()
	n, _, err := f.here.Journal().Backlog(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestOutbox(t *testing.T) {
	f := newOutboxFixture(t, func(c *OutboxConfig) { c.ChunkSize = 40_000 })
	one := testImage(t, "one", testLayer(1, 100_000), testLayer(2, 1))
	two := testImage(t, "two", testLayer(1, 100_000), testLayer(3, 5_000))
	f.push(t, "team/app", "1", one)
	f.push(t, "team/app", "2", two)
	f.push(t, "team/app", "latest", one)
	f.push(t, "team/app", "latest", two)
	f.mustLook(t)
	want := map[string]digest.Digest{"team/app:1": digestOf(t, one), "team/app:2": digestOf(t, two), "team/app:latest": digestOf(t, two)}
	if diff := cmp.Diff(want, tags(t, f.there)); diff != "" {
		t.Errorf("at the parent, -want +got:\n%s", diff)
	}
	if n := f.waiting(t); n != 0 {
		t.Errorf("%d entries are left", n)
	}
	if len(f.told) != 4 {
		t.Errorf("told of %d changes", len(f.told))
	}
	if s := f.Status(); s.Brought != 4 || s.Conflicts != 0 || s.Dropped != 0 {
		t.Errorf("%+v", s)
	}
	f.deleteTag(t, "team/app", "1")
	f.deleteTag(t, "team/app", "latest")
	f.push(t, "team/app", "latest", one) // again
	f.mustLook(t)
	want = map[string]digest.Digest{"team/app:2": digestOf(t, two), "team/app:latest": digestOf(t, one)}
	if diff := cmp.Diff(want, tags(t, f.there)); diff != "" {
		t.Errorf("at the parent after deletions, -want +got:\n%s", diff)
	}
	before := f.requests.Load()
	f.mustLook(t)
	if n := f.requests.Load() - before; n != 0 {
		t.Errorf("%d requests with nothing to do", n)
	}
}

// TestOutboxConflicts moves tags at the parent while changes wait.
func TestOutboxConflicts(t *testing.T) {
	f := newOutboxFixture(t, nil)
	base, mine, theirs := testImage(t, "base", testLayer(1, 100)), testImage(t, "mine", testLayer(2, 100)), testImage(t, "theirs", testLayer(3, 100))
	for _, tag := range []string{"pushed", "deleted", "same"} {
		put(t, f.here, "app", tag, base)
		put(t, f.there, "app", tag, base)
	}
	f.push(t, "app", "pushed", mine)
	f.deleteTag(t, "app", "deleted")
	f.push(t, "app", "same", mine)
	put(t, f.there, "app", "pushed", theirs)
	put(t, f.there, "app", "deleted", theirs)
	put(t, f.there, "app", "same", mine)
	put(t, f.there, "app", "new", theirs)
	f.push(t, "app", "new", mine)
	f.mustLook(t)
	want := map[string]digest.Digest{"app:pushed": digestOf(t, theirs), "app:deleted": digestOf(t, theirs), "app:same": digestOf(t, mine), "app:new": digestOf(t, theirs)}
	if diff := cmp.Diff(want, tags(t, f.there)); diff != "" {
		t.Errorf("at the parent, -want +got:\n%s", diff)
	}
	if _, ok, err := (&store{f.there.Namespace(), f.there}).manifest(t.Context(), "app", digestOf(t, mine)); err != nil || !ok {
		t.Errorf("what was pushed is not at the parent (%v)", err)
	}
	s := f.Status()
	if s.Conflicts != 3 || s.Brought != 1 || len(s.Recent) != 3 || f.waiting(t) != 0 {
		t.Errorf("%+v, %d waiting", s, f.waiting(t))
	}
}

// TestOutboxAndSync lets a synchronisation run between a push and its journey to
// the parent: it must not put the parent's image in the place of the client's.
func TestOutboxAndSync(t *testing.T) {
	f := newOutboxFixture(t, nil)
	base, mine := testImage(t, "base", testLayer(1, 100)), testImage(t, "mine", testLayer(2, 100))
	for _, tag := range []string{"pushed", "deleted"} {
		put(t, f.here, "app", tag, base)
		put(t, f.there, "app", tag, base)
	}
	f.push(t, "app", "pushed", mine)
	f.deleteTag(t, "app", "deleted")
	s, err := New(Config{Store: f.here.Namespace(), Driver: f.here.Driver(), Parent: f.config.Parent, Repositories: exactly("app"), ReadWrite: true})
	if err != nil {
		t.Fatal(err)
	}
	sync := func() {
		t.Helper()
		if _, err := s.Sync(t.Context(), v1alpha1.SyncTriggerSchedule); err != nil {
			t.Fatal(err)
		}
	}
	sync()
	want := map[string]digest.Digest{"app:pushed": digestOf(t, mine)}
	if diff := cmp.Diff(want, tags(t, f.here)); diff != "" {
		t.Errorf("here before the parent was told, -want +got:\n%s", diff)
	}
	f.mustLook(t)
	sync()
	for where, store := range map[string]*storage.Store{"here": f.here, "at the parent": f.there} {
		if diff := cmp.Diff(want, tags(t, store)); diff != "" {
			t.Errorf("%s in the end, -want +got:\n%s", where, diff)
		}
	}
	// A synchronisation that has moved the tag all the same loses nothing.
	f.push(t, "app", "pushed", testImage(t, "third", testLayer(3, 100)))
	put(t, f.here, "app", "pushed", mine)
	f.mustLook(t)
	sync()
	want["app:pushed"] = digestOf(t, testImage(t, "third", testLayer(3, 100)))
	if diff := cmp.Diff(want, tags(t, f.here)); diff != "" {
		t.Errorf("here after a race, -want +got:\n%s", diff)
	}
}

// TestOutboxResumes breaks uploads off in the middle: what has arrived is not
// sent again.
func TestOutboxResumes(t *testing.T) {
	const size, chunk = 400_000, 50_000
	f := newOutboxFixture(t, func(c *OutboxConfig) { c.ChunkSize = chunk })
	var sent atomic.Int64
	f.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPatch {
			return false
		}
		if n := sent.Add(r.ContentLength) / chunk; n%3 == 2 {
			_, _ = io.CopyN(io.Discard, r.Body, chunk/2)
			panic(http.ErrAbortHandler)
		}
		return false
	})
	d := f.push(t, "app", "1", testImage(t, "one", testLayer(1, size)))
	f.mustLook(t)
	if got := tags(t, f.there)["app:1"]; got != d {
		t.Errorf("at the parent: %s", got)
	}
	if n := sent.Load(); n > 2*size {
		t.Errorf("%d bytes were sent for %d", n, size)
	}
}

// TestOutboxWaits fails in the ways a parent can, and brings everything in the
// end, in order, without one repository stopping another.
func TestOutboxWaits(t *testing.T) {
	f := newOutboxFixture(t, nil)
	f.limits.attempts = 2
	img := testImage(t, "one", testLayer(1, 1000))
	f.push(t, "bad/app", "1", img)
	f.push(t, "good/app", "1", img)
	f.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/v2/bad/") {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		return false
	})
	if err := f.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	s := f.Status()
	if p := s.Problems["bad/app"]; !strings.Contains(p, "403") || len(s.Problems) != 1 || s.Brought != 1 {
		t.Errorf("%+v", s)
	}
	if err := f.look(t.Context()); err != nil { // it is not asked again at once
		t.Fatal(err)
	}
	f.setFault(func(w http.ResponseWriter, r *http.Request) bool { panic(http.ErrAbortHandler) })
	f.waits["bad/app"].until = time.Time{}
	if err := f.look(t.Context()); err == nil {
		t.Error("a parent that is away is no error")
	}
	f.setFault(func(http.ResponseWriter, *http.Request) bool { return false })
	f.down, f.waits = outboxWait{}, make(map[string]*outboxWait)
	// By another process.
	again, err := NewOutbox(f.config)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"bad/app:1", "good/app:1"}, keys(tags(t, f.there))); diff != "" {
		t.Errorf("at the parent, -want +got:\n%s", diff)
	}
}

func keys[V any](m map[string]V) []string {
	var all []string
	for k := range m {
		all = append(all, k)
	}
	slices.Sort(all)
	return all
}

// TestOutboxTTL gives up what a parent has not taken in time.
func TestOutboxTTL(t *testing.T) {
	f := newOutboxFixture(t, func(c *OutboxConfig) { c.TTL = time.Nanosecond })
	f.push(t, "app", "1", testImage(t, "one", testLayer(1, 1000)))
	f.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		w.WriteHeader(http.StatusForbidden)
		return true
	})
	if err := f.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := f.Status(); s.Dropped != 1 || f.waiting(t) != 0 || len(s.Recent) != 1 {
		t.Errorf("%+v", s)
	}
}

// TestOutboxUpstreams leaves alone what another upstream is the source of, and
// names at the parent what is renamed here.
func TestOutboxUpstreams(t *testing.T) {
	f := newOutboxFixture(t, func(c *OutboxConfig) {
		c.Repositories = []v1alpha1.Repository{{Name: "team/**", Prefix: "here"}}
		c.Upstreams = []Upstream{{Prefix: "hub", Repositories: []v1alpha1.Repository{{Name: "**"}}}}
	})
	img := testImage(t, "one", testLayer(1, 1000))
	f.push(t, "here/team/app", "1", img)
	f.push(t, "hub/library/x", "1", img)
	f.push(t, "else", "1", img)
	f.mustLook(t)
	if diff := cmp.Diff([]string{"else:1", "team/app:1"}, keys(tags(t, f.there))); diff != "" {
		t.Errorf("at the parent, -want +got:\n%s", diff)
	}
	if n := f.waiting(t); n != 0 {
		t.Errorf("%d entries are left", n)
	}
}

// TestOutboxWithoutParent tells of changes and forgets them.
func TestOutboxWithoutParent(t *testing.T) {
	f := newOutboxFixture(t, func(c *OutboxConfig) { c.Parent = Parent{} })
	f.push(t, "app", "1", testImage(t, "one", testLayer(1, 1000)))
	f.mustLook(t)
	if len(f.told) != 1 || f.waiting(t) != 0 || f.requests.Load() != 0 {
		t.Errorf("told of %d, %d waiting, %d requests", len(f.told), f.waiting(t), f.requests.Load())
	}
}

// TestUploadRefusesStrangeAnswers sends a blob to parents that answer nonsense.
func TestUploadRefusesStrangeAnswers(t *testing.T) {
	for name, answer := range map[string]func(w http.ResponseWriter, r *http.Request){
		"elsewhere": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "http://elsewhere.example/upload")
		},
		"no location": func(http.ResponseWriter, *http.Request) {},
		"not a URL":   func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Location", "http://%zz") },
		"relative":    func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Location", "upload/1") },
		"no range":    func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Location", "/u") },
		"wrong range": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "/u")
			w.Header().Set("Range", "0-99999999")
		},
		"no progress": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "/u")
			w.Header().Set("Range", fmt.Sprintf("0-%d", -1))
		},
		"never enough": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "/u")
			w.Header().Set("Range", "0-0")
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newOutboxFixture(t, func(c *OutboxConfig) { c.ChunkSize = 500 })
			f.push(t, "app", "1", testImage(t, "one", testLayer(1, 1000)))
			var n atomic.Int64
			f.setFault(func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method == http.MethodHead {
					return false
				}
				n.Add(1)
				answer(w, r)
				w.WriteHeader(http.StatusAccepted)
				return true
			})
			if err := f.look(t.Context()); err != nil {
				t.Fatal(err)
			}
			if s := f.Status(); len(s.Problems) != 1 || f.waiting(t) != 1 {
				t.Errorf("%+v, %d waiting", s, f.waiting(t))
			}
			if n.Load() > 20 {
				t.Errorf("%d requests", n.Load())
			}
		})
	}
}

// TestParentSpeaksHTTP2 brings a blob from a parent that would rather speak
// HTTP/2: questions go over that, blobs do not.
func TestParentSpeaksHTTP2(t *testing.T) {
	p := newTestParent(t)
	var questions, blobs atomic.Int64
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.ProtoMajor == 2:
			questions.Add(1)
		case blobPath.MatchString(r.URL.Path):
			blobs.Add(1)
		}
		p.handler.ServeHTTP(w, r)
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	p.pushImage(t, "app:1", testImage(t, "one", testLayer(1, 1000)))
	pool := x509.NewCertPool()
	pool.AddCert(server.Certificate())
	f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Repositories = exactly("app")
		c.Parent = Parent{Endpoint: strings.TrimPrefix(server.URL, "https://"), CA: pool}
	})
	f.mustSync(t)
	if questions.Load() == 0 || blobs.Load() != 2 {
		t.Errorf("%d questions over HTTP/2, %d blobs over HTTP/1.1", questions.Load(), blobs.Load())
	}
}
