package syncer

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// chunked is a fixture that fetches in small chunks.
func chunked(t *testing.T, p *testParent, concurrency int) *fixture {
	t.Helper()
	return newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Repositories = exactly("app")
		c.Concurrency, c.ChunkSize = concurrency, testChunk
	})
}

// One blob comes over several connections at once, each byte once, once the
// parent has shown that it sends parts.
func TestSyncChunksAtOnce(t *testing.T) {
	p := newTestParent(t)
	const size = 10*testChunk - 1000
	img := testImage(t, "x", testLayer(1, size))
	d := p.pushImage(t, "app:1", img)
	layer := digestOf(t, testLayer(1, size)).String()
	var mu sync.Mutex
	ranges := make(map[string]bool)
	var inFlight atomic.Int64
	together := make(chan struct{})
	reached := sync.OnceFunc(func() { close(together) })
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, layer) {
			return false
		}
		mu.Lock()
		asked := r.Header.Get("Range")
		if ranges[asked] {
			t.Errorf("%s was asked for twice", asked)
		}
		first := len(ranges) == 0
		ranges[asked] = true
		mu.Unlock()
		defer inFlight.Add(-1)
		if n := inFlight.Add(1); n == 3 {
			reached()
		} else if n > 3 {
			t.Errorf("%d requests at once", n)
		}
		if !first {
			select {
			case <-together:
			case <-r.Context().Done():
			}
		}
		p.handler.ServeHTTP(w, r)
		return true
	})
	f := chunked(t, p, 3)
	f.mustSync(t)
	f.verifyHere(t, "app", d, nil)
	for i := range 10 {
		if want := fmt.Sprintf("bytes=%d-%d", i*testChunk, min((i+1)*testChunk, size)-1); !ranges[want] {
			t.Errorf("%s was not asked for", want)
		}
	}
	if p.bytesSent() != uniqueBytes(t, img) {
		t.Errorf("%d bytes were sent", p.bytesSent())
	}
}

// A parent may send less of a part than it was asked for, and may cease to send
// parts at all.
func TestSyncChunksOddly(t *testing.T) {
	for name, odd := range map[string]func(p *testParent, n int64, w http.ResponseWriter, r *http.Request){
		"sends less": func(p *testParent, _ int64, w http.ResponseWriter, r *http.Request) {
			var first, last int
			if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last); err == nil {
				r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first, min(last, first+testChunk/3)))
			}
			p.handler.ServeHTTP(w, r)
		},
		"sends all after a while": func(p *testParent, n int64, w http.ResponseWriter, r *http.Request) {
			if n > 3 {
				r.Header.Del("Range")
			}
			p.handler.ServeHTTP(w, r)
		},
		"refuses parts after a while": func(p *testParent, n int64, w http.ResponseWriter, r *http.Request) {
			if n > 3 && r.Header.Get("Range") != "" {
				w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
				return
			}
			p.handler.ServeHTTP(w, r)
		},
		"breaks off": func(p *testParent, _ int64, w http.ResponseWriter, r *http.Request) {
			p.abortAfter(testChunk/2)(w, r)
		},
		"breaks off and sends no parts": func(p *testParent, n int64, w http.ResponseWriter, r *http.Request) {
			r.Header.Del("Range")
			p.abortAfter(n*testChunk/2)(w, r)
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newTestParent(t)
			d := p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 7*testChunk+1)))
			var n atomic.Int64
			p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/blobs/") {
					return false
				}
				odd(p, n.Add(1), w, r)
				return true
			})
			f := chunked(t, p, 3)
			f.limits.attempts = 8
			f.mustSync(t)
			f.verifyHere(t, "app", d, nil)
		})
	}
}

// A part that is not the one that was asked for is never taken for it.
func TestSyncChunksWrongly(t *testing.T) {
	for header, want := range map[string]string{
		"bytes 1-300000/2100001":    "it sent another part of it than was asked for",
		"bytes 0-300000/2100001":    "it sent another part of it than was asked for",
		"bytes 0--1/2100001":        "it sent another part of it than was asked for",
		"":                          "it sent another part of it than was asked for",
		"bytes 0-299999/2100000":    "it has 2100000 bytes where its manifest says 2100001",
		"bytes 0-299998/2100001":    "it has 2100002 bytes where its manifest says 2100001",
		"bytes */2100001":           "it sent another part of it than was asked for",
		"bytes 0-299999/2100001, x": "", // right, if oddly written
	} {
		t.Run(header, func(t *testing.T) {
			p := newTestParent(t)
			d := p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 7*testChunk+1)))
			p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasPrefix(r.Header.Get("Range"), "bytes=0-") {
					return false
				}
				w.Header().Set("Content-Range", header)
				w.Header().Set("Content-Length", fmt.Sprint(testChunk))
				w.WriteHeader(http.StatusPartialContent)
				_, _ = w.Write(seeded(1, 7*testChunk+1)[:testChunk])
				return true
			})
			f := chunked(t, p, 2)
			_, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
			if want == "" && err != nil || want != "" && (err == nil || !strings.HasSuffix(err.Error(), want)) {
				t.Errorf("%v, want %s", err, want)
			}
			p.setFault(nil)
			f.mustSync(t)
			f.verifyHere(t, "app", d, nil)
		})
	}
}

