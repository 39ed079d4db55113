package controller

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	metadatafake "k8s.io/client-go/metadata/fake"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/yaml"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// node reads a Node in YAML.
func node(t *testing.T, text string) *corev1.Node {
	t.Helper()
	n := new(corev1.Node)
	if err := yaml.UnmarshalStrict([]byte(text), n); err != nil {
		t.Fatal(err)
	}
	return n
}

// createNode adds a Node in YAML, as whoever asks sees it.
func (w *world) createNode(text string) {
	w.t.Helper()
	n := node(w.t, text)
	if err := w.kube.Tracker().Add(n); err != nil {
		w.t.Fatal(err)
	}
	if err := w.config.Metadata.(*metadatafake.FakeMetadataClient).Tracker().Create(nodes, nodeObject(n.Name, n.Labels), ""); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) changeNode(name string, change func(*corev1.Node)) {
	w.t.Helper()
	n, err := w.kube.CoreV1().Nodes().Get(w.t.Context(), name, metav1.GetOptions{})
	if err == nil {
		change(n)
		_, err = w.kube.CoreV1().Nodes().Update(w.t.Context(), n, metav1.UpdateOptions{})
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// TestTaints has pods of a Deployment and of a DaemonSet run beside a node without
// taints, and looks for them on one with some.
func TestTaints(t *testing.T) {
	const lab = "taints: [{key: site, value: lab, effect: NoSchedule}]"
	both := map[string]bool{"Deployment": true, "DaemonSet": true}
	for _, test := range []struct {
		name, node, pod string // the node's spec, and what pods have besides a container
		want            map[string]bool
	}{
		{"none", "", "", both},
		{"not tolerated", lab, "", nil},
		{"of another effect", "taints: [{key: site, effect: NoExecute}]", "", nil},
		{"a preference", "taints: [{key: site, effect: PreferNoSchedule}]", "", both},
		{"key and value", lab, "tolerations: [{key: site, value: lab, effect: NoSchedule}]", both},
		{"operator Equal", lab, "tolerations: [{key: site, operator: Equal, value: lab}]", both},
		{"another value", lab, "tolerations: [{key: site, operator: Equal, value: shop}]", nil},
		{"another key", lab, "tolerations: [{key: zone, operator: Exists}]", nil},
		{"another effect", lab, "tolerations: [{key: site, operator: Exists, effect: NoExecute}]", nil},
		{"operator Exists", lab, "tolerations: [{key: site, operator: Exists}]", both},
		{"every taint", lab, "tolerations: [{operator: Exists}]", both},
		{"every taint of an effect", lab, "tolerations: [{operator: Exists, effect: NoSchedule}]", both},
		{"one of two", "taints: [{key: site, effect: NoSchedule}, {key: zone, effect: NoExecute}]", "tolerations: [{key: site, operator: Exists}]", nil},
		{"both, one for a while", "taints: [{key: site, effect: NoSchedule}, {key: zone, effect: NoExecute}]", "tolerations: [{key: site, operator: Exists}, {key: zone, operator: Exists, tolerationSeconds: 60}]", both},
		{"comparison", "taints: [{key: level, value: '5', effect: NoSchedule}]", "tolerations: [{key: level, operator: Gt, value: '3'}]", both},
		{"comparison that fails", "taints: [{key: level, value: '5', effect: NoSchedule}]", "tolerations: [{key: level, operator: Lt, value: '3'}]", nil},
		{"comparison of words", lab, "tolerations: [{key: site, operator: Lt, value: '3'}]", nil},
		{"control plane", "taints: [{key: node-role.kubernetes.io/control-plane, effect: NoSchedule}]", "", nil},

		{"cordoned", "unschedulable: true", "", map[string]bool{"DaemonSet": true}},
		{"cordoned, as the taint", "taints: [{key: node.kubernetes.io/unschedulable, effect: NoSchedule}]", "", map[string]bool{"DaemonSet": true}},
		{"cordoned and tolerated", "unschedulable: true", "tolerations: [{key: node.kubernetes.io/unschedulable, operator: Exists, effect: NoSchedule}]", both},

		{"not ready for now", "taints: [{key: node.kubernetes.io/not-ready, effect: NoSchedule}, {key: node.kubernetes.io/not-ready, effect: NoExecute}]", "", both},
		{"unreachable for now", "taints: [{key: node.kubernetes.io/unreachable, effect: NoSchedule}, {key: node.kubernetes.io/unreachable, effect: NoExecute}]", "", both},
		{"short of memory", "taints: [{key: node.kubernetes.io/memory-pressure, effect: NoSchedule}]", "", both},
		{"short of processes", "taints: [{key: node.kubernetes.io/pid-pressure, effect: NoSchedule}]", "", both},
		{"without a network yet", "taints: [{key: node.kubernetes.io/network-unavailable, effect: NoSchedule}, {key: node.cilium.io/agent-not-ready, effect: NoSchedule}]", "", both},
		{"new", "taints: [{key: node.cloudprovider.kubernetes.io/uninitialized, value: 'true', effect: NoSchedule}, {key: connectedregistry.io/not-ready, effect: NoSchedule}]", "", both},
		{"new, and kept", "taints: [{key: connectedregistry.io/not-ready, effect: NoSchedule}, {key: site, effect: NoSchedule}]", "", nil},
		{"full", "taints: [{key: node.kubernetes.io/disk-pressure, effect: NoSchedule}]", "", nil},
		{"full, though tolerated", "taints: [{key: node.kubernetes.io/disk-pressure, effect: NoSchedule}]", "tolerations: [{operator: Exists}]", nil},
		{"out of service", "taints: [{key: node.kubernetes.io/out-of-service, effect: NoExecute}]", "", nil},

		{"extended resource", "taints: [{key: nvidia.com/gpu, value: present, effect: NoSchedule}]", "initContainers: [{image: b, resources: {limits: {nvidia.com/gpu: 1, cpu: 2}}}]", both},
		{"another extended resource", "taints: [{key: nvidia.com/gpu, effect: NoSchedule}]", "initContainers: [{image: b, resources: {requests: {amd.com/gpu: 1}}}]", nil},
		{"extended resource, evicted", "taints: [{key: nvidia.com/gpu, effect: NoExecute}]", "initContainers: [{image: b, resources: {requests: {nvidia.com/gpu: 1}}}]", nil},
		{"no extended resource", "taints: [{key: memory, effect: NoSchedule}]", "initContainers: [{image: b, resources: {requests: {memory: 1}}}]", nil},
	} {
		tainted := member{taints: lastingTaints(node(t, "{metadata: {name: tainted}, spec: {"+test.node+"}}"))}
		all := map[string]member{"free": {}, "tainted": tainted}
		for _, kind := range []workloadKind{workloadKinds[0], workloadKinds[2]} {
			pod := "{containers: [{image: nginx}], " + test.pod + "}"
			w, err := workloadOf(*object(t, deployment("web", pod)), kind)
			if err != nil {
				t.Fatalf("%s: %v", test.name, err)
			}
			name := map[string]string{"deployments": "Deployment", "daemonsets": "DaemonSet"}[kind.resource.Resource]
			ws := []workload{w}
			chooseNodes(ws, all)
			want := choice{except: []string{"tainted"}}
			if test.want[name] {
				want = choice{}
			}
			if diff := cmp.Diff(want, ws[0].on, cmp.AllowUnexported(choice{})); diff != "" {
				t.Errorf("%s, %s (-want +got):\n%s", test.name, name, diff)
			}
		}
	}
}

// TestChoices says it the shorter way, and of selectors always which nodes they
// are.
func TestChoices(t *testing.T) {
	kept := member{taints: []corev1.Taint{{Key: "site", Effect: corev1.TaintEffectNoSchedule}}}
	labelled := member{labels: map[string]string{"gpu": "yes"}}
	for _, test := range []struct {
		name, pod string
		all       map[string]member
		want      choice
	}{
		{"no nodes known", "{}", nil, choice{}},
		{"no nodes known to select from", "{nodeSelector: {gpu: 'yes'}}", nil, choice{nobody: true}},
		{"few kept", "{}", map[string]member{"a": {}, "b": {}, "d": kept, "c": kept}, choice{except: []string{"c", "d"}}},
		{"most kept", "{}", map[string]member{"b": {}, "a": {}, "c": kept, "d": kept, "e": kept}, choice{nodes: []string{"a", "b"}}},
		{"all kept", "{}", map[string]member{"a": kept}, choice{nobody: true}},
		{"selected", "{nodeSelector: {gpu: 'yes'}}", map[string]member{"b": labelled, "a": labelled, "c": {}}, choice{nodes: []string{"a", "b"}}},
		{"selected and kept", "{nodeSelector: {gpu: 'yes'}}", map[string]member{"a": {labels: labelled.labels, taints: kept.taints}, "b": labelled}, choice{nodes: []string{"b"}}},
	} {
		var pod corev1.PodSpec
		if err := yaml.Unmarshal([]byte(test.pod), &pod); err != nil {
			t.Fatal(err)
		}
		p, err := placementOf(&pod, false)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(test.want, p.choose(test.all), cmp.AllowUnexported(choice{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
	}
}

// TestPlacementsApart keeps those apart that differ in tolerations alone, and
// together those that are said in another order.
func TestPlacementsApart(t *testing.T) {
	keys := make(map[string]string)
	for name, pod := range map[string]string{
		"none":    "{containers: [{image: a}]}",
		"site":    "{containers: [{image: a}], tolerations: [{key: site, operator: Exists}]}",
		"devices": "{containers: [{image: a, resources: {limits: {b.com/x: 1, a.com/x: 1}}}, {image: b, resources: {requests: {a.com/x: 1}}}]}",
		"others":  "{containers: [{image: a, resources: {requests: {a.com/x: 1}}}, {image: b, resources: {requests: {b.com/x: 1}}}]}",
	} {
		w, err := workloadOf(*object(t, deployment("web", pod)), workloadKinds[0])
		if err != nil {
			t.Fatal(err)
		}
		keys[name] = w.where.key
	}
	if len(slices.Compact(slices.Sorted(maps.Values(keys)))) != 3 || keys["devices"] != keys["others"] {
		t.Errorf("keys %v", keys)
	}
}

// TestManyNodes reads whole Nodes page by page, and none while nobody needs them.
func TestManyNodes(t *testing.T) {
	data := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, data, "  mirrors: [{registry: docker.io}]\n  nodeCache: {prefetchWorkloads: true}\n")
		for i := range 7 {
			spec := ""
			if i%2 == 1 {
				spec = "taints: [{key: site, effect: NoSchedule}]"
			}
			w.createNode(fmt.Sprintf("{metadata: {name: node-%d}, spec: {%s}}", i, spec))
		}
		var pages []string
		w.kube.PrependReactor("list", "nodes", func(a clienttesting.Action) (bool, runtime.Object, error) {
			options := a.(clienttesting.ListActionImpl).ListOptions
			pages = append(pages, fmt.Sprintf("%d after %q", options.Limit, options.Continue))
			all, err := w.kube.Tracker().List(nodes, corev1.SchemeGroupVersion.WithKind("Node"), "")
			if err != nil {
				return true, nil, err
			}
			list := all.(*corev1.NodeList)
			first := 3 * len(options.Continue) // one mark for each page that was read
			list.Items = list.Items[first:]
			if len(list.Items) > 3 {
				list.Items, list.Continue = list.Items[:3], options.Continue+"x"
			}
			return true, list, nil
		})
		stop := w.run(w.config)
		time.Sleep(fleetInterval / 2)
		if len(pages) > 0 {
			t.Errorf("asked without a workload: %v", pages)
		}
		o := object(t, deployment("web", "{containers: [{image: 'team/web:1'}]}"))
		if _, err := w.dynamic.Resource(workloadKinds[0].resource).Namespace("shop").Create(t.Context(), o, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(fleetInterval)
		want := []v1alpha1.NodePrefetch{{Images: []string{"docker.io/team/web:1"}, Except: []string{"node-1", "node-3", "node-5"}}}
		if diff := cmp.Diff(want, w.told().Prefetch); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if got := strings.Join(pages, ", "); got != `500 after "", 500 after "x", 500 after "xx"` {
			t.Errorf("asked for %s", got)
		}
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}
	})
}
