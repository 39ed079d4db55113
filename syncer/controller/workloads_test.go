package controller

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/yaml"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
)

// object reads an object in YAML.
func object(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	o := new(unstructured.Unstructured)
	if err := yaml.Unmarshal([]byte(text), &o.Object); err != nil {
		t.Fatal(err)
	}
	return o
}

// deployment is one that wants its images early, in YAML.
func deployment(name, pod string) string {
	return fmt.Sprintf(`{apiVersion: apps/v1, kind: Deployment, metadata: {namespace: shop, name: %s, labels: {connectedregistry.io/prefetch: "true"}}, spec: {template: {spec: %s}}}`, name, pod)
}

func TestWorkloadsOfNodes(t *testing.T) {
	f := &fleet{nodes: map[string]member{
		"a": {labels: labels.Set{"gpu": "yes", "size": "8"}}, "b": {labels: labels.Set{"gpu": "yes"}}, "c": {},
	}}
	c := &v1alpha1.NodeConfiguration{
		Names:   []string{"10.96.0.50", "registry.shop.example:5000"},
		Mirrors: []v1alpha1.NodeMirror{{Mirror: v1alpha1.Mirror{Registry: "docker.io"}}, {Mirror: v1alpha1.Mirror{Registry: "GHCR.io"}}},
	}
	const digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	required := func(terms string) string {
		return "{containers: [{image: nginx}], affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: " + terms + "}}}}"
	}
	for _, test := range []struct {
		name, pod string
		want      []v1alpha1.NodePrefetch
	}{
		{"everywhere", "{containers: [{image: nginx}]}", []v1alpha1.NodePrefetch{{Images: []string{"docker.io/library/nginx:latest"}}}},
		{
			"all kinds of images", "{initContainers: [{image: ghcr.io/team/init}], containers: [{image: 'registry.shop.example:5000/team/app:1'}, {image: 'team/side@" + digest + "'}, {image: 'index.docker.io/team/side:2@" + digest + "'}], volumes: [{image: {reference: 10.96.0.50/data:3}}, {emptyDir: {}}]}",
			[]v1alpha1.NodePrefetch{{Images: []string{"ghcr.io/team/init:latest", "registry.shop.example:5000/team/app:1", "docker.io/team/side@" + digest, "10.96.0.50/data:3"}}},
		},
		{"of other registries", "{containers: [{image: quay.io/x/y:1}, {image: 'registry.shop.example/x:1'}, {image: 'UPPER/case'}, {image: ''}]}", nil},
		{"selector", "{nodeSelector: {gpu: 'yes'}, containers: [{image: nginx}]}", []v1alpha1.NodePrefetch{{Images: []string{"docker.io/library/nginx:latest"}, Nodes: []string{"a", "b"}}}},
		{"no such node", "{nodeSelector: {gpu: 'no'}, containers: [{image: nginx}]}", nil},
		{"affinity", required("[{matchExpressions: [{key: size, operator: Gt, values: ['4']}]}, {matchFields: [{key: metadata.name, operator: In, values: [c]}]}]"), []v1alpha1.NodePrefetch{{Images: []string{"docker.io/library/nginx:latest"}, Nodes: []string{"a", "c"}}}},
		{"affinity that matches nothing", required("[]"), nil},
		{
			"preference", "{containers: [{image: nginx}], affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 1, preference: {matchExpressions: [{key: gpu, operator: Exists}]}}]}}}",
			[]v1alpha1.NodePrefetch{{Images: []string{"docker.io/library/nginx:latest"}}},
		},
	} {
		w, err := workloadOf(*object(t, deployment("web", test.pod)), workloadKinds[0])
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		f.workloads = []workload{w, w} // the second has nothing to add
		chooseNodes(f.workloads, f.nodes)
		got, err := planPrefetch(c, &v1alpha1.Spec{NodeCache: v1alpha1.NodeCache{PrefetchWorkloads: true}}, f)
		if diff := cmp.Diff(test.want, got); diff != "" || err != nil {
			t.Errorf("%s: %v, -want +got:\n%s", test.name, err, diff)
		}
		if got, err := planPrefetch(c, &v1alpha1.Spec{}, f); len(got) > 0 || err != nil {
			t.Errorf("%s: without having been asked for: %v, %v", test.name, got, err)
		}
	}
}

