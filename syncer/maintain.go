package syncer

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

// maintainCheck is how often keepMaintained looks whether its time has come, or its
// configuration has changed.
const maintainCheck = 30 * time.Second

// keepMaintained looks after a store on the schedule of spec.garbageCollection
// until ctx ends: see storage.Store.Maintain. The configuration, with its defaults,
// is asked for anew each time, so that it can change. One process at a time does
// this, the leader; what fails is logged, and tried again when the time comes.
func keepMaintained(ctx context.Context, store *storage.Store, config func() v1alpha1.GarbageCollection, metrics *maintainMetrics, log *slog.Logger) {
	schedule, due := "", time.Time{}
	for {
		gc := config()
		if gc.Schedule != schedule {
			schedule, due = gc.Schedule, next(gc.Schedule, log)
		}
		if !due.IsZero() && !time.Now().Before(due) {
			if gc.Enabled == nil || *gc.Enabled {
				maintain(ctx, store, gc, metrics, log)
			}
			due = next(schedule, log)
		}
		if sleep(ctx, maintainCheck) != nil {
			return
		}
	}
}

// next is when a schedule is due; the zero time if that is never.
func next(schedule string, log *slog.Logger) time.Time {
	s, err := v1alpha1.ParseSchedule(schedule)
	if err != nil {
		log.Error("garbage is not collected", "error", fmt.Errorf("spec.garbageCollection.schedule: %w", err))
		return time.Time{}
	}
	return s.Next(time.Now())
}

func maintain(ctx context.Context, store *storage.Store, gc v1alpha1.GarbageCollection, metrics *maintainMetrics, log *slog.Logger) {
	minAge, err := v1alpha1.ParseDuration(gc.MinAge)
	if err != nil {
		log.Error("garbage is not collected", "error", fmt.Errorf("spec.garbageCollection.minAge: %w", err))
		return
	}
	began := time.Now()
	did, err := store.Maintain(ctx, storage.Maintenance{MinAge: minAge})
	if ctx.Err() == nil {
		metrics.ended(time.Since(began), err)
	}
	metrics.observe(did, err == nil)
	for _, d := range did.Damaged {
		// A synchronisation looks whether all that is selected is here, and so
		// brings it; what clients pushed it cannot bring.
		log.Warn("corrupt content is not served until it is synchronised or pushed again", "digest", d.Digest, "since", d.Since, "repositories", d.Repositories)
	}
	if err != nil && ctx.Err() == nil {
		log.Error("looking after the stored content was broken off; it goes on at the next scheduled time", "error", err)
	}
}
