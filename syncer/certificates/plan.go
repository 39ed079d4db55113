package certificates

import (
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

// observed is everything that a decision rests on.
type observed struct {
	now      time.Time
	previous v1alpha1.TrustStatus
	// nodeTimeout and hold are the resource's.
	nodeTimeout, hold time.Duration
	// noAgents: nodes are taken care of by hand and say nothing.
	noAgents bool

	offer offer
	// served is what connected-registry-tls holds, nil if that is nothing that
	// could be served; servedRoots are the CAs written beside it.
	served      *pair
	servedRoots trust.Bundle
	// published is what connected-registry-ca holds. untidy: other things too.
	published trust.Bundle
	untidy    bool

	nodes    []node
	replicas []replica
}

// offer is what a source has to give.
type offer struct {
	// prepare is a write that the source needs before anything else. nil: none.
	prepare *write
	// fault is why there is nothing to offer; nil: there is.
	fault *fault
	// roots are the CAs to be trusted in the end; empty with a certificate of a
	// public CA.
	roots trust.Bundle
	// next makes or fetches the certificate to be served in place of what is;
	// nil: that is the right one, or awaiting says what the next one hangs on.
	next     func() (*pair, error)
	awaiting string
	// direct: replicas mount the operator's Secret itself.
	direct bool
}

// fault is something that only the operator, or time, can put right.
type fault struct {
	reason, message string
	// retry is when to look again. Zero: when something changed.
	retry time.Duration
}

// node is a node as far as trust goes.
type node struct {
	name string
	// ready is its condition; agent says that it has an agent's Lease.
	ready, agent bool
	// fingerprints are those in the Lease.
	fingerprints map[string]bool
}

// trusts reports whether the node acknowledged all of b.
func (n node) trusts(b trust.Bundle) bool {
	return n.agent && !slices.ContainsFunc(b.Fingerprints(), func(f string) bool { return !n.fingerprints[f] })
}

// replica is an endpoint of the Service.
type replica struct {
	address string
	ready   bool
	// fault is why it is not seen to serve the certificate of
	// connected-registry-tls. Empty: it does.
	fault string
}

type action string

const (
	// doNothing: wait, or rest.
	doNothing action = ""
	// doPrepare carries out offer.prepare.
	doPrepare action = "prepare"
	// doPublish writes bundle to connected-registry-ca.
	doPublish action = "publish"
	// doServe writes offer.next to connected-registry-tls.
	doServe action = "serve"
)

// step is what to do next, and where that leaves things.
type step struct {
	do     action
	bundle trust.Bundle
	status v1alpha1.TrustStatus
	after  time.Duration
}

// How long it takes to look again.
const (
	soon          = 10 * time.Millisecond // after a write
	nodePoll      = 2 * time.Second
	nodePollEach  = time.Millisecond // for each node, so that large clusters are asked less often
	replicaPoll   = 3 * time.Second
	holdPoll      = 30 * time.Second
	stablePoll    = 10 * time.Minute
	laggingPoll   = 30 * time.Second
	maxListed     = 50
	maxOverlapped = trust.MaxBundleCertificates / 2
)

// plan decides the next step. Its order is the order of a rotation: each case
// rests on those before it being done.
func plan(o observed) step {
	if missing := o.needed().Without(o.published); !missing.Empty() || o.untidy {
		return o.publish(o.union())
	}
	if o.offer.prepare != nil {
		return o.stay(doPrepare, o.offer.prepare.what, soon)
	}
	if o.offer.fault != nil {
		return o.stay(doNothing, o.offer.fault.message, o.offer.fault.retry)
	}
	if o.mustWait() {
		s, wait := o.waitForNodes()
		if wait {
			return s
		}
		o.previous.NodesPassed = s.status.NodesPassed
	}
	if s, wait := o.serve(); wait {
		return s
	}
	if o.old().Empty() {
		return o.rest()
	}
	if s, wait := o.waitForReplicas(); wait {
		return s
	}
	if s, wait := o.holdOn(); wait {
		return s
	}
	return o.publish(o.offer.roots)
}

// needed are the CAs that must be published now: those to come, and those of
// what is served.
func (o observed) needed() trust.Bundle {
	switch {
	case o.offer.fault != nil:
		return o.servedRoots
	case o.served != nil && !o.covered():
		return o.offer.roots.Union(o.servedRoots)
	}
	return o.offer.roots
}

// union is what to publish so that all that is needed is, and nothing goes that
// a replica may still serve. What is beyond any sensible overlap goes first.
func (o observed) union() trust.Bundle {
	all := o.published.Union(o.needed())
	if len(all.Certificates()) > maxOverlapped {
		return o.needed()
	}
	return all
}

// old are the CAs that go when the rotation ends.
func (o observed) old() trust.Bundle { return o.published.Without(o.offer.roots) }

// covered reports whether what is served verifies under the CAs to come.
func (o observed) covered() bool {
	return o.served != nil && o.served.verify(o.offer.roots, o.now) == nil
}

// mustWait reports whether what is offered may not be served before nodes
// trust it: something that works is served now, under another CA. What has
// expired works nowhere any more. Where nothing is in connected-registry-tls,
// replicas may still serve what was, if an old CA is published.
func (o observed) mustWait() bool {
	if o.served == nil {
		return !o.old().Empty()
	}
	return !o.covered() && !o.served.expired(o.now)
}

func (o observed) waitForNodes() (step, bool) {
	s := o.step(doNothing, v1alpha1.TrustPhaseWaitingForNodes, "", 0)
	left := s.status.Since.Add(o.nodeTimeout).Sub(o.now)
	s.after = min(left, nodePoll+time.Duration(len(o.nodes))*nodePollEach)
	waiting := len(s.status.NodesWaitedFor) > 0
	s.status.Message = fmt.Sprintf("%d of %d nodes trust the old and the new CA; waiting until %s for %s",
		s.status.NodesTrusting, s.status.Nodes, s.status.Since.Add(o.nodeTimeout).UTC().Format(time.RFC3339), strings.Join(s.status.NodesWaitedFor, ", "))
	if o.noAgents {
		waiting = true
		s.status.Message = fmt.Sprintf("no agents run: the new CA is to be on every node by %s", s.status.Since.Add(o.nodeTimeout).UTC().Format(time.RFC3339))
	}
	return s, waiting && left > 0
}

func (o observed) serve() (step, bool) {
	phase := v1alpha1.TrustPhaseWaitingForReplicas
	if o.old().Empty() {
		phase = v1alpha1.TrustPhaseStable
	}
	switch {
	case o.offer.next != nil:
		return o.step(doServe, phase, "giving out a new certificate", soon), true
	case o.served == nil || !o.covered():
		// The nodes are ready for what the source has yet to give.
		s := o.step(doNothing, v1alpha1.TrustPhaseWaitingForNodes, o.offer.awaiting, nodePoll)
		if o.served == nil && o.old().Empty() {
			s = o.step(doNothing, v1alpha1.TrustPhasePending, o.offer.awaiting, nodePoll)
		}
		return s, true
	}
	return step{}, false
}

func (o observed) waitForReplicas() (step, bool) {
	if o.previous.Phase == v1alpha1.TrustPhaseHolding && len(o.unconfirmed(false)) == 0 {
		return step{}, false // those that are down were waited for already
	}
	s := o.step(doNothing, v1alpha1.TrustPhaseWaitingForReplicas, "", replicaPoll)
	patient := o.now.Before(s.status.Since.Add(o.nodeTimeout))
	s.status.ReplicasWaitedFor = o.unconfirmed(patient)
	s.status.Message = "waiting for replicas to serve the new certificate"
	if len(o.replicas) == 0 && patient {
		s.status.Message = "waiting for a replica that serves the new certificate"
		return s, true
	}
	return s, len(s.status.ReplicasWaitedFor) > 0
}

// unconfirmed lists the replicas that are not seen to serve the new
// certificate: those that are ready, and the others too if they are waited for.
func (o observed) unconfirmed(others bool) []string {
	var list []string
	for _, r := range o.replicas {
		if r.fault != "" && (r.ready || others) {
			list = append(list, r.address+": "+r.fault)
		}
	}
	slices.Sort(list)
	return list[:min(len(list), maxListed)]
}

func (o observed) holdOn() (step, bool) {
	s := o.step(doNothing, v1alpha1.TrustPhaseHolding, "", 0)
	end := s.status.Since.Add(o.hold)
	s.after = min(end.Sub(o.now), holdPoll)
	s.status.Message = "every replica serves the new certificate; the old CA stays trusted until " + end.UTC().Format(time.RFC3339)
	return s, o.now.Before(end)
}

func (o observed) rest() step {
	s := o.step(doNothing, v1alpha1.TrustPhaseStable, o.offer.awaiting, stablePoll)
	switch {
	case o.offer.awaiting != "":
		s.after = nodePoll
	case len(s.status.NodesWaitedFor)+len(s.status.NodesPassed) > 0:
		s.after = laggingPoll
	}
	return s
}

// publish says where things stand once the bundle is out.
func (o observed) publish(bundle trust.Bundle) step {
	o.published = bundle
	var s step
	switch message := "publishing CA certificates"; {
	case o.offer.fault != nil:
		s = o.stay(doPublish, message, soon)
	case o.mustWait():
		s = o.step(doPublish, v1alpha1.TrustPhaseWaitingForNodes, message, soon)
	case o.served == nil:
		s = o.step(doPublish, v1alpha1.TrustPhasePending, message, soon)
	case !o.old().Empty():
		s = o.step(doPublish, v1alpha1.TrustPhaseWaitingForReplicas, message, soon)
	default:
		s = o.step(doPublish, v1alpha1.TrustPhaseStable, message, soon)
	}
	s.bundle = bundle
	return s
}

// stay leaves the phase as it is, and with it the time that nodes have.
func (o observed) stay(do action, message string, after time.Duration) step {
	s := step{do: do, status: *o.previous.DeepCopy(), after: after}
	if s.status.Phase == "" {
		s.status = v1alpha1.TrustStatus{Phase: v1alpha1.TrustPhasePending, Since: timestamp(o.now)}
	}
	s.status.Message = message
	return s
}

// step fills in what every status says.
func (o observed) step(do action, phase v1alpha1.TrustPhase, message string, after time.Duration) step {
	t := v1alpha1.TrustStatus{
		Phase: phase, Message: message,
		Fingerprints:    o.offer.roots.Fingerprints(),
		OldFingerprints: o.old().Fingerprints(),
		CANotAfter:      timestamp(o.offer.roots.NotAfter()),
	}
	if o.served != nil {
		t.CertificateNotAfter = timestamp(o.served.leaf().NotAfter)
	}
	t.Since = timestamp(o.now)
	if p := o.previous; p.Phase == phase && p.Since != nil && !p.Since.After(o.now) &&
		slices.Equal(p.Fingerprints, t.Fingerprints) && slices.Equal(p.OldFingerprints, t.OldFingerprints) {
		t.Since = p.Since
	}
	o.count(&t)
	return step{do: do, status: t, after: after}
}

// count says how far nodes are. One that was never seen with an agent is
// expected to get one for so long as a rotation waits for nodes.
func (o observed) count(t *v1alpha1.TrustStatus) {
	late := !o.now.Before(t.Since.Add(o.nodeTimeout))
	for _, n := range o.nodes {
		switch {
		case !n.agent && (!n.ready || late && t.Phase != v1alpha1.TrustPhaseWaitingForNodes):
			continue
		case n.trusts(o.published):
			t.NodesTrusting++
		case late && t.Phase == v1alpha1.TrustPhaseWaitingForNodes, slices.Contains(o.previous.NodesPassed, n.name):
			t.NodesPassed = append(t.NodesPassed, n.name)
		default:
			t.NodesWaitedFor = append(t.NodesWaitedFor, n.name)
		}
		t.Nodes++
	}
	slices.Sort(t.NodesPassed)
	slices.Sort(t.NodesWaitedFor)
	t.NodesPassed = t.NodesPassed[:min(len(t.NodesPassed), maxListed)]
	t.NodesWaitedFor = t.NodesWaitedFor[:min(len(t.NodesWaitedFor), maxListed)]
}

func timestamp(t time.Time) *metav1.Time {
	if t.IsZero() {
		return nil
	}
	return &metav1.Time{Time: t.Truncate(time.Second)}
}