// TestTooManyWorkloads serves those that came first, each with all its images or
// none.
func TestTooManyWorkloads(t *testing.T) {
	for each, want := range map[int]int{7: maxPrefetched / 7 * 7, maxPrefetched + 1: 0} {
		f := &fleet{}
		for i := range 1000 {
			w := workload{name: fmt.Sprint("deployments shop/", i)}
			for j := range each {
				w.images = append(w.images, image{fmt.Sprintf("docker.io/team/a%d:%d", j, i), "docker.io"})
			}
			f.workloads = append(f.workloads, w)
		}
		var p prefetchPlan
		err := p.prefetchFor(f.workloads, map[string]bool{"docker.io": true})
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("deployments shop/%d and ", want/each)) {
			t.Errorf("%d images each: %v", each, err)
		}
		got := 0
		for _, n := range p.all {
			got += len(n.Images)
		}
		if got != want {
			t.Errorf("%d images each: %d, want %d", each, got, want)
		}
	}
}

// TestPrefetchForManyNodes bounds what is said about nodes.
func TestPrefetchForManyNodes(t *testing.T) {
	f := &fleet{nodes: map[string]member{}}
	for i := range 5000 {
		f.nodes[fmt.Sprintf("node-%04d.eu-central-1.compute.internal", i)] = member{labels: labels.Set{"all": "yes"}}
	}
	for i := range 20 {
		w, err := workloadOf(*object(t, deployment(fmt.Sprint("web-", i),
			fmt.Sprintf("{nodeSelector: {all: 'yes'}, containers: [{image: 'nginx:%d'}], affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchFields: [{key: metadata.name, operator: NotIn, values: [node-%04d.eu-central-1.compute.internal]}]}]}}}}", i, i%10))), workloadKinds[0])
		if err != nil {
			t.Fatal(err)
		}
		f.workloads = append(f.workloads, w)
	}
	chooseNodes(f.workloads, f.nodes)
	var p prefetchPlan
	err := p.prefetchFor(f.workloads, map[string]bool{"docker.io": true})
	text, e := yaml.Marshal(p.all)
	if err == nil || e != nil || len(text) > maxPrefetchText || len(p.all) != 2 || len(p.all[0].Images) != 2 {
		t.Errorf("%d bytes for %d sets of nodes: %v, %v", len(text), len(p.all), err, e)
	}
}

