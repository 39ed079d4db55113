package controller_test

import (
	"context"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// TestPlainManifests has a syncer work with the rights that the plain manifests
// give it: without prefetch-workloads.yaml all but prefetching for workloads, and
// with it that too, on the node that has no taint.
func TestPlainManifests(t *testing.T) {
	const namespace = "connected-registry"
	applyFile(t, "install.yaml")
	t.Cleanup(func() {
		_ = kube.CoreV1().Namespaces().Delete(context.WithoutCancel(t.Context()), namespace, metav1.DeleteOptions{})
	})
	s := &site{t: t, namespace: namespace, data: t.TempDir(), parent: newParent(t)}
	s.parent.push(t, "team/app:1", 1024, 1)
	s.node("free")
	s.node("kept", corev1.Taint{Key: "site", Value: "lab", Effect: corev1.TaintEffectNoSchedule})
	s.wanted("team/web:1")
	s.create(`{"parent": {"endpoint": "` + s.parent.host + `", "insecure": true}, "repositories": [{"name": "team/app"}],
		"mirrors": [{"registry": "docker.io"}], "nodeCache": {"prefetchWorkloads": true}}`)

	p := s.syncerAs("without", s.serviceAccount("connected-registry-syncer"))
	status := s.await("synchronised without the right to list workloads", succeeded)
	if c := meta.FindStatusCondition(status.Conditions, v1alpha1.ConditionRendered); c == nil || c.Status != metav1.ConditionFalse ||
		!strings.Contains(c.Message, "kubectl apply -f manifests/prefetch-workloads.yaml") {
		t.Errorf("the status does not say what to do: %+v", c)
	}
	if told := s.told(); len(told.Prefetch) > 0 || len(told.Mirrors) != 1 {
		t.Errorf("nodes are told of %v and %v", told.Mirrors, told.Prefetch)
	}
	if code := p.terminate(t); code != 0 {
		t.Errorf("the syncer ended with %d", code)
	}

	applyFile(t, "prefetch-workloads.yaml")
	applyFile(t, "install.yaml") // again, as for an upgrade
	s.syncerAs("with", s.serviceAccount("connected-registry-syncer"))
	s.await("all is told to nodes", func(st v1alpha1.Status) bool {
		return meta.IsStatusConditionTrue(st.Conditions, v1alpha1.ConditionRendered)
	})
	want := []v1alpha1.NodePrefetch{{Images: []string{"docker.io/team/web:1"}, Except: []string{"kept"}}}
	if diff := cmp.Diff(want, s.told().Prefetch); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for _, what := range []string{"watch deployments.apps", "get jobs.batch", "list pods", "list secrets", "patch nodes"} {
		// "no" comes with an error.
		out, _ := kubectl(t.Context(), append([]string{"auth", "can-i", "--all-namespaces", "--as=system:serviceaccount:" + namespace + ":connected-registry-syncer"}, strings.Fields(what)...)...)
		if !strings.HasPrefix(string(out), "no") {
			t.Errorf("may the syncer %s? %s", what, out)
		}
	}
}

func applyFile(t *testing.T, name string) {
	t.Helper()
	if out, err := kubectl(t.Context(), "apply", "-f", "../../manifests/"+name); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// node makes a Node without a machine.
func (s *site) node(name string, taints ...corev1.Taint) {
	s.t.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{Taints: taints}}
	if _, err := kube.CoreV1().Nodes().Create(s.t.Context(), n, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := kube.CoreV1().Nodes().Delete(context.WithoutCancel(s.t.Context()), name, metav1.DeleteOptions{}); err != nil {
			s.t.Error(err)
		}
	})
}

// wanted makes a workload without pods that wants its image early.
func (s *site) wanted(image string) {
	s.t.Helper()
	labels := map[string]any{"app": "web"}
	d := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "apps/v1", "kind": "Deployment",
		"metadata": map[string]any{"name": "web", "labels": map[string]any{v1alpha1.LabelPrefetch: "true"}},
		"spec": map[string]any{
			"replicas": int64(0), "selector": map[string]any{"matchLabels": labels},
			"template": map[string]any{
				"metadata": map[string]any{"labels": labels},
				"spec":     map[string]any{"containers": []any{map[string]any{"name": "web", "image": image}}},
			},
		},
	}}
	api := objects.Resource(schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}).Namespace(metav1.NamespaceDefault)
	if _, err := api.Create(s.t.Context(), d, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := api.Delete(context.WithoutCancel(s.t.Context()), d.GetName(), metav1.DeleteOptions{}); err != nil {
			s.t.Error(err)
		}
	})
}

func (s *site) serviceAccount(name string) *clientcmdapi.AuthInfo {
	s.t.Helper()
	token, err := kube.CoreV1().ServiceAccounts(s.namespace).CreateToken(s.t.Context(), name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return &clientcmdapi.AuthInfo{Token: token.Status.Token}
}

// told is what nodes are told.
func (s *site) told() *v1alpha1.NodeConfiguration {
	s.t.Helper()
	m, err := kube.CoreV1().ConfigMaps(s.namespace).Get(s.t.Context(), "connected-registry-node", metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := v1alpha1.LoadNodeConfiguration("node.yaml", []byte(m.Data["node.yaml"]))
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}
