package syncer

import (
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// runUntil runs a Syncer until a condition holds.
func (f *fixture) runUntil(t *testing.T, what string, holds func() bool) {
	t.Helper()
	ctx, cancel := contextWithCause(t)
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	for deadline := time.Now().Add(time.Minute); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("after a minute still not: %s", what)
			break
		}
	}
	cancel(nil)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// yearly is a schedule that leaves everything to the first synchronisation.
const yearly = "0 0 1 1 *"

// What somebody waits for overtakes what is under way, down to the chunk.
func TestWantJumpsTheQueue(t *testing.T) {
	p := newTestParent(t)
	for i := range 4 {
		p.pushImage(t, fmt.Sprintf("bulk:%d", i), testImage(t, fmt.Sprint(i), testLayer(uint64(10+i), 4*testChunk)))
	}
	wanted := testImage(t, "wanted", testLayer(1, 2*testChunk))
	d := p.pushImage(t, "app:1", wanted)
	var mu sync.Mutex
	bulk := 0
	release := make(chan struct{})
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/v2/app/") && r.Header.Get("X") == "" && r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/tags/list") {
			<-release // the schedule comes to it late
			return false
		}
		if !strings.HasPrefix(r.URL.Path, "/v2/bulk/blobs/") {
			return false
		}
		mu.Lock()
		bulk++
		first := bulk == 1
		mu.Unlock()
		if first {
			<-release // the only turn there is
		}
		return false
	})
	f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Repositories = exactly("app", "bulk")
		c.Schedule, c.Concurrency, c.ChunkSize = yearly, 1, testChunk
	})
	once := sync.OnceFunc(func() {
		f.Want("app", "1")
		f.Want("app", "missing")
		f.Want("other", "1")
		f.Want("../etc", "1")
		for len(p.asked("GET /v2/app/manifests/sha256:")) == 0 {
			time.Sleep(time.Millisecond)
		}
		untilWaitingUrgent(f.fetcher.queue)
		close(release)
	})
	bulkBefore := -1
	f.runUntil(t, "the wanted image is here", func() bool {
		mu.Lock()
		begun := bulk > 0
		mu.Unlock()
		if begun {
			once()
		}
		here, err := f.Syncer.store.tag(t.Context(), "app", "1")
		if err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		if here == d {
			bulkBefore = bulk
		}
		return here == d
	})
	f.verifyHere(t, "app", d, nil)
	if got := p.asked("/v2/(other|etc)"); len(got) > 0 {
		t.Errorf("asked for what is not selected: %s", got)
	}
	t.Logf("%d requests for what nobody waits for came before it was here", bulkBefore)
	requests := p.asked("GET /v2/(bulk|app)/blobs/")
	last := 0
	for i, r := range requests {
		if strings.Contains(r, "/app/") {
			last = i
		}
	}
	// One was under way, and one more may begin between two turns of the wanted.
	if before := last + 1 - len(p.asked("GET /v2/app/blobs/")); before > 4 {
		t.Errorf("%d requests of the others came before: %s", before, requests)
	}
}

func untilWaitingUrgent(q *queue) {
	for {
		q.mu.Lock()
		for _, w := range q.waiting {
			if w.urgent {
				q.mu.Unlock()
				return
			}
		}
		q.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
}

// A replica in another process asks by way of the storage.
func TestOnDemand(t *testing.T) {
	p := newTestParent(t)
	d := p.pushImage(t, "team/app:1", testImage(t, "x", testLayer(1, 1000)))
	byDigest := p.pushImage(t, "team/app:2", testImage(t, "y", testLayer(2, 1000)))
	unwanted := p.pushImage(t, "team/app:beta", testImage(t, "z", testLayer(3, 1000)))
	spec := &v1alpha1.Spec{Repositories: []v1alpha1.Repository{{Name: "team/*", Prefix: "mirror", Tags: v1alpha1.Tags{Exclude: []string{"beta"}}}}}
	blocked := make(chan struct{})
	p.setFault(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/v2/_catalog") {
			<-blocked // the schedule gets nowhere
		}
		return false
	})
	f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Repositories = spec.Repositories
		c.Schedule, c.OnDemand = yearly, true
	})
	replica := NewOnDemand(f.store, func() *v1alpha1.Spec { return spec }, slog.New(slog.NewTextHandler(testWriter{t}, nil)))
	here := func(tag string) digest.Digest {
		d, err := f.Syncer.store.tag(t.Context(), "mirror/team/app", tag)
		if err != nil {
			t.Error(err)
		}
		return d
	}
	replica.Missing(t.Context(), "mirror/team/app", "1")
	replica.Missing(t.Context(), "mirror/team/app", "beta")
	replica.Missing(t.Context(), "mirror/team/app", byDigest.String())
	replica.Missing(t.Context(), "mirror/team/app", unwanted.String())
	replica.Missing(t.Context(), "team/app", "1")
	replica.Missing(t.Context(), "mirror/team/app", "../../x")
	if got := f.wishes(t); len(got) != 3 {
		t.Errorf("told: %q", got)
	}
	if err := os.WriteFile(filepath.Join(f.root, onDemandDir, "fff"), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	replica.Missing(t.Context(), "mirror/team/app", "1") // lately told
	f.runUntil(t, "both are here", func() bool {
		ok := here("1") == d && here("2") == byDigest && len(f.wishes(t)) == 0
		if ok {
			close(blocked)
		}
		return ok
	})
	if here("beta") != "" {
		t.Error("what is not selected was brought")
	}
	off := false
	spec = &v1alpha1.Spec{Repositories: spec.Repositories, Sync: v1alpha1.Sync{OnDemand: &off}}
	replica.Missing(t.Context(), "mirror/team/app", "3")
	if got := f.wishes(t); len(got) > 0 {
		t.Errorf("told though it is off: %q", got)
	}
}

// wishes are the files that replicas left.
func (f *fixture) wishes(t *testing.T) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(f.root, onDemandDir))
	if err != nil {
		t.Error(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// What clients ask for cannot fill memory or the disk.
func TestOnDemandIsBounded(t *testing.T) {
	p := newTestParent(t)
	f := newFixture(t, p, exactly("app")...)
	spec := &v1alpha1.Spec{Repositories: exactly("app")}
	replica := NewOnDemand(f.store, func() *v1alpha1.Spec { return spec }, slog.New(slog.DiscardHandler))
	for i := range maxLately + 100 {
		w := wish{"app", fmt.Sprint("t", i)}
		replica.due(w, time.Unix(1000, 0))
		f.wanted.add(w, time.Unix(1000, 0))
	}
	if len(replica.lately) > maxLately || len(f.wanted.take()) > maxWanted {
		t.Error("there is no bound")
	}
	if !replica.due(wish{"app", "t1"}, time.Unix(2000, 0)) {
		t.Error("what was long ago is not forgotten")
	}
	for i := range 50 {
		if err := replica.tell(t.Context(), wish{"app", fmt.Sprint("t", i)}); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range f.wishes(t) { // of which there are 4096
		if len(name) != 3 || strings.Trim(name, "0123456789abcdef") != "" {
			t.Errorf("called %q", name)
		}
	}
}

func FuzzParseWish(f *testing.F) {
	f.Add([]byte("team/app\n1.2\n"))
	f.Add([]byte("a\nsha256:x"))
	f.Fuzz(func(t *testing.T, content []byte) {
		w, ok := parseWish(content)
		if ok && (strings.Contains(w.repository, "..") || strings.ContainsAny(w.repository+w.reference, "\n ")) {
			t.Errorf("%+v", w)
		}
	})
}