// TestWorkloads follows workloads, and keeps what was known of them while the API
// server does not answer.
func TestWorkloads(t *testing.T) {
	data := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, data, "  mirrors: [{registry: docker.io}]\n")
		w.createNode("{metadata: {name: node-1, labels: {gpu: 'yes'}}}")
		w.createNode("{metadata: {name: node-2}, spec: {taints: [{key: site, value: lab, effect: NoSchedule}]}}")
		create := func(resource int, text string) {
			t.Helper()
			o := object(t, text)
			if _, err := w.dynamic.Resource(workloadKinds[resource].resource).Namespace(o.GetNamespace()).Create(t.Context(), o, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		create(0, deployment("web", "{containers: [{image: 'team/web:1'}]}"))
		create(0, strings.Replace(deployment("other", "{containers: [{image: 'team/other:1'}]}"), "true", "false", 1))
		create(4, `{apiVersion: batch/v1, kind: CronJob, metadata: {namespace: jobs, name: report, labels: {connectedregistry.io/prefetch: "true"},
			annotations: {connectedregistry.io/prefetch-images: "team/report:2, quay.io/x:1,"}},
			spec: {jobTemplate: {spec: {template: {spec: {nodeSelector: {gpu: 'yes'}, containers: [{image: 'team/report:1'}]}}}}}}`)
		var away atomic.Bool
		var asked atomic.Int64
		w.dynamic.PrependReactor("list", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
			if a.GetResource() == registries {
				return false, nil, nil
			}
			asked.Add(1)
			if away.Load() {
				return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: a.GetResource().Resource}, "", errors.New("no right"))
			}
			return false, nil, nil
		})
		stop := w.run(w.config)
		time.Sleep(2 * resyncInterval)
		if asked.Load() > 0 || len(w.told().Prefetch) > 0 {
			t.Errorf("without having been asked for: %d questions, %v", asked.Load(), w.told().Prefetch)
		}
		w.setSpec(`{"nodeCache": {"prefetchWorkloads": true}}`)
		time.Sleep(resyncInterval + 10*time.Second)
		want := []v1alpha1.NodePrefetch{
			{Images: []string{"docker.io/team/report:1", "docker.io/team/report:2"}, Nodes: []string{"node-1"}},
			{Images: []string{"docker.io/team/web:1"}, Except: []string{"node-2"}},
		}
		// By name, where they are of the same age.
		w.wantPrefetch(want, "at first")
		if w.told().NodeCache.PrefetchWorkloads {
			t.Error("nodes are told twice")
		}

		away.Store(true)
		if err := w.dynamic.Resource(workloadKinds[4].resource).Namespace("jobs").Delete(t.Context(), "report", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * fleetInterval)
		w.wantPrefetch(want, "without the right")
		if ready := fmt.Sprint(w.status().Conditions); !strings.Contains(ready, "kubectl apply -f manifests/prefetch-workloads.yaml") {
			t.Errorf("the status does not say what to do: %s", ready)
		}
		away.Store(false)
		w.changeNode("node-2", func(n *corev1.Node) { n.Spec.Taints = nil })
		time.Sleep(3 * fleetInterval)
		want = []v1alpha1.NodePrefetch{{Images: []string{"docker.io/team/web:1"}}}
		w.wantPrefetch(want, "with the right, and a node without its taint")
		w.changeNode("node-1", func(n *corev1.Node) { n.Spec.Unschedulable = true })
		time.Sleep(2 * fleetInterval)
		want[0].Except = []string{"node-1"}
		w.wantPrefetch(want, "after kubectl cordon")
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}
	})
}

// TestWorkloadsWithoutTheRight: prefetching them is off, nothing else is, and the
// status says what to do until it is done.
func TestWorkloadsWithoutTheRight(t *testing.T) {
	data := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, data, `
  mirrors:
  - registry: docker.io
    prefetch: [{images: [team/cuda:12], nodeSelector: {gpu: "yes"}}]
  nodeCache: {prefetchWorkloads: true, peers: true}
`)
		w.createNode("{metadata: {name: node-1, labels: {gpu: 'yes'}}}")
		o := object(t, deployment("web", "{containers: [{image: 'team/web:1'}]}"))
		if _, err := w.dynamic.Resource(workloadKinds[0].resource).Namespace("shop").Create(t.Context(), o, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.kube.CoordinationV1().Leases("site").Create(t.Context(), agentLease("node-1", "192.0.2.1:5051", time.Now()), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		var allowed atomic.Bool
		w.dynamic.PrependReactor("list", "deployments", func(clienttesting.Action) (bool, runtime.Object, error) {
			return !allowed.Load(), nil, apierrors.NewForbidden(schema.GroupResource{Group: "apps", Resource: "deployments"}, "", errors.New("no right"))
		})
		stop := w.run(w.config)
		want := []v1alpha1.NodePrefetch{{Images: []string{"docker.io/team/cuda:12"}, Nodes: []string{"node-1"}}}
		for range 6 { // also between two looks
			time.Sleep(25 * time.Second)
			told := w.told()
			if diff := cmp.Diff(want, told.Prefetch); diff != "" || len(told.Peers) != 1 {
				t.Errorf("peers %v, prefetch (-want +got):\n%s", told.Peers, diff)
			}
			if rendered := meta.FindStatusCondition(w.status().Conditions, v1alpha1.ConditionRendered); rendered == nil || rendered.Status != metav1.ConditionFalse ||
				!strings.Contains(rendered.Message, "kubectl apply -f manifests/prefetch-workloads.yaml") {
				t.Errorf("the status does not say what to do: %v", rendered)
			}
		}
		allowed.Store(true)
		time.Sleep(2 * fleetInterval)
		want = append(want, v1alpha1.NodePrefetch{Images: []string{"docker.io/team/web:1"}})
		if diff := cmp.Diff(want, w.told().Prefetch); diff != "" || !meta.IsStatusConditionTrue(w.status().Conditions, v1alpha1.ConditionRendered) {
			t.Errorf("with the right: %v, -want +got:\n%s", w.status().Conditions, diff)
		}
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}
	})
}

