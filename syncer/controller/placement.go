package controller

import (
	"encoding/json"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	schedulingv1 "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/klog/v2"
)

// placement says which nodes pods may run on, by the rules of the scheduler.
type placement struct {
	key         string // the same for the same choice
	anywhere    bool   // but for taints
	affinity    nodeaffinity.RequiredNodeAffinity
	tolerations []corev1.Toleration
}

// placementOf is that of pods; daemon, if they are those of a DaemonSet.
func placementOf(pod *corev1.PodSpec, daemon bool) (placement, error) {
	var required *corev1.NodeSelector
	if a := pod.Affinity; a != nil && a.NodeAffinity != nil {
		required = a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution
	}
	p := placement{
		anywhere:    len(pod.NodeSelector) == 0 && required == nil,
		affinity:    nodeaffinity.GetRequiredNodeAffinity(&corev1.Pod{Spec: *pod}),
		tolerations: tolerationsOf(pod, daemon),
	}
	key, err := json.Marshal([]any{pod.NodeSelector, required, p.tolerations})
	p.key = string(key)
	return p, err
}

// tolerationsOf are those that pods will have: their template's, and those that
// are added as they are made. The DaemonSet controller adds more than the one
// here: for taints that lastingTaints leaves out, and for disk pressure, which
// counts in any case. The admission plugin
// ExtendedResourceToleration, where it is on, adds one for each extended resource
// that is asked for, by which nodes with GPUs are kept for those that use them.
func tolerationsOf(pod *corev1.PodSpec, daemon bool) []corev1.Toleration {
	var keys []string
	if daemon {
		keys = append(keys, corev1.TaintNodeUnschedulable)
	}
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		for _, list := range []corev1.ResourceList{c.Resources.Requests, c.Resources.Limits} {
			for name := range list {
				if strings.Contains(string(name), "/") {
					keys = append(keys, string(name))
				}
			}
		}
	}
	slices.Sort(keys)
	all := slices.Clone(pod.Tolerations)
	for _, key := range slices.Compact(keys) {
		all = append(all, corev1.Toleration{Key: key, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoSchedule})
	}
	return all
}

// lastingTaints are those of a node that keep pods away for as long as somebody
// wants them to, and disk pressure. A node that is not ready for a minute, or not
// ready yet, goes on to prefetch, so as to have the images when it is: nodes are
// not told to stop and to begin again, and no node begins when its pods do.
func lastingTaints(n *corev1.Node) (lasting []corev1.Taint) {
	for _, t := range n.Spec.Taints {
		if t.Effect != corev1.TaintEffectPreferNoSchedule && !passing(t.Key) {
			lasting = append(lasting, corev1.Taint{Key: t.Key, Value: t.Value, Effect: t.Effect})
		}
	}
	if n.Spec.Unschedulable {
		lasting = append(lasting, corev1.Taint{Key: corev1.TaintNodeUnschedulable, Effect: corev1.TaintEffectNoSchedule})
	}
	return lasting
}

// passing reports whether a taint goes by itself. By convention, those that keep
// pods away until something has been set up on a new node end as here:
// connectedregistry.io/not-ready, node.cilium.io/agent-not-ready,
// node.cloudprovider.kubernetes.io/uninitialized.
func passing(key string) bool {
	switch key {
	case corev1.TaintNodeUnreachable, corev1.TaintNodeNetworkUnavailable, corev1.TaintNodeMemoryPressure, corev1.TaintNodePIDPressure:
		return true
	}
	return strings.HasSuffix(key, "not-ready") || strings.HasSuffix(key, "uninitialized")
}

// allows reports whether pods may run on a node. Where the disk is full, nothing
// more is to be brought, even if they may.
func (p *placement) allows(name string, m member) bool {
	if slices.ContainsFunc(m.taints, func(t corev1.Taint) bool { return t.Key == corev1.TaintNodeDiskPressure }) {
		return false
	}
	// Where a cluster has no comparing operators, no toleration has any.
	if _, kept := schedulingv1.FindMatchingUntoleratedTaint(klog.Logger{}, m.taints, p.tolerations, nil, true); kept {
		return false
	}
	if p.anywhere {
		return true
	}
	ok, err := p.affinity.Match(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: m.labels}})
	return err == nil && ok
}

// choice says which nodes something is for. The zero value is every one.
type choice struct {
	nodes  []string // these, sorted; empty: all but except
	except []string // sorted
	nobody bool     // none at all
}

func (c choice) key() string {
	return strings.Join(c.nodes, ",") + "!" + strings.Join(c.except, ",")
}

// choose says which of the nodes pods may run on. What may run anywhere is for
// nodes that join as well, before they have been looked at, unless taints are the
// rule here.
func (p *placement) choose(all map[string]member) choice {
	var in, out []string
	for name, m := range all {
		if p.allows(name, m) {
			in = append(in, name)
		} else {
			out = append(out, name)
		}
	}
	slices.Sort(in)
	slices.Sort(out)
	switch {
	case p.anywhere && len(out) <= len(in):
		return choice{except: out}
	case len(in) == 0:
		return choice{nobody: true}
	}
	return choice{nodes: in}
}

// chooseNodes says of each workload which nodes its pods may run on.
func chooseNodes(workloads []workload, all map[string]member) {
	known := make(map[string]choice)
	for i := range workloads {
		w := &workloads[i]
		on, ok := known[w.where.key]
		if !ok {
			on = w.where.choose(all)
			known[w.where.key] = on
		}
		w.on = on
	}
}
