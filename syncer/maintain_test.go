package syncer

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

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
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			Maintain(ctx, store, func() v1alpha1.GarbageCollection { return *gc.Load() }, slog.New(slog.DiscardHandler))
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
