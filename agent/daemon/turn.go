package daemon

import (
	"context"
	"fmt"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TurnLease is the Lease that lets one node at a time restart its runtime.
const TurnLease = "connected-registry-runtime"

const (
	// turnDuration is longer than a restart with its checks may take. A node that
	// vanishes in its turn holds up the others for as long.
	turnDuration = 10 * time.Minute
	askTurn      = 5 * time.Second
)

// takeTurn waits for this node's turn.
func (c *client) takeTurn(ctx context.Context, node string) (unlock func(), err error) {
	for {
		taken, err := c.tryTurn(ctx, node, time.Now())
		if taken {
			return func() { c.endTurn(context.WithoutCancel(ctx), node) }, nil
		}
		if err != nil && !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
			return nil, fmt.Errorf("Lease %s/%s: %w", c.namespace, TurnLease, err)
		}
		if !sleep(ctx, jitter(askTurn)) {
			return nil, context.Cause(ctx)
		}
	}
}

// tryTurn takes the Lease if nobody has it. The API server lets one writer win.
func (c *client) tryTurn(ctx context.Context, node string, now time.Time) (taken bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	lease := &coordinationv1.Lease{}
	err = c.coordination.Get().Namespace(c.namespace).Resource("leases").Name(TurnLease).Do(ctx).Into(lease)
	if apierrors.IsNotFound(err) {
		lease = &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: TurnLease, Namespace: c.namespace, Labels: map[string]string{"app.kubernetes.io/managed-by": "connected-registry"}}}
		lease.Spec = turnSpec(node, now, turnDuration)
		err = c.coordination.Post().Namespace(c.namespace).Resource("leases").Body(lease).Do(ctx).Error()
		return err == nil, err
	}
	if err != nil || isTaken(lease, node, now) {
		return false, err
	}
	lease.Spec = turnSpec(node, now, turnDuration)
	err = c.coordination.Put().Namespace(c.namespace).Resource("leases").Name(TurnLease).Body(lease).Do(ctx).Error()
	return err == nil, err
}

func turnSpec(node string, now time.Time, duration time.Duration) coordinationv1.LeaseSpec {
	renewed := metav1.NewMicroTime(now)
	seconds := int32(duration.Seconds())
	return coordinationv1.LeaseSpec{HolderIdentity: &node, RenewTime: &renewed, LeaseDurationSeconds: &seconds}
}

func isTaken(lease *coordinationv1.Lease, node string, now time.Time) bool {
	s := lease.Spec
	if s.HolderIdentity == nil || *s.HolderIdentity == node || s.RenewTime == nil || s.LeaseDurationSeconds == nil {
		return false
	}
	return now.Before(s.RenewTime.Add(time.Duration(*s.LeaseDurationSeconds) * time.Second))
}

// endTurn lets the next node go on at once. If it fails, that node waits until
// the Lease has run out.
func (c *client) endTurn(ctx context.Context, node string) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	lease := &coordinationv1.Lease{}
	err := c.coordination.Get().Namespace(c.namespace).Resource("leases").Name(TurnLease).Do(ctx).Into(lease)
	if err != nil || lease.Spec.HolderIdentity == nil || *lease.Spec.HolderIdentity != node {
		return
	}
	lease.Spec = turnSpec(node, time.Now().Add(-time.Second), time.Second)
	_ = c.coordination.Put().Namespace(c.namespace).Resource("leases").Name(TurnLease).Body(lease).Do(ctx).Error()
}
