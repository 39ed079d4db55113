package syncer

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

func contextWithCause(t *testing.T) (context.Context, context.CancelCauseFunc) {
	t.Helper()
	ctx, cancel := context.WithCancelCause(t.Context())
	t.Cleanup(func() { cancel(nil) })
	return ctx, cancel
}

func TestBudget(t *testing.T) { synctest.Test(t, testBudget) }

// There are never more requests in an hour than the budget has; what does not fit
// waits, and the status says so.
func testBudget(t *testing.T) {
	p := newTimedParent(t)
	for i := range 10 {
		p.pushImage(t, fmt.Sprintf("app:%d", i), testImage(t, fmt.Sprint(i), testLayer(uint64(i), 100)))
	}
	var mu sync.Mutex
	var asked []time.Time
	p.setFault(func(http.ResponseWriter, *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, time.Now())
		return false
	})
	f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Repositories = exactly("app")
		c.Referrers = false
		c.MaxRequestsPerHour = 20
	})
	done := make(chan error)
	begun := time.Now()
	go func() {
		_, err := f.Sync(t.Context(), v1alpha1.SyncTriggerInitial)
		done <- err
	}()
	synctest.Wait()
	time.Sleep(time.Minute)
	want := "the 20 requests an hour of spec.sync.maxRequestsPerHour are used up for parent " + p.host + "; it goes on at " + begun.Add(time.Hour).UTC().Format(time.RFC3339)
	if got := f.Status().Delayed; len(got) != 1 || got[0] != want {
		t.Errorf("%q, want %q", got, want)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := f.Status().Delayed; len(got) != 0 {
		t.Errorf("at the end %q", got)
	}
	if len(asked) < 30 { // a HEAD, a manifest and two blobs for each
		t.Errorf("%d requests", len(asked))
	}
	for i := 20; i < len(asked); i++ {
		if between := asked[i].Sub(asked[i-20]); between < time.Hour {
			t.Errorf("21 requests within %s", between)
		}
	}
	if hours := int(time.Since(begun).Hours()); hours > len(asked)/20 {
		t.Errorf("took %d hours for %d requests", hours, len(asked))
	}
}

// What the parent asked for holds for the next synchronisation, too.
func TestRefusedForLong(t *testing.T) { synctest.Test(t, testRefusedForLong) }

func testRefusedForLong(t *testing.T) {
	p := newTimedParent(t)
	p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 100)))
	p.setFault(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Retry-After", "3600")
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	})
	f := newFixture(t, p, exactly("app")...)
	again := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	if _, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule); err == nil {
		t.Fatal("no error")
	}
	p.setFault(nil)
	p.reset()
	time.Sleep(59 * time.Minute)
	if _, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule); err == nil || !strings.HasSuffix(err.Error(), "it is asked again at "+again) {
		t.Errorf("%v", err)
	}
	if got := p.asked(""); len(got) > 0 {
		t.Errorf("asked for %s", got)
	}
	time.Sleep(2 * time.Minute)
	f.mustSync(t)
}