func TestSyncBandwidth(t *testing.T) { synctest.Test(t, testSyncBandwidth) }

// The limit holds for all transfers together, and does not make the parent look
// slow.
func testSyncBandwidth(t *testing.T) {
	p := newTimedParent(t)
	img := testImage(t, "x", testLayer(1, 500_000), testLayer(2, 300_000), testLayer(3, 200_000))
	d := p.pushImage(t, "app:1", img)
	f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Repositories = exactly("app")
		c.ChunkSize, c.MaxBandwidth = testChunk, 10_000
	})
	f.limits.stall = 2 * time.Second
	begun := time.Now()
	f.mustSync(t)
	f.verifyHere(t, "app", d, nil)
	want := time.Duration(uniqueBytes(t, img)) * time.Second / 10_000
	if took := time.Since(begun); took < want-time.Second || took > want+2*time.Second {
		t.Errorf("took %s, want %s", took, want)
	}
}

// Waiting goes by what is urgent, then to the repository that was served least,
// then to the image that lacks least, then by arrival.
func TestQueue(t *testing.T) {
	q := newQueue(1)
	busy := q.enter(priority{repository: "busy"})
	if err := q.acquire(t.Context(), busy, 100); err != nil {
		t.Fatal(err)
	}
	var order []string
	var mu sync.Mutex
	var wg sync.WaitGroup
	promoted := q.enter(priority{repository: "a", missing: 1000})
	for i, w := range []struct {
		name string
		p    *priority
	}{
		{"a large", q.enter(priority{repository: "a", missing: 900})},
		{"a small", q.enter(priority{repository: "a", missing: 10})},
		{"busy small", q.enter(priority{repository: "busy", missing: 1})},
		{"a small too", q.enter(priority{repository: "a", missing: 10})},
		{"urgent", q.enter(priority{repository: "busy", missing: 5000, urgent: true})},
		{"promoted", promoted},
		{"b", q.enter(priority{repository: "b", missing: 9000})},
	} {
		wg.Go(func() {
			if err := q.acquire(t.Context(), w.p, 30); err != nil {
				t.Error(err)
			}
			mu.Lock()
			order = append(order, w.name)
			mu.Unlock()
			q.release()
		})
		untilWaiting(t, q, i+1)
	}
	q.raise(promoted, priority{urgent: true, missing: 2000})
	q.release()
	wg.Wait()
	// a is served last with 30 for "promoted", b never; busy has 100.
	want := "urgent; promoted; b; a small; a small too; a large; busy small"
	if got := strings.Join(order, "; "); got != "promoted; urgent; b; a small; a small too; a large; busy small" && got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	if len(q.served) != 0 || q.free != 1 {
		t.Errorf("not at rest: %+v", q)
	}
}

// untilWaiting waits until so many wait.
func untilWaiting(t *testing.T, q *queue, n int) {
	t.Helper()
	for {
		q.mu.Lock()
		waiting := len(q.waiting)
		q.mu.Unlock()
		if waiting == n {
			return
		}
		if t.Context().Err() != nil {
			t.Fatal("nobody waits")
		}
		time.Sleep(time.Millisecond)
	}
}

// Whoever gives up takes nobody's turn.
func TestQueueGivesUp(t *testing.T) { synctest.Test(t, testQueueGivesUp) }

func testQueueGivesUp(t *testing.T) {
	q := newQueue(1)
	p := q.enter(priority{repository: "a"})
	if err := q.acquire(t.Context(), p, 1); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := contextWithCause(t)
	done := make(chan error)
	go func() { done <- q.acquire(ctx, p, 1) }()
	synctest.Wait()
	cancel(errWindow)
	if err := <-done; !errors.Is(err, errWindow) {
		t.Error(err)
	}
	q.release()
	if err := q.acquire(t.Context(), p, 1); err != nil {
		t.Fatal(err)
	}
	q.release()
}
