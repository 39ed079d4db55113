package syncer

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

func TestRecur(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		schedule, err := v1alpha1.ParseSchedule("*/5 * * * *")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now() // midnight
		var began []time.Duration
		var triggers []v1alpha1.SyncTrigger
		var next []time.Duration
		err = recur(ctx, v1alpha1.SyncTriggerInitial, schedule, func(t time.Time) { next = append(next, t.Sub(start)) }, func(ctx context.Context, trigger v1alpha1.SyncTrigger) {
			began = append(began, time.Since(start))
			triggers = append(triggers, trigger)
			switch len(began) {
			case 2:
				time.Sleep(12 * time.Minute) // two times of the schedule pass
			case 4:
				cancel()
			}
		})
		if err != nil {
			t.Error(err)
		}
		want := []time.Duration{0, 5 * time.Minute, 20 * time.Minute, 25 * time.Minute}
		if diff := cmp.Diff(want, began, cmpopts.EquateApproxTime(0), cmp.Comparer(func(a, b time.Duration) bool {
			return (a - b).Abs() <= maxJitter
		})); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if began[0] != 0 {
			t.Error("the first one waits")
		}
		for i := 1; i < len(began); i++ {
			if began[i] < want[i] {
				t.Errorf("number %d began early, at %s", i, began[i])
			}
		}
		if diff := cmp.Diff([]time.Duration{5 * time.Minute, 20 * time.Minute, 25 * time.Minute, 30 * time.Minute}, next); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if triggers[0] != v1alpha1.SyncTriggerInitial || slices.ContainsFunc(triggers[1:], func(tr v1alpha1.SyncTrigger) bool { return tr != v1alpha1.SyncTriggerSchedule }) {
			t.Errorf("%s", triggers)
		}
	})
}

func TestRecurEndsWhileItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		schedule, err := v1alpha1.ParseSchedule("0 0 29 2 *")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- recur(ctx, v1alpha1.SyncTriggerInitial, schedule, func(time.Time) {}, func(context.Context, v1alpha1.SyncTrigger) {})
		}()
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestRunUntilCancelled(t *testing.T) { synctest.Test(t, testRunUntilCancelled) }

func testRunUntilCancelled(t *testing.T) {
	p := newTimedParent(t)
	img := testImage(t, "x", testLayer(1, 1000))
	p.pushImage(t, "app:1", img)
	f := newFixture(t, p, exactly("app")...)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	synctest.Wait() // until the first one has ended
	status := f.Status()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if status.NextSyncTime == nil {
		t.Fatal("the next one is not announced")
	}
	if status.ConnectionState != v1alpha1.ConnectionStateOnline || status.RegistrySyncResult.SyncTrigger != v1alpha1.SyncTriggerInitial {
		t.Errorf("%+v", status)
	}
	want := []v1alpha1.RepositoryStatus{{Name: "app", TagsWanted: 1, TagsPresent: 1}}
	if diff := cmp.Diff(want, status.Repositories); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// A synchronisation is stopped at the end of its window, or of the process, at
// once, and goes on later where it stopped.
func TestSyncStopsAndGoesOn(t *testing.T) {
	for name, tt := range map[string]struct {
		window time.Duration
		state  v1alpha1.SyncState
		want   string
	}{
		"window": {5 * time.Second, v1alpha1.SyncStateTimedOut, errWindow.Error()},
		"cancel": {0, v1alpha1.SyncStateFailed, context.Canceled.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testSyncStopsAndGoesOn(t, tt.window, tt.state, tt.want) })
		})
	}
}

// testSyncStopsAndGoesOn lets the parent send a part of a layer and then nothing,
// until the window ends, or the context without one.
func testSyncStopsAndGoesOn(t *testing.T, window time.Duration, state v1alpha1.SyncState, want string) {
	p := newTimedParent(t)
	img := testImage(t, "x", testLayer(1, 1_000_000))
	d := p.pushImage(t, "app:1", img)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		p.handler.ServeHTTP(&hangingWriter{ResponseWriter: w, r: r, left: 400_000, hang: func() {
			if window == 0 {
				synctest.Wait() // until what was sent has arrived
				cancel()
			}
		}}, r)
		return true
	})
	f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Repositories = exactly("app")
		c.Window = window
	})
	start := time.Now()
	result, err := f.Sync(ctx, v1alpha1.SyncTriggerSchedule)
	if took := time.Since(start); took != window {
		t.Errorf("took %s", took)
	}
	if result.State != state || err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%s: %v", result.State, err)
	}
	if left := result.Repositories[0].BytesLeft; left < 1_000_000 || f.tagDigest(t, "app", "1") != "" {
		t.Errorf("%d bytes left", left)
	}
	if window > 0 && f.Status().ConnectionState != v1alpha1.ConnectionStateOnline {
		t.Errorf("%+v", f.Status())
	}
	p.setFault(nil)
	p.reset()
	f.mustSync(t)
	f.verifyHere(t, "app", d, nil)
	if p.bytesSent() > uniqueBytes(t, img)-300_000 {
		t.Errorf("%d bytes were sent the second time", p.bytesSent())
	}
}