func TestSpent(t *testing.T) {
	now := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	for name, tt := range map[string]struct {
		header []string // names and values
		want   time.Duration
	}{
		"nothing":                   {nil, 0},
		"something left":            {[]string{"RateLimit-Limit", "100;w=21600", "RateLimit-Remaining", "76;w=21600"}, 0},
		"Docker Hub, nothing left":  {[]string{"RateLimit-Limit", "100;w=21600", "RateLimit-Remaining", "0;w=21600"}, 216 * time.Second},
		"with a reset":              {[]string{"RateLimit-Limit", "100", "RateLimit-Remaining", "0", "RateLimit-Reset", "30"}, 30 * time.Second},
		"with a time of day":        {[]string{"X-RateLimit-Remaining", "0", "X-RateLimit-Reset", fmt.Sprint(now.Unix() + 90)}, 90 * time.Second},
		"with a time that was":      {[]string{"X-RateLimit-Remaining", "0", "X-RateLimit-Reset", fmt.Sprint(now.Unix() - 90)}, 0},
		"for longer than a day":     {[]string{"RateLimit-Remaining", "0", "RateLimit-Reset", "999999"}, maxReset},
		"the newer draft":           {[]string{"RateLimit", `"default";r=0;t=45`}, 45 * time.Second},
		"the newer draft, not used": {[]string{"RateLimit", `"default";r=7;t=45`}, 0},
		"nothing but a remainder":   {[]string{"RateLimit-Remaining", "0"}, 0},
		"nonsense":                  {[]string{"RateLimit-Remaining", "-3", "RateLimit", ";;r=;t"}, 0},
	} {
		h := make(http.Header)
		for i := 0; i+1 < len(tt.header); i += 2 {
			h.Set(tt.header[i], tt.header[i+1])
		}
		if got := spent(h, now); got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
}

func FuzzSpent(f *testing.F) {
	f.Add("0;w=21600", "100;w=21600", "", `"a";r=0;t=3`)
	f.Add("0", "5;w=0", "99999999999999999999", "r=0")
	f.Fuzz(func(t *testing.T, remaining, limit, reset, item string) {
		h := http.Header{"Ratelimit-Remaining": {remaining}, "Ratelimit-Limit": {limit}, "X-Ratelimit-Reset": {reset}, "Ratelimit-Reset": {reset}, "Ratelimit": {item}}
		if got := spent(h, time.Unix(1_800_000_000, 0)); got < 0 || got > maxReset {
			t.Errorf("%s", got)
		}
	})
}

func TestHeldBackByHeaders(t *testing.T) { synctest.Test(t, testHeldBackByHeaders) }

// When the parent's limit is used up, what counts for it waits; HEAD does not.
func testHeldBackByHeaders(t *testing.T) {
	p := newTimedParent(t)
	p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 100)))
	begun := time.Now()
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("RateLimit-Limit", "100;w=21600")
		w.Header().Set("RateLimit-Remaining", "0;w=21600")
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/manifests/") && time.Since(begun) < 216*time.Second {
			t.Errorf("%s was asked for after %s", r.URL, time.Since(begun))
		}
		return false
	})
	f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Repositories = []v1alpha1.Repository{{Name: "app", Tags: v1alpha1.Tags{Include: []string{"1"}}}}
		c.Referrers = false
	})
	f.mustSync(t)
}

// A parent that names no digests is not asked for a manifest again that has not
// changed.
func TestSyncByETag(t *testing.T) {
	for name, headTells := range map[string]bool{"HEAD tells the tag": true, "GET alone": false} {
		t.Run(name, func(t *testing.T) {
			p := newTestParent(t)
			p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 100)))
			d := p.pushImage(t, "app:1", testImage(t, "y", testLayer(2, 100)))
			var bodies int
			var mu sync.Mutex
			p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, "/manifests/1") {
					return false
				}
				mu.Lock()
				defer mu.Unlock()
				etag := `"` + f64(d.String()) + `"`
				if r.Method == http.MethodHead {
					if headTells {
						w.Header().Set("ETag", etag)
					}
					return true // and no digest
				}
				if r.Header.Get("If-None-Match") == etag {
					w.WriteHeader(http.StatusNotModified)
					return true
				}
				bodies++
				w.Header().Set("ETag", etag)
				return false
			})
			f := newFixture(t, p, exactly("app")...)
			for range 3 {
				if _, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule); err != nil {
					t.Fatal(err)
				}
			}
			if bodies != 1 {
				t.Errorf("the manifest was sent %d times", bodies)
			}
			if f.tagDigest(t, "app", "1") != d {
				t.Error("not here")
			}
			if !headTells {
				return
			}
			moved := p.pushImage(t, "app:1", testImage(t, "z", testLayer(3, 100)))
			mu.Lock()
			d = moved
			mu.Unlock()
			f.mustSync(t)
			if f.tagDigest(t, "app", "1") != moved {
				t.Error("the change was not seen")
			}
		})
	}
}

// f64 is what an entity tag may look like.
func f64(s string) string { return strings.ToUpper(s[10:26]) }
