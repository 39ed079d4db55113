package containerd

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/registry/cache"
)

const (
	// mostAdded is what the cache may add to a pull by waiting for an upstream in
	// vain, however long the pull and the fault last (see cache.Timeouts).
	mostAdded = 2 * time.Second
	// late is how late the cache may wake on a machine that has other things to
	// do.
	late = time.Second
)

// watchedCache is a cache of which is known how long clients waited for nothing:
// for an answer that only sends them on, or for the rest of a body that never
// came. Whatever else takes time on a busy machine, such as unpacking, hashing
// and what other servers do, does not count.
type watchedCache struct {
	*cache.Cache
	host string

	mu    sync.Mutex // guards vain
	vain  []wait
	begun time.Time
}

type wait struct {
	from, to time.Time
	what     string
}

func startWatchedCache(t *testing.T, config cache.Config) *watchedCache {
	t.Helper()
	if config.Dir == "" {
		config.Dir = t.TempDir()
	}
	config.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	served, err := cache.New(config)
	if err != nil {
		t.Fatal(err)
	}
	c := &watchedCache{Cache: served, begun: time.Now()}
	startPart(t, "cache", served.Run)
	for !served.Serving() {
		time.Sleep(time.Millisecond)
	}
	server := httptest.NewServer(c)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	c.host = strings.TrimPrefix(server.URL, "http://")
	return c
}

func (c *watchedCache) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a := &watchedAnswer{ResponseWriter: w, last: time.Now()}
	c.Cache.ServeHTTP(a, r)
	if !a.vain(r) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.vain = append(c.vain, wait{a.last, time.Now(), r.Method + " " + r.URL.Path + ": " + strconv.Itoa(a.status) + " " + w.Header().Get("Cache-Status")})
}

// added is how long clients waited in vain, with waits at the same time counted
// once.
func (c *watchedCache) added() (total time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var end time.Time
	for _, w := range slices.SortedFunc(slices.Values(c.vain), func(a, b wait) int { return a.from.Compare(b.from) }) {
		if w.from.Before(end) {
			w.from = end
		}
		if w.to.After(w.from) {
			total += w.to.Sub(w.from)
			end = w.to
		}
	}
	return total
}

// check fails when clients waited for too long.
func (c *watchedCache) check(t *testing.T) {
	t.Helper()
	total := c.added()
	t.Logf("waited in vain: %v of %v since the cache began", total.Round(time.Millisecond), time.Since(c.begun).Round(time.Millisecond))
	if total <= mostAdded+late {
		return
	}
	t.Errorf("clients waited in vain for %v, more than %v", total, mostAdded)
	for _, w := range c.vain {
		t.Logf("%v to %v: %s", w.from.Sub(c.begun).Round(time.Millisecond), w.to.Sub(c.begun).Round(time.Millisecond), w.what)
	}
}

// watchedAnswer is an answer of which is known when something last came.
type watchedAnswer struct {
	http.ResponseWriter
	last    time.Time
	status  int
	written int64
}

func (a *watchedAnswer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func (a *watchedAnswer) WriteHeader(status int) {
	a.status = status
	if status/100 == 2 {
		a.last = time.Now()
	}
	a.ResponseWriter.WriteHeader(status)
}

func (a *watchedAnswer) Write(p []byte) (int, error) {
	if a.status == 0 {
		a.WriteHeader(http.StatusOK)
	}
	n, err := a.ResponseWriter.Write(p)
	a.written += int64(n)
	if a.status/100 == 2 && n > 0 {
		a.last = time.Now()
	}
	return n, err
}

// vain tells, at the end of an answer, whether it gave not all that was asked.
func (a *watchedAnswer) vain(r *http.Request) bool {
	if a.status/100 != 2 {
		return a.status != 0
	}
	length, err := strconv.ParseInt(a.Header().Get("Content-Length"), 10, 64)
	return r.Method == http.MethodGet && err == nil && a.written < length && r.Context().Err() == nil
}

// TestWaitsAreSeen has a watched cache wait, as no cache of ours does, for an
// upstream in vain.
func TestWaitsAreSeen(t *testing.T) {
	const patience = 3500 * time.Millisecond
	c := startWatchedCache(t, cache.Config{
		Registries: registryAt("http://"+blackHole(t), ""),
		Timeouts:   cache.Timeouts{Dial: patience, Headers: patience},
	})
	for range 2 { // the second one is not waited for
		answer, err := http.Get("http://" + c.host + "/v2/" + repository + "/manifests/1?ns=" + faultyHost)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
	}
	http.DefaultClient.CloseIdleConnections()
	if total := c.added(); total < patience || total > patience+late || total <= mostAdded+late {
		t.Errorf("clients waited for %v", total)
	}
}
