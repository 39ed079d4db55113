package controller

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	metadatafake "k8s.io/client-go/metadata/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// agentLease is that of a node's agent, written at the time given.
func agentLease(node, peer string, at time.Time) *coordinationv1.Lease {
	l := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "site", Name: agentLeasePrefix + node, UID: "u-9", ResourceVersion: "7",
			Labels: map[string]string{"app.kubernetes.io/component": "node-agent"},
		},
		Spec: coordinationv1.LeaseSpec{RenewTime: new(metav1.NewMicroTime(at)), LeaseDurationSeconds: new(int32(660))},
	}
	if peer != "" {
		l.Annotations = map[string]string{v1alpha1.AnnotationPeerAddress: peer}
	}
	return l
}

func nodeObject(name string, labels map[string]string) *metav1.PartialObjectMetadata {
	return &metav1.PartialObjectMetadata{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
	}
}

func TestJoinFleet(t *testing.T) {
	now := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	all := map[string]member{"a": {labels: labels.Set{"zone": "1"}}, "b": {}, "c": {}}
	leases := []coordinationv1.Lease{
		*agentLease("a", "192.0.2.1:5051", now.Add(-time.Minute)),
		*agentLease("b", "192.0.2.2:5051", now.Add(-11*time.Minute)),
		*agentLease("c", "", now),
		*agentLease("short-away", "192.0.2.8:5051", now.Add(-59*time.Minute)),
		*agentLease("gone", "192.0.2.9:5051", now.Add(-61*time.Minute)),
	}
	never := agentLease("never-renewed", "", now)
	never.Spec.RenewTime, never.CreationTimestamp = nil, metav1.NewTime(now.Add(-2*time.Hour))
	foreign := agentLease("x", "", now.Add(-time.Hour*99))
	foreign.Name = "somebody-elses"
	leases = append(leases, *never, *foreign)
	stale := joinFleet(all, leases, now)
	f := fleet{nodes: all}
	if diff := cmp.Diff([]v1alpha1.Peer{{Node: "a", Address: "192.0.2.1:5051"}}, f.peers()); diff != "" {
		t.Errorf("peers (-want +got):\n%s", diff)
	}
	var names []string
	for _, l := range stale {
		names = append(names, l.Name)
	}
	if diff := cmp.Diff([]string{agentLeasePrefix + "gone", agentLeasePrefix + "never-renewed"}, names); diff != "" {
		t.Errorf("stale (-want +got):\n%s", diff)
	}
	if stale := joinFleet(nil, leases, now); len(stale) > 0 {
		t.Errorf("an answer without any node makes %d Leases go", len(stale))
	}
}

func TestPeerAddress(t *testing.T) {
	for given, want := range map[string]string{
		"192.0.2.1:5051": "192.0.2.1:5051", "[2001:db8::1]:5051": "[2001:db8::1]:5051", "[::ffff:192.0.2.1]:5051": "192.0.2.1:5051",
		"": "", "192.0.2.1": "", "192.0.2.1:0": "", "node.example.com:5051": "", "127.0.0.1:5051": "", "[::1]:22": "", "0.0.0.0:5051": "",
		"169.254.169.254:80": "", "[fe80::1%eth0]:5051": "", "224.0.0.1:5051": "", "[::ffff:127.0.0.1]:5051": "",
	} {
		if got := peerAddress(given); got != want {
			t.Errorf("%q: %q, want %q", given, got, want)
		}
	}
}

func TestPrefetch(t *testing.T) {
	f := &fleet{nodes: map[string]member{
		"b": {labels: labels.Set{"gpu": "yes", "zone": "1"}}, "a": {labels: labels.Set{"gpu": "yes"}}, "c": {},
	}}
	mirrors := []v1alpha1.Mirror{
		{Registry: "docker.io", Prefetch: []v1alpha1.Prefetch{
			{Images: []string{"library/nginx:1"}},
			{Images: []string{"team/cuda:12"}, NodeSelector: map[string]string{"gpu": "yes"}},
			{Images: []string{"team/none:1"}, NodeSelector: map[string]string{"gpu": "no"}},
		}},
		{Registry: "ghcr.io", Prefetch: []v1alpha1.Prefetch{
			{Images: []string{"x/y@sha256:1", "x/z:2"}, NodeSelector: map[string]string{"gpu": "yes"}},
			{Images: []string{"x/one:1"}, NodeSelector: map[string]string{"zone": "1", "gpu": "yes"}},
			{Images: []string{"x/all:1"}},
		}},
		{Registry: "quay.io"},
	}
	want := []v1alpha1.NodePrefetch{
		{Images: []string{"docker.io/library/nginx:1", "ghcr.io/x/all:1"}},
		{Images: []string{"docker.io/team/cuda:12", "ghcr.io/x/y@sha256:1", "ghcr.io/x/z:2"}, Nodes: []string{"a", "b"}},
		{Images: []string{"ghcr.io/x/one:1"}, Nodes: []string{"b"}},
	}
	got, err := planPrefetch(&v1alpha1.NodeConfiguration{}, &v1alpha1.Spec{Mirrors: mirrors}, f)
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v, -want +got:\n%s", err, diff)
	}
}

