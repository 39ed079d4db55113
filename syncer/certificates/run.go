package certificates

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

// run is one call of Reconcile.
type run struct {
	Config
	memory  *memory
	cr      *v1alpha1.ConnectedRegistry
	service Service
	hosts   []string
	now     time.Time
}

// memory saves work, and bridges the time until the status that was returned
// can be read. Without it a rotation takes longer, no more.
type memory struct {
	of   types.UID
	last *v1alpha1.TrustStatus
	// told is the fault that was told of last.
	told string

	nodes   []node
	nodesAt time.Time

	// applied is the digest of the objects that cert-manager was given.
	applied    string
	appliedAt  time.Time
	applyFault *fault
	retryAt    time.Time
	failures   int
	// reissued is when cert-manager was last made to issue again.
	reissued time.Time
}

// Error makes a fault the error of a write.
func (f *fault) Error() string { return f.message }

// applyDue reports whether objects are to be applied: others than before, or
// long ago, and not so soon after it went wrong.
func (m *memory) applyDue(digest string, now time.Time) bool {
	return !now.Before(m.retryAt) && (m.applied != digest || !now.Before(m.appliedAt.Add(reapply)))
}

func (m *memory) appliedNow(digest string, now time.Time, err error) {
	m.applyFault = nil
	if err == nil {
		m.applied, m.appliedAt, m.failures = digest, now, 0
		return
	}
	wait := min(2*time.Second<<min(m.failures, 5), time.Minute)
	m.failures++
	m.retryAt = now.Add(wait)
	m.applyFault = &fault{reason: "CertManagerUnreachable", message: err.Error(), retry: wait}
	if f := (*fault)(nil); errors.As(err, &f) {
		m.applyFault.reason = f.reason
	}
}

func (r *run) run(ctx context.Context) (Result, error) {
	if r.cr.Spec.TLS.Disabled {
		return r.disabled(), nil
	}
	o, s, err := r.observe(ctx)
	if err != nil {
		return Result{}, err
	}
	next := plan(o)
	if err := r.carryOut(ctx, next, o, s); err != nil {
		if f := (*fault)(nil); errors.As(err, &f) && next.do == doPrepare {
			// It is remembered, and everything else goes on.
			return r.run(ctx)
		}
		return Result{}, err
	}
	return r.result(o, next), nil
}

// observe reads all that a decision rests on; replicas are asked only when the
// decision is about them.
func (r *run) observe(ctx context.Context) (observed, secrets, error) {
	o := observed{now: r.now, noAgents: r.cr.Spec.TrustDistribution.Disabled}
	var err error
	if o.nodeTimeout, err = duration(r.cr.Spec.TrustDistribution.NodeTimeout, 15*time.Minute); err != nil {
		return o, secrets{}, fmt.Errorf("spec.trustDistribution.nodeTimeout: %w", err)
	}
	if o.hold, err = duration(r.cr.Spec.TrustDistribution.Hold, 5*time.Minute); err != nil {
		return o, secrets{}, fmt.Errorf("spec.trustDistribution.hold: %w", err)
	}
	switch {
	case r.memory.last != nil:
		o.previous = *r.memory.last
	case r.cr.Status.Trust != nil:
		o.previous = *r.cr.Status.Trust
	}
	s, err := r.readSecrets(ctx)
	if err != nil {
		return o, s, err
	}
	o.published, o.untidy = published(s.ca, r.now)
	o.served, o.servedRoots = served(s.tls, r.now)
	o.offer = r.offer(s, o)
	if !o.noAgents {
		if o.nodes, err = r.listNodes(ctx, o.mustWait()); err != nil {
			return o, s, err
		}
	}
	if o.offer.fault == nil && o.offer.next == nil && o.covered() && !o.old().Empty() {
		o.replicas, err = r.probe(ctx, o)
	}
	return o, s, err
}

func duration(s string, zero time.Duration) (time.Duration, error) {
	if s == "" {
		return zero, nil
	}
	return v1alpha1.ParseDuration(s)
}

func (r *run) offer(s secrets, o observed) offer {
	source := r.cr.Spec.TLS.Source
	direct := source == v1alpha1.TLSSourceSecret && r.cr.Spec.TLS.SecretName == TLSSecret
	if s.tls != nil && !direct && s.tls.Labels[labelManagedBy] != managedBy {
		return offer{fault: &fault{
			reason:  "SecretForeign",
			message: "secret " + TLSSecret + " was not made by the syncer and is left alone: name it in spec.tls.secretName, or delete it",
		}}
	}
	switch source {
	case v1alpha1.TLSSourceSecret:
		return r.operator(s, o)
	case v1alpha1.TLSSourceCertManager:
		return r.certManager(s, o)
	default:
		return r.builtIn(s, o)
	}
}

func (r *run) carryOut(ctx context.Context, next step, o observed, s secrets) error {
	var err error
	switch next.do {
	case doNothing:
		return nil
	case doPrepare:
		err = o.offer.prepare.do(ctx)
	case doPublish:
		err = r.publish(ctx, s.ca, next.bundle)
	case doServe:
		err = r.serve(ctx, s.tls, o.offer)
	}
	if err == nil {
		r.Log.Info("certificates: "+next.status.Message, "step", string(next.do), "phase", string(next.status.Phase))
	}
	return err
}

func (r *run) serve(ctx context.Context, have *corev1.Secret, offered offer) error {
	p, err := offered.next()
	if err != nil {
		return fmt.Errorf("making a serving certificate: %w", err)
	}
	return r.give(ctx, have, p, offered.roots)
}

// bundleAfter is what is published once the step is done.
func bundleAfter(o observed, s step) trust.Bundle {
	if s.do == doPublish {
		return s.bundle
	}
	return o.published
}