// TestNodeToken lets nodes read what is prefetched, and no more.
func TestNodeToken(t *testing.T) {
	data := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, data, "  loginServer: registry.shop.example\n  mirrors: [{registry: docker.io}]\n  nodeCache: {prefetchWorkloads: true}\n")
		add := func(name, image string) {
			t.Helper()
			o := object(t, deployment(name, "{containers: [{image: '"+image+"'}]}"))
			if _, err := w.dynamic.Resource(workloadKinds[0].resource).Namespace("shop").Create(t.Context(), o, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		file := func() (f clienttoken.File, there bool) {
			t.Helper()
			content, there := w.secret(ReplicaSecret).Data["_nodes.json"]
			if there {
				if err := json.Unmarshal(content, &f); err != nil {
					t.Fatal(err)
				}
			}
			return f, there
		}
		var away atomic.Bool
		w.dynamic.PrependReactor("list", "deployments", func(clienttesting.Action) (bool, runtime.Object, error) {
			return away.Load(), nil, errors.New("no route to host")
		})
		add("mirrored", "nginx:1")
		stop := w.run(w.config)
		time.Sleep(10 * time.Second)
		if f, there := file(); !there || len(f.ScopeMap) > 0 {
			t.Errorf("with nothing to read: %+v", f)
		}
		add("one", "registry.shop.example/team/one:1")
		add("two", "10.96.0.50/team/two:1")
		add("two-again", "registry.shop.example/team/two:2")
		time.Sleep(3 * fleetInterval)
		want := []v1alpha1.Scope{{Repositories: []string{"team/one", "team/two"}, Actions: []v1alpha1.Action{"content/read", "metadata/read"}}}
		first := w.secret(PrefetchSecret)
		f, _ := file()
		if diff := cmp.Diff(want, f.ScopeMap); diff != "" || first == nil {
			t.Fatalf("Secret %v, -want +got:\n%s", first, diff)
		}
		if string(first.Data["username"]) != "_nodes" || !clienttoken.PasswordMatches(f.Passwords[0], string(first.Data["password"])) || first.OwnerReferences[0].UID != "u-1" {
			t.Errorf("what nodes have opens nothing: %v", first.ObjectMeta)
		}
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}

		// A new leader that does not know what nodes need.
		away.Store(true)
		stop = w.run(w.config)
		time.Sleep(resyncInterval)
		again, _ := file()
		if diff := cmp.Diff(f, again); diff != "" {
			t.Errorf("while workloads cannot be listed (-want +got):\n%s", diff)
		}
		away.Store(false)

		// It got away.
		if err := w.kube.CoreV1().Secrets("site").Delete(t.Context(), PrefetchSecret, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(resyncInterval + 10*time.Second)
		f, _ = file()
		if s := w.secret(PrefetchSecret); s == nil || string(s.Data["password"]) == string(first.Data["password"]) || !clienttoken.PasswordMatches(f.Passwords[0], string(s.Data["password"])) || len(f.Passwords) != 1 {
			t.Errorf("not made anew: %v", s)
		}

		w.setSpec(`{"anonymousPull": true}`)
		time.Sleep(resyncInterval + 10*time.Second)
		if _, there := file(); there || w.secret(PrefetchSecret) != nil {
			t.Error("nodes keep a credential that they need no more")
		}
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}
	})
}