// hangingWriter sends so many bytes and then nothing, until the client is gone.
type hangingWriter struct {
	http.ResponseWriter
	r    *http.Request
	left int
	hang func()
}

func (w *hangingWriter) Write(b []byte) (int, error) {
	if len(b) <= w.left {
		w.left -= len(b)
		return w.ResponseWriter.Write(b)
	}
	n, err := w.ResponseWriter.Write(b[:w.left])
	if err != nil {
		return n, err
	}
	if err := http.NewResponseController(w.ResponseWriter).Flush(); err != nil {
		return n, err
	}
	w.hang()
	<-w.r.Context().Done()
	return n, context.Canceled
}

// A second synchronisation waits for the first, and gives up with its context.
func TestSyncTakesTurns(t *testing.T) {
	p := newTestParent(t)
	p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 1000)))
	release, asked := make(chan struct{}), make(chan struct{}, 1)
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/tags/list") {
			asked <- struct{}{}
			<-release
		}
		return false
	})
	f := newFixture(t, p, exactly("app")...)
	done := make(chan error)
	go func() {
		_, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule)
		done <- err
	}()
	<-asked
	if got := f.Status(); got.ConnectionState != v1alpha1.ConnectionStateSyncing || got.RegistrySyncResult.SyncState != v1alpha1.SyncStateSyncing || len(got.Repositories) != 1 {
		t.Errorf("%+v", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := f.Sync(ctx, v1alpha1.SyncTriggerManual); err == nil {
		t.Error("two at once")
	}
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestMetrics(t *testing.T) {
	p := newTestParent(t)
	img := testImage(t, "x", testLayer(1, 1000))
	p.pushImage(t, "app:1", img)
	registry := prometheus.NewRegistry()
	configure := func(c *Config) {
		c.Repositories = exactly("app", "absent")
		c.Metrics = registry
	}
	f := newFixtureAt(t, t.TempDir(), p, configure)
	if _, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual); err == nil {
		t.Error("no error")
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, family := range families {
		m := family.GetMetric()[0]
		got[strings.TrimPrefix(family.GetName(), metricsPrefix)] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
	}
	if got["last_duration_seconds"] <= 0 || got["received_bytes_total"] < 1000 {
		t.Errorf("%v", got)
	}
	delete(got, "last_duration_seconds")
	delete(got, "received_bytes_total")
	want := map[string]float64{
		"blobs_fetched_total": 2, "blobs_linked_total": 0, "incomplete_repositories": 1, "last_success_timestamp_seconds": 0,
		"left_bytes": 0, "runs_total": 1, "tags_removed_total": 0, "tags_updated_total": 1,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if _, err := New(Config{Store: f.store.Namespace(), Driver: f.store.Driver(), Parent: Parent{Endpoint: "p"}, Metrics: registry}); err == nil || !strings.HasPrefix(err.Error(), "syncer: Metrics: ") {
		t.Errorf("registered twice: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	f := newFixture(t, &testParent{host: "p"})
	good := Config{Store: f.store.Namespace(), Driver: f.store.Driver(), Parent: Parent{Endpoint: "p"}}
	if _, err := New(good); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*Config){
		"syncer: Store is required":                                     func(c *Config) { c.Store = nil },
		"syncer: Driver is required":                                    func(c *Config) { c.Driver = nil },
		"syncer: Parent.Endpoint is required":                           func(c *Config) { c.Parent.Endpoint = "" },
		"syncer: Parent.Endpoint must be a host with or without a port": func(c *Config) { c.Parent.Endpoint = "https://p" },
		"syncer: Concurrency is negative":                               func(c *Config) { c.Concurrency = -1 },
		"syncer: Window is negative":                                    func(c *Config) { c.Window = -1 },
		"syncer: MaxRemovals is not a percentage":                       func(c *Config) { c.MaxRemovals = 101 },
		"syncer: Repositories: repository \"a//b\" has an empty segment: a slash at an end, or two in a row":  func(c *Config) { c.Repositories = exactly("a//b") },
		"syncer: Schedule: \"hourly\" is not a cron schedule of five fields: use for example \"*/5 * * * *\"": func(c *Config) { c.Schedule = "hourly" },
	} {
		config := good
		change(&config)
		if _, err := New(config); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}
