package controller

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

const (
	agentLeasePrefix   = "connected-registry-node-"
	agentLeaseSelector = "app.kubernetes.io/component=node-agent"

	// fleetInterval is how often nodes are looked at while what nodes are told
	// depends on it. They are asked about and not watched: a thousand nodes
	// change all the time, and each change of what they are told goes to all of
	// them.
	fleetInterval = time.Minute
	// leaseGrace is how long the Lease of a node that is gone stays.
	leaseGrace = time.Hour
	// maxLeasesRemoved bounds what is removed at a time.
	maxLeasesRemoved = 100
	// nodesPage is how many whole Nodes are read at a time, of some 10 KiB each.
	nodesPage = 500
)

var nodes = schema.GroupVersionResource{Version: "v1", Resource: "nodes"}

// fleet is what is known of the nodes, and of the workloads whose images they
// are to have.
type fleet struct {
	at        time.Time         // when they were looked at; zero: never
	nodes     map[string]member // by name
	workloads []workload        // the oldest first
	unlisted  error             // why these are not up to date; nil if they are
}

type member struct {
	labels labels.Set
	taints []corev1.Taint // see lastingTaints; only known while there are workloads
	peer   string         // where others reach its cache, IP:port; empty: they do not
}

// names returns the nodes with the labels given, sorted.
func (f *fleet) names(selector map[string]string) []string {
	var all []string
	choose := labels.SelectorFromSet(selector)
	for name, m := range f.nodes {
		if choose.Matches(m.labels) {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all
}

// peers returns the nodes whose caches may be asked, sorted.
func (f *fleet) peers() []v1alpha1.Peer {
	var all []v1alpha1.Peer
	for name, m := range f.nodes {
		if m.peer != "" {
			all = append(all, v1alpha1.Peer{Node: name, Address: m.peer})
		}
	}
	slices.SortFunc(all, func(a, b v1alpha1.Peer) int { return strings.Compare(a.Node, b.Node) })
	return all
}

// needsFleet reports whether what nodes are told depends on which there are.
func needsFleet(spec *v1alpha1.Spec) bool {
	if spec.TrustDistribution.Disabled {
		return false
	}
	return spec.NodeCache.Peers || spec.NodeCache.PrefetchWorkloads || slices.ContainsFunc(spec.Mirrors, func(m v1alpha1.Mirror) bool {
		return slices.ContainsFunc(m.Prefetch, func(p v1alpha1.Prefetch) bool { return len(p.NodeSelector) > 0 })
	})
}

// lookAround brings l.fleet up to date if it is older than every, and removes
// Leases that nobody renews any more. On error what was known stays. If the
// syncer has no right to list workloads, what was known of them does.
func (l *loop) lookAround(ctx context.Context, spec *v1alpha1.Spec, every time.Duration) error {
	now := time.Now()
	if !l.fleet.at.IsZero() && now.Before(l.fleet.at.Add(every)) {
		return nil
	}
	f := fleet{at: now}
	var err error
	if spec.NodeCache.PrefetchWorkloads {
		f.workloads, err = l.listWorkloads(ctx)
		if apierrors.IsForbidden(err) {
			f.workloads, f.unlisted = l.fleet.workloads, err
		} else if err != nil {
			return err
		}
	}
	if f.nodes, err = l.listNodes(ctx, len(f.workloads) > 0); err != nil {
		return fmt.Errorf("listing nodes: %w", err)
	}
	leases, err := withRequestTime(ctx, func(ctx context.Context) (*coordinationv1.LeaseList, error) {
		return l.config.Client.CoordinationV1().Leases(l.config.Namespace).List(ctx, metav1.ListOptions{
			LabelSelector: agentLeaseSelector, ResourceVersion: "0",
		})
	})
	if err != nil {
		return fmt.Errorf("listing the agents' Leases: %w", err)
	}
	stale := joinFleet(f.nodes, leases.Items, now)
	chooseNodes(f.workloads, f.nodes)
	l.fleet = f
	return l.removeLeases(ctx, stale)
}

// listNodes returns the nodes by name. Their taints can only be had with all
// else that there is to know of them, so they are read if somebody needs them.
func (l *loop) listNodes(ctx context.Context, taints bool) (map[string]member, error) {
	all := make(map[string]member)
	if !taints {
		// Answers from the API server's cache will do.
		found, err := withRequestTime(ctx, func(ctx context.Context) (*metav1.PartialObjectMetadataList, error) {
			return l.config.Metadata.Resource(nodes).List(ctx, metav1.ListOptions{ResourceVersion: "0"})
		})
		if err != nil {
			return nil, err
		}
		for _, n := range found.Items {
			all[n.Name] = member{labels: n.Labels}
		}
		return all, nil
	}
	page := metav1.ListOptions{Limit: nodesPage} // that cache knows of no pages
	for {
		found, err := withRequestTime(ctx, func(ctx context.Context) (*corev1.NodeList, error) {
			return l.config.Client.CoreV1().Nodes().List(ctx, page)
		})
		if err != nil {
			return nil, err
		}
		for i := range found.Items {
			n := &found.Items[i]
			all[n.Name] = member{labels: n.Labels, taints: lastingTaints(n)}
		}
		if page.Continue = found.Continue; page.Continue == "" {
			return all, nil
		}
	}
}

// joinFleet tells the nodes where their peers are, by the Leases of agents. stale
// are those of nodes that are gone for long.
func joinFleet(all map[string]member, leases []coordinationv1.Lease, now time.Time) (stale []coordinationv1.Lease) {
	for _, lease := range leases {
		name, ok := strings.CutPrefix(lease.Name, agentLeasePrefix)
		if !ok {
			continue
		}
		m, ok := all[name]
		switch {
		// No nodes at all: the answer is no good, since we run on one.
		case !ok && len(all) > 0 && now.Sub(renewed(lease)) > leaseGrace:
			stale = append(stale, lease)
		case ok && lives(lease, now):
			m.peer = peerAddress(lease.Annotations[v1alpha1.AnnotationPeerAddress])
			all[name] = m
		}
	}
	return stale
}

func renewed(lease coordinationv1.Lease) time.Time {
	if lease.Spec.RenewTime == nil {
		return lease.CreationTimestamp.Time
	}
	return lease.Spec.RenewTime.Time
}

// lives reports whether an agent renews its Lease, or went so short a while ago
// that it may come back.
func lives(lease coordinationv1.Lease, now time.Time) bool {
	return lease.Spec.LeaseDurationSeconds != nil &&
		now.Sub(renewed(lease)) < time.Duration(*lease.Spec.LeaseDurationSeconds)*time.Second
}

// peerAddress is empty for what is no address of a node: whoever holds a node
// writes its Lease, and all others go where that says.
func peerAddress(s string) string {
	a, err := netip.ParseAddrPort(s)
	if ip := a.Addr().Unmap(); err != nil || a.Port() == 0 || ip.Zone() != "" || !ip.IsGlobalUnicast() {
		return ""
	}
	return net.JoinHostPort(a.Addr().Unmap().String(), fmt.Sprint(a.Port()))
}

// removeLeases removes those that have not been written since they were read.
func (l *loop) removeLeases(ctx context.Context, stale []coordinationv1.Lease) error {
	api := l.config.Client.CoordinationV1().Leases(l.config.Namespace)
	for _, lease := range stale[:min(len(stale), maxLeasesRemoved)] {
		unchanged := &metav1.Preconditions{UID: &lease.UID, ResourceVersion: &lease.ResourceVersion}
		_, err := withRequestTime(ctx, func(ctx context.Context) (struct{}, error) {
			return struct{}{}, api.Delete(ctx, lease.Name, metav1.DeleteOptions{Preconditions: unchanged})
		})
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			return fmt.Errorf("removing Lease %s, whose node is gone: %w", lease.Name, err)
		}
		l.log.Info("removed the Lease of a node that is gone", "lease", lease.Name)
	}
	return nil
}
