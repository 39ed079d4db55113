package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// Lease is the name of the Lease that the leader holds.
const Lease = "connected-registry-syncer"

// Election says how the leader is found.
type Election struct {
	// Lease is how long others wait for a leader that is not heard of.
	// 0: 15 seconds.
	Lease time.Duration
	// Renew is how long the leader tries to renew before it gives up. It must
	// end its work in what is then left of Lease. 0: 10 seconds.
	Renew time.Duration
	// Retry is the time between two tries. 0: 2 seconds.
	Retry time.Duration
}

func (e *Election) setDefaults() {
	e.Lease = cmp.Or(e.Lease, 15*time.Second)
	e.Renew = cmp.Or(e.Renew, 10*time.Second)
	e.Retry = cmp.Or(e.Retry, 2*time.Second)
}

// ErrLost is what Run ends with when another may lead: the process must end at
// once, with whatever it had under way.
var ErrLost = errors.New("the lease is lost: another may lead now")

// Run waits until it may lead and then leads, until ctx ends; then it returns
// nil. It gives the lease back only when all work has ended, so that the next
// leader need not wait.
func (c *Controller) Run(ctx context.Context) error {
	// The election outlives ctx by the time that the work takes to end.
	electing, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	started := make(chan context.Context, 1)
	lock := &resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: c.config.Namespace, Name: Lease},
		Client:     c.config.Client.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: c.config.Identity},
	}
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock:          lock,
		LeaseDuration: c.config.Election.Lease,
		RenewDeadline: c.config.Election.Renew,
		RetryPeriod:   c.config.Election.Retry,
		// With ReleaseOnCancel the elector tries to give a lease back that it
		// could not renew, for as long as it tried to renew it, and tells of the
		// loss only then: when another may lead already.
		Name: Lease,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(leading context.Context) { started <- leading },
			OnStoppedLeading: func() {},
			OnNewLeader: func(identity string) {
				if identity != c.config.Identity {
					c.log.Info("another leads", "leader", identity)
				}
			},
		},
	})
	if err != nil {
		return fmt.Errorf("leader election: %w", err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		elector.Run(electing)
	}()
	select {
	case <-ctx.Done():
		stop()
		<-ended
		return nil
	case <-ended:
		return ErrLost
	case leading := <-started:
		err = c.leadWhile(ctx, leading)
	}
	if errors.Is(err, ErrLost) {
		return err // whatever is still under way ends with the process
	}
	stop()
	<-ended
	c.release(context.WithoutCancel(ctx), lock)
	return err
}

// release gives the lease back, if it can: otherwise others wait until it ends.
func (c *Controller) release(ctx context.Context, lock resourcelock.Interface) {
	ctx, cancel := context.WithTimeout(ctx, c.config.Election.Retry)
	defer cancel()
	record, _, err := lock.Get(ctx)
	if err == nil && record.HolderIdentity == c.config.Identity {
		now := metav1.Now()
		err = lock.Update(ctx, resourcelock.LeaderElectionRecord{
			LeaderTransitions:    record.LeaderTransitions,
			LeaseDurationSeconds: 1,
			AcquireTime:          now, RenewTime: now,
		})
	}
	if err != nil {
		c.log.Warn("the lease could not be given back; the next leader waits for its end", "error", err)
	}
}

// leadWhile leads until one of the contexts ends. If the lease is lost and the
// work does not end while the lease is still this process's by everybody's
// clock, it returns without waiting for it.
func (c *Controller) leadWhile(ctx, leading context.Context) error {
	c.log.Info("leading", "identity", c.config.Identity)
	work, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	context.AfterFunc(leading, func() { cancel(ErrLost) })
	done := make(chan error, 1)
	go func() { done <- c.lead(work) }()
	select {
	case err := <-done:
		if leading.Err() != nil {
			return ErrLost
		}
		return err
	case <-leading.Done():
	}
	select {
	case <-done: //nolint:errcheck // whatever it is, the lease is lost
	case <-time.After((c.config.Election.Lease - c.config.Election.Renew) / 2):
		c.log.Warn("the lease is lost and the work has not ended: leaving it")
	}
	return ErrLost
}