// told is what nodes are told.
func (w *world) told() *v1alpha1.NodeConfiguration {
	w.t.Helper()
	m, err := w.kube.CoreV1().ConfigMaps("site").Get(w.t.Context(), NodeConfigMap, metav1.GetOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := v1alpha1.LoadNodeConfiguration(keyNode, []byte(m.Data[keyNode]))
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// wantPrefetch compares what nodes are told to prefetch, and says when it was.
func (w *world) wantPrefetch(want []v1alpha1.NodePrefetch, when string) {
	w.t.Helper()
	if diff := cmp.Diff(want, w.told().Prefetch); diff != "" {
		w.t.Errorf("%s (-want +got):\n%s", when, diff)
	}
}

// TestNodesChange follows labels, and does so at a pace.
func TestNodesChange(t *testing.T) {
	data := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, data, `
  mirrors:
  - registry: docker.io
    prefetch: [{images: [team/cuda:12], nodeSelector: {gpu: "yes"}}]
`)
		api := w.config.Metadata.(*metadatafake.FakeMetadataClient)
		label := func(name, gpu string) {
			t.Helper()
			if err := api.Tracker().Update(nodes, nodeObject(name, map[string]string{"gpu": gpu}), ""); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 3 {
			if err := api.Tracker().Create(nodes, nodeObject(fmt.Sprint("node-", i), nil), ""); err != nil {
				t.Fatal(err)
			}
		}
		label("node-1", "yes")
		var away atomic.Bool
		api.PrependReactor("list", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
			return away.Load(), nil, errors.New("no route to host")
		})
		stop := w.run(w.config)
		time.Sleep(10 * time.Second)
		want := []v1alpha1.NodePrefetch{{Images: []string{"docker.io/team/cuda:12"}, Nodes: []string{"node-1"}}}
		w.wantPrefetch(want, "at first")
		if len(w.told().Mirrors[0].Prefetch) > 0 {
			t.Error("nodes are told twice")
		}
		label("node-2", "yes")
		time.Sleep(fleetInterval + time.Second)
		want[0].Nodes = []string{"node-1", "node-2"}
		w.wantPrefetch(want, "with another node labelled")

		// While nodes cannot be asked about, what is known of them stays.
		away.Store(true)
		label("node-2", "no")
		time.Sleep(5 * fleetInterval)
		w.wantPrefetch(want, "with the API server away")
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}
		stop = w.run(w.config) // a new leader, which knows of no nodes
		time.Sleep(time.Minute)
		w.wantPrefetch(want, "with the API server away from the beginning")
		away.Store(false)
		time.Sleep(3 * fleetInterval)
		want[0].Nodes = []string{"node-1"}
		w.wantPrefetch(want, "with the API server back")
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}
	})
}

// TestLeasesOfNodesThatAreGone are removed, and those of others are not.
func TestLeasesOfNodesThatAreGone(t *testing.T) {
	data := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, data, "  {}\n")
		api := w.config.Metadata.(*metadatafake.FakeMetadataClient)
		if err := api.Tracker().Create(nodes, nodeObject("here", nil), ""); err != nil {
			t.Fatal(err)
		}
		leases := w.kube.CoordinationV1().Leases("site")
		for _, name := range []string{"here", "gone"} {
			if _, err := leases.Create(t.Context(), agentLease(name, "", time.Now()), metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		exists := func(node string) bool {
			_, err := leases.Get(t.Context(), agentLeasePrefix+node, metav1.GetOptions{})
			if err != nil && !apierrors.IsNotFound(err) {
				t.Fatal(err)
			}
			return err == nil
		}
		var conditions atomic.Pointer[metav1.Preconditions]
		w.kube.PrependReactor("delete", "leases", func(a clienttesting.Action) (bool, runtime.Object, error) {
			conditions.Store(a.(clienttesting.DeleteActionImpl).DeleteOptions.Preconditions)
			return false, nil, nil
		})
		stop := w.run(w.config)
		time.Sleep(leaseGrace - time.Minute)
		if !exists("gone") {
			t.Error("removed too early")
		}
		time.Sleep(2 * resyncInterval)
		if exists("gone") || !exists("here") {
			t.Errorf("gone %v, here %v", exists("gone"), exists("here"))
		}
		if c := conditions.Load(); c == nil || c.ResourceVersion == nil || c.UID == nil {
			t.Error("a Lease that was renewed meanwhile would be removed as well")
		}
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}
	})
}
