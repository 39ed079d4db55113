package syncer

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

// TestMaintainKeepsItsSchedule lets days go by.
func TestMaintainKeepsItsSchedule(t *testing.T) {
	root := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		store, err := storage.Open(t.Context(), storage.Config{Root: root})
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		// What a count leaves behind says that there was one.
		counted := filepath.Join(root, "usage", "base.json")
		ran := func() bool { return os.Remove(counted) == nil }
		var gc atomic.Pointer[v1alpha1.GarbageCollection]
		set := func(enabled bool, schedule string) {
			gc.Store(&v1alpha1.GarbageCollection{Enabled: &enabled, Schedule: schedule, MinAge: "PT24H"})
		}
		set(true, "0 3 * * *")
		ctx, cancel := context.WithCancel(t.Context())
		metrics, err := newMaintainMetrics(nil)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			keepMaintained(ctx, store, func() v1alpha1.GarbageCollection { return *gc.Load() }, metrics, slog.New(slog.DiscardHandler))
		}()
		pass := func(d time.Duration) bool {
			time.Sleep(d)
			synctest.Wait()
			return ran()
		}
		if pass(2 * time.Hour) { // the bubble's time begins at midnight UTC
			t.Error("ran before its time")
		}
		if !pass(2 * time.Hour) {
			t.Error("did not run at its time")
		}
		if pass(20 * time.Hour) {
			t.Error("ran again the same day")
		}
		set(false, "0 3 * * *")
		if pass(24 * time.Hour) {
			t.Error("ran though it is not enabled")
		}
		set(true, "*/5 * * * *")
		if !pass(time.Hour) {
			t.Error("did not follow its schedule")
		}
		set(true, "nonsense")
		pass(time.Hour)
		if pass(time.Hour) {
			t.Error("ran without a schedule")
		}
		cancel()
		<-ended
	})
}

// TestMaintainMetrics collects garbage, finds a corrupt blob, fails, and has all of
// it in the metrics.
func TestMaintainMetrics(t *testing.T) {
	root := t.TempDir()
	store, err := storage.Open(t.Context(), storage.Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	d := digest.FromString("right")
	blob := "/docker/registry/v2/blobs/sha256/" + d.Encoded()[:2] + "/" + d.Encoded() + "/data"
	if err := store.Driver().PutContent(t.Context(), blob, []byte("right")); err != nil {
		t.Fatal(err)
	}
	repo, err := store.Repository("app")
	if err != nil {
		t.Fatal(err)
	}
	if err := repo.LinkLayer(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(root, blob)
	if err := os.WriteFile(file, []byte("wrong"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(file, time.Now(), storage.SealTime(d)); err != nil { // decay leaves the seal
		t.Fatal(err)
	}
	registered := prometheus.NewRegistry()
	metrics, err := newMaintainMetrics(registered)
	if err != nil {
		t.Fatal(err)
	}
	gc := v1alpha1.GarbageCollection{MinAge: "PT24H"}
	maintain(t.Context(), store, gc, metrics, slog.New(slog.DiscardHandler))
	metrics.observe(storage.Maintained{
		Collected: storage.Collected{Manifests: 1, Layers: 2, Blobs: 3, Bytes: 4},
		Swept:     storage.Swept{Uploads: 5, Temporary: 6},
	}, false)
	metrics.ended(time.Second, os.ErrPermission)
	want := map[string]float64{
		"gc_runs_total Failed": 1, "gc_runs_total Succeeded": 1, "gc_last_duration_seconds": 1,
		"gc_removed_manifests_total": 1, "gc_removed_layers_total": 2, "gc_removed_blobs_total": 3, "gc_freed_bytes_total": 4,
		"gc_removed_uploads_total": 5, "gc_removed_files_total": 6, "gc_waiting": 0, "gc_skipped_repositories": 0, "gc_stored_bytes": 5,
		"scrub_blobs_total": 1, "scrub_bytes_total": 5, "scrub_corrupt_total": 1, "scrub_damaged": 1,
	}
	got := gathered(t, registered)
	if at := got["gc_last_success_timestamp_seconds"]; time.Since(time.Unix(int64(at), 0)).Abs() > time.Hour {
		t.Errorf("last success at %v", at)
	}
	delete(got, "gc_last_success_timestamp_seconds")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
}

// gathered are the values of metrics, by their names without what all begin with
// and their label's value.
func gathered(t *testing.T, registered *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := registered.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := strings.TrimPrefix(f.GetName(), "connected_registry_")
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			got[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return got
}
