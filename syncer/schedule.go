package syncer

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// maxJitter bounds the random delay after each scheduled time, which keeps many
// registries with one parent and one schedule from asking at the same moment. It
// is a tenth of the time between two synchronisations at most.
const maxJitter = 30 * time.Second

// recur calls sync at once, with the trigger given, and then on schedule, until ctx ends. Times that pass
// while sync runs are left out. next is told when the next call is due.
func recur(ctx context.Context, trigger v1alpha1.SyncTrigger, schedule v1alpha1.Schedule, next func(time.Time), sync func(context.Context, v1alpha1.SyncTrigger)) error {
	for ctx.Err() == nil {
		sync(ctx, trigger)
		trigger = v1alpha1.SyncTriggerSchedule
		due := schedule.Next(time.Now())
		next(due)
		interval := schedule.Next(due).Sub(due)
		jitter := rand.N(min(interval/10, maxJitter) + 1)
		_ = sleep(ctx, time.Until(due.Add(jitter)))
	}
	return nil
}
