package certificates

import (
	"context"
	"fmt"
	"strings"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

const (
	leasePrefix            = "connected-registry-node-"
	leaseSelector          = "app.kubernetes.io/component=node-agent"
	annotationFingerprints = "connectedregistry.io/ca-fingerprints"
)

// listNodes returns every node that is to have an agent, and what its agent acknowledged. Answers may
// come from the API server's cache: a node that is late there is waited for a
// little longer. Unless it is urgent, an answer of half a minute ago will do.
func (r *run) listNodes(ctx context.Context, urgent bool) ([]node, error) {
	if !urgent && r.memory.nodes != nil && r.now.Before(r.memory.nodesAt.Add(laggingPoll)) {
		return r.memory.nodes, nil
	}
	leases, err := r.Client.CoordinationV1().Leases(r.cr.Namespace).List(ctx, metav1.ListOptions{LabelSelector: leaseSelector, ResourceVersion: "0"})
	if err != nil {
		return nil, fmt.Errorf("listing the agents' leases in %s: %w", r.cr.Namespace, err)
	}
	nodes, err := r.Client.CoreV1().Nodes().List(ctx, metav1.ListOptions{
		LabelSelector:   labels.Set(r.cr.Spec.TrustDistribution.NodeSelector).String(),
		ResourceVersion: "0",
	})
	if err != nil {
		return nil, fmt.Errorf("listing nodes: %w", err)
	}
	r.memory.nodes, r.memory.nodesAt = joinNodes(nodes.Items, leases.Items), r.now
	return r.memory.nodes, nil
}

// joinNodes leaves out nodes that cannot run an agent, and Leases of nodes that
// are gone.
func joinNodes(nodes []corev1.Node, leases []coordinationv1.Lease) []node {
	acknowledged := map[string]map[string]bool{}
	for _, lease := range leases {
		name, ok := strings.CutPrefix(lease.Name, leasePrefix)
		if !ok {
			continue
		}
		set := map[string]bool{}
		for f := range strings.SplitSeq(lease.Annotations[annotationFingerprints], ",") {
			set[strings.TrimSpace(f)] = true
		}
		acknowledged[name] = set
	}
	all := []node{}
	for _, n := range nodes {
		if os := n.Labels[corev1.LabelOSStable]; os != "" && os != "linux" || n.Labels["type"] == "virtual-kubelet" {
			continue
		}
		fingerprints, agent := acknowledged[n.Name]
		all = append(all, node{name: n.Name, ready: isReady(n), agent: agent, fingerprints: fingerprints})
	}
	return all
}

func isReady(n corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
