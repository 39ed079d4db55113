package certificates

import (
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

func (r *run) disabled() Result {
	status := v1alpha1.TrustStatus{Phase: v1alpha1.TrustPhaseDisabled, Since: timestamp(r.now), Message: "the registry serves plain HTTP"}
	if p := r.cr.Status.Trust; p != nil && p.Phase == status.Phase && p.Since != nil {
		status.Since = p.Since
	}
	return Result{
		Trust: &status,
		Conditions: []metav1.Condition{
			r.condition(ConditionCertificateReady, true, "Disabled", status.Message),
			r.condition(ConditionTrustDistributed, true, "Disabled", status.Message),
		},
	}
}

func (r *run) result(o observed, next step) Result {
	status := next.status
	result := Result{
		Trust: &status, CABundle: bundleAfter(o, next).PEM(), RequeueAfter: next.after,
		Conditions: []metav1.Condition{r.certificateReady(o, next), r.trustDistributed(o, next)},
		Events:     r.events(o, next),
	}
	if result.RequeueAfter == 0 {
		result.RequeueAfter = stablePoll
	}
	r.memory.last = status.DeepCopy()
	return result
}

func (r *run) condition(kind string, ok bool, reason, message string) metav1.Condition {
	status := metav1.ConditionFalse
	if ok {
		status = metav1.ConditionTrue
	}
	return metav1.Condition{Type: kind, Status: status, Reason: reason, Message: message, ObservedGeneration: r.cr.Generation}
}

func (r *run) certificateReady(o observed, next step) metav1.Condition {
	no := func(reason, message string) metav1.Condition {
		return r.condition(ConditionCertificateReady, false, reason, message)
	}
	kept := ""
	if o.served != nil {
		kept = "; what was served stays"
	}
	switch {
	case o.offer.fault != nil:
		return no(o.offer.fault.reason, o.offer.fault.message+kept)
	case o.served == nil && next.do != doServe:
		return no("Pending", next.status.Message)
	case o.served == nil:
		return r.condition(ConditionCertificateReady, true, "Issued", "the first certificate was given out")
	case o.served.expired(o.now):
		return no("Expired", "the certificate expired on "+o.served.leaf().NotAfter.UTC().Format(time.DateOnly)+"; "+next.status.Message)
	}
	if missing := o.served.missing(called(r.service, r.cr.Spec.LoginServer)); len(missing) > 0 {
		return no("NamesMissing", "the certificate does not name "+strings.Join(missing, ", ")+", so clients that use these names refuse it")
	}
	return r.condition(ConditionCertificateReady, true, "Issued", "valid until "+o.served.leaf().NotAfter.UTC().Format(time.DateOnly))
}

func (r *run) trustDistributed(o observed, next step) metav1.Condition {
	status := next.status
	message := fmt.Sprintf("%d of %d nodes trust what is published", status.NodesTrusting, status.Nodes)
	lagging := slices.Concat(status.NodesPassed, status.NodesWaitedFor)
	switch {
	case o.noAgents:
		return r.condition(ConditionTrustDistributed, true, "ByHand", "no agents run: nodes are made to trust the CA by hand")
	case bundleAfter(o, next).Empty() && !o.old().Empty(), o.served == nil:
		return r.condition(ConditionTrustDistributed, false, "Pending", status.Message)
	case len(lagging) == 0:
		return r.condition(ConditionTrustDistributed, true, "NodesTrust", message)
	case len(status.NodesWaitedFor) == 0:
		return r.condition(ConditionTrustDistributed, false, "NodesPassed", message+"; not waited for any longer: "+strings.Join(lagging, ", "))
	}
	return r.condition(ConditionTrustDistributed, false, "WaitingForNodes", message+"; waiting for "+strings.Join(lagging, ", "))
}

// events tell of what this call changed, or found changed.
func (r *run) events(o observed, next step) []Event {
	var list []Event
	told := ""
	if f := o.offer.fault; f != nil {
		told = f.reason + ": " + f.message
		if told != r.memory.told {
			list = append(list, Event{Warning: true, Reason: f.reason, Message: f.message})
		}
	}
	r.memory.told = told
	if passed := without(next.status.NodesPassed, o.previous.NodesPassed); len(passed) > 0 {
		list = append(list, Event{Warning: true, Reason: "NodesPassed", Message: "the new CA goes into service though these nodes did not say that they trust it: " + strings.Join(passed, ", ")})
	}
	switch next.do {
	case doNothing, doPrepare:
	case doServe:
		list = append(list, Event{Reason: "CertificateGivenOut", Message: "replicas get a new certificate"})
	case doPublish:
		list = append(list, publishedEvent(o, next))
	}
	return list
}

func publishedEvent(o observed, next step) Event {
	gone, came := o.published.Without(next.bundle), next.bundle.Without(o.published)
	if !gone.Empty() {
		return Event{Reason: "CARemoved", Message: "nodes stop trusting the old CA: " + strings.Join(gone.Fingerprints(), ", ")}
	}
	message := "nodes are made to trust the CA: "
	if o.offer.direct && next.status.Phase != v1alpha1.TrustPhasePending {
		message = "replicas serve secret " + TLSSecret + " directly, possibly before every node trusts the CA (another name would be copied once they do): "
	}
	return Event{Reason: "CAPublished", Message: message + strings.Join(came.Fingerprints(), ", ")}
}

func without(list, other []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return slices.Contains(other, s) })
}
