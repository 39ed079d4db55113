package certificates

import (
	"crypto/tls"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

// ca is an authority with a certificate of its own.
type ca struct {
	roots trust.Bundle
	pair  *pair
}

func newCA(t *testing.T) ca {
	t.Helper()
	a := newAuthority(t, testStart)
	data := issuedBy(t, a, testStart, "10.0.0.10")
	p, err := parsePair(data["tls.crt"], data["tls.key"])
	if err != nil {
		t.Fatal(err)
	}
	return ca{a.Bundle(), p}
}

func nodeTrusting(name string, b trust.Bundle) node {
	n := node{name: name, ready: true, agent: true, fingerprints: map[string]bool{}}
	for _, f := range b.Fingerprints() {
		n.fingerprints[f] = true
	}
	return n
}

func TestPlan(t *testing.T) {
	one, two, three := newCA(t), newCA(t), newCA(t)
	both := one.roots.Union(two.roots)
	next := func(c ca) func() (*pair, error) { return func() (*pair, error) { return c.pair, nil } }
	since := func(phase v1alpha1.TrustPhase, ago time.Duration) v1alpha1.TrustStatus {
		return v1alpha1.TrustStatus{
			Phase: phase, Since: timestamp(testStart.Add(-ago)),
			Fingerprints: two.roots.Fingerprints(), OldFingerprints: one.roots.Fingerprints(),
		}
	}
	rotating := observed{
		offer: offer{roots: two.roots, next: next(two)}, served: one.pair, servedRoots: one.roots, published: both,
		nodes: []node{nodeTrusting("a", both), nodeTrusting("b", both)},
	}
	switched := rotating
	switched.offer.next, switched.served, switched.servedRoots = nil, two.pair, two.roots
	switched.replicas = []replica{{address: "x", ready: true}, {address: "y", ready: true}}
	with := func(o observed, change func(*observed)) observed {
		change(&o)
		return o
	}
	tests := map[string]struct {
		o     observed
		do    action
		phase v1alpha1.TrustPhase
		out   trust.Bundle
	}{
		"first: publish": {
			observed{offer: offer{roots: one.roots, next: next(one)}}, doPublish, v1alpha1.TrustPhasePending, one.roots,
		},
		"first: serve, waiting for nobody": {
			observed{offer: offer{roots: one.roots, next: next(one)}, published: one.roots, nodes: []node{{name: "a", ready: true}}},
			doServe, v1alpha1.TrustPhaseStable, trust.Bundle{},
		},
		"at rest": {
			observed{offer: offer{roots: one.roots}, published: one.roots, served: one.pair, servedRoots: one.roots},
			doNothing, v1alpha1.TrustPhaseStable, trust.Bundle{},
		},
		"renewal under the same CA": {
			observed{offer: offer{roots: one.roots, next: next(one)}, published: one.roots, served: one.pair, nodes: []node{{name: "a", ready: true}}},
			doServe, v1alpha1.TrustPhaseStable, trust.Bundle{},
		},
		"the published CAs were lost": {
			observed{offer: offer{roots: one.roots}, served: one.pair, servedRoots: one.roots},
			doPublish, v1alpha1.TrustPhaseStable, one.roots,
		},
		"they were lost, and the source is at fault": {
			observed{offer: offer{fault: &fault{}}, served: one.pair, servedRoots: one.roots},
			doPublish, v1alpha1.TrustPhasePending, one.roots,
		},
		"they were lost while nodes were waited for": {
			with(rotating, func(o *observed) { o.published = trust.Bundle{} }),
			doPublish, v1alpha1.TrustPhaseWaitingForNodes, both,
		},
		"something else lies beside them": {
			observed{offer: offer{roots: one.roots}, published: one.roots, untidy: true, served: one.pair, servedRoots: one.roots},
			doPublish, v1alpha1.TrustPhaseStable, one.roots,
		},
		"the union goes out": {
			with(rotating, func(o *observed) { o.published = one.roots }),
			doPublish, v1alpha1.TrustPhaseWaitingForNodes, both,
		},
		"a third CA comes in between": {
			with(rotating, func(o *observed) { o.offer.roots = three.roots }),
			doPublish, v1alpha1.TrustPhaseWaitingForNodes, both.Union(three.roots),
		},
		"a node is late": {
			with(rotating, func(o *observed) { o.nodes = append(slices.Clone(o.nodes), nodeTrusting("c", one.roots)) }),
			doNothing, v1alpha1.TrustPhaseWaitingForNodes, trust.Bundle{},
		},
		"a node is too late": {
			with(rotating, func(o *observed) {
				o.nodes = append(slices.Clone(o.nodes), nodeTrusting("c", one.roots))
				o.previous = since(v1alpha1.TrustPhaseWaitingForNodes, 15*time.Minute)
			}),
			doServe, v1alpha1.TrustPhaseWaitingForReplicas, trust.Bundle{},
		},
		"its time began with another CA": {
			with(rotating, func(o *observed) {
				o.nodes = append(slices.Clone(o.nodes), nodeTrusting("c", one.roots))
				o.previous = since(v1alpha1.TrustPhaseWaitingForNodes, 15*time.Minute)
				o.previous.Fingerprints = three.roots.Fingerprints()
			}),
			doNothing, v1alpha1.TrustPhaseWaitingForNodes, trust.Bundle{},
		},
		"every node is there": {rotating, doServe, v1alpha1.TrustPhaseWaitingForReplicas, trust.Bundle{}},
		"but the certificate is not": {
			with(rotating, func(o *observed) { o.offer.next, o.offer.awaiting = nil, "waiting" }),
			doNothing, v1alpha1.TrustPhaseWaitingForNodes, trust.Bundle{},
		},
		"what is served has expired": {
			with(rotating, func(o *observed) {
				o.now = testStart.AddDate(3, 0, 0)
				o.nodes = append(slices.Clone(o.nodes), nodeTrusting("c", one.roots))
			}),
			doServe, v1alpha1.TrustPhaseWaitingForReplicas, trust.Bundle{},
		},
		"nothing is in the Secret, but replicas may serve it still": {
			with(rotating, func(o *observed) {
				o.served, o.servedRoots = nil, trust.Bundle{}
				o.nodes = append(slices.Clone(o.nodes), nodeTrusting("c", one.roots))
			}),
			doNothing, v1alpha1.TrustPhaseWaitingForNodes, trust.Bundle{},
		},
		"a replica is late": {
			with(switched, func(o *observed) {
				o.replicas = []replica{{address: "x", ready: true, fault: "old"}}
				o.previous = since(v1alpha1.TrustPhaseWaitingForReplicas, 100*time.Hour)
			}),
			doNothing, v1alpha1.TrustPhaseWaitingForReplicas, trust.Bundle{},
		},
		"a replica is down": {
			with(switched, func(o *observed) {
				o.replicas = []replica{{address: "x", fault: "refused"}}
				o.previous = since(v1alpha1.TrustPhaseWaitingForReplicas, 10*time.Minute)
			}),
			doNothing, v1alpha1.TrustPhaseWaitingForReplicas, trust.Bundle{},
		},
		"a replica is down for long": {
			with(switched, func(o *observed) {
				o.replicas = []replica{{address: "x", fault: "refused"}}
				o.previous = since(v1alpha1.TrustPhaseWaitingForReplicas, 15*time.Minute)
			}),
			doNothing, v1alpha1.TrustPhaseHolding, trust.Bundle{},
		},
		"no replica runs": {
			with(switched, func(o *observed) { o.replicas = nil }),
			doNothing, v1alpha1.TrustPhaseWaitingForReplicas, trust.Bundle{},
		},
		"replicas serve it": {switched, doNothing, v1alpha1.TrustPhaseHolding, trust.Bundle{}},
		"held": {
			with(switched, func(o *observed) { o.previous = since(v1alpha1.TrustPhaseHolding, 5*time.Minute) }),
			doPublish, v1alpha1.TrustPhaseStable, two.roots,
		},
		"held, but a replica fell back": {
			with(switched, func(o *observed) {
				o.replicas = []replica{{address: "x", ready: true, fault: "old"}}
				o.previous = since(v1alpha1.TrustPhaseHolding, 5*time.Minute)
			}),
			doNothing, v1alpha1.TrustPhaseWaitingForReplicas, trust.Bundle{},
		},
		"the operator went back": {
			observed{offer: offer{roots: one.roots}, served: one.pair, servedRoots: one.roots, published: both, replicas: switched.replicas},
			doNothing, v1alpha1.TrustPhaseHolding, trust.Bundle{},
		},
		"a fault keeps the phase": {
			observed{offer: offer{fault: &fault{message: "m"}}, served: one.pair, servedRoots: one.roots, published: both, previous: since(v1alpha1.TrustPhaseHolding, time.Hour)},
			doNothing, v1alpha1.TrustPhaseHolding, trust.Bundle{},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if tt.o.now.IsZero() {
				tt.o.now = testStart
			}
			tt.o.nodeTimeout, tt.o.hold = 15*time.Minute, 5*time.Minute
			got := plan(tt.o)
			if got.do != tt.do || got.status.Phase != tt.phase || !got.bundle.Equal(tt.out) {
				t.Errorf("%q in %s with %d certificates, want %q in %s with %d", got.do, got.status.Phase, len(got.bundle.Certificates()), tt.do, tt.phase, len(tt.out.Certificates()))
			}
		})
	}
}

// TestUnionIsBounded: agents refuse a bundle without end.
func TestUnionIsBounded(t *testing.T) {
	o := observed{now: testStart}
	for range maxOverlapped {
		o.published = o.published.Union(newAuthority(t, testStart).Bundle())
	}
	c, served := newCA(t), newCA(t)
	o.offer.roots, o.served, o.servedRoots = c.roots, served.pair, served.roots
	if got := o.union(); !got.Equal(c.roots.Union(served.roots)) {
		t.Errorf("%d certificates", len(got.Certificates()))
	}
}

func TestJoinNodes(t *testing.T) {
	object := func(name string, labels map[string]string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Name: name, Labels: labels}
	}
	ready := corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}}
	nodes := []corev1.Node{
		{ObjectMeta: object("a", map[string]string{"kubernetes.io/os": "linux"}), Status: ready},
		{ObjectMeta: object("b", nil)},
		{ObjectMeta: object("windows", map[string]string{"kubernetes.io/os": "windows"}), Status: ready},
		{ObjectMeta: object("virtual", map[string]string{"type": "virtual-kubelet"}), Status: ready},
	}
	leases := []coordinationv1.Lease{
		{ObjectMeta: metav1.ObjectMeta{Name: "connected-registry-node-a", Annotations: map[string]string{annotationFingerprints: "11,22"}}},
		{ObjectMeta: metav1.ObjectMeta{Name: "connected-registry-node-gone"}},
		{ObjectMeta: metav1.ObjectMeta{Name: "something-else"}},
	}
	want := []node{
		{name: "a", ready: true, agent: true, fingerprints: map[string]bool{"11": true, "22": true}},
		{name: "b"},
	}
	if diff := cmp.Diff(want, joinNodes(nodes, leases), cmp.AllowUnexported(node{})); diff != "" {
		t.Error(diff)
	}
}

func TestEndpoints(t *testing.T) {
	https, other, yes, no := "https", "metrics", true, false
	port, another := int32(8443), int32(9000)
	slices := []discoveryv1.EndpointSlice{
		{
			Ports: []discoveryv1.EndpointPort{{Name: &other, Port: &another}, {Name: &https, Port: &port}},
			Endpoints: []discoveryv1.Endpoint{
				{Addresses: []string{"10.1.0.1"}},
				{Addresses: []string{"10.1.0.2"}, Conditions: discoveryv1.EndpointConditions{Ready: &no}},
				{Addresses: []string{"10.1.0.3"}, Conditions: discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}},
			},
		},
		{
			Ports:     []discoveryv1.EndpointPort{{Name: &https, Port: &port}},
			Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"fd00::1"}, Conditions: discoveryv1.EndpointConditions{Ready: &yes}}},
		},
		{Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.1.0.9"}}}},
	}
	want := []replica{{address: "10.1.0.1:8443", ready: true}, {address: "10.1.0.2:8443"}, {address: "[fd00::1]:8443", ready: true}}
	if diff := cmp.Diff(want, endpoints(slices, "https"), cmp.AllowUnexported(replica{})); diff != "" {
		t.Error(diff)
	}
	if got := endpoints(slices, ""); len(got) != 1 {
		t.Errorf("without the port's name: %+v", got)
	}
}

// TestProbe asks real servers that do not serve what they should.
func TestProbe(t *testing.T) {
	w := newWorld(t, 1, 3)
	w.settle()
	want, roots := served(w.secret(TLSSecret), w.now)
	stale, other := newCA(t), w.replicas[1]
	cert, err := tls.X509KeyPair(stale.pair.cert, stale.pair.key)
	if err != nil {
		t.Fatal(err)
	}
	other.pair.Store(&cert)
	w.replicas[2].pair.Store(nil)
	call := &run{Config: w.leader.config, memory: &memory{}, cr: w.cr, service: testService, now: w.now}
	got, err := call.probe(t.Context(), observed{served: want, offer: offer{roots: roots}})
	if err != nil {
		t.Fatal(err)
	}
	faults := map[string]string{}
	for _, r := range got {
		faults[r.address] = r.fault
	}
	for i, part := range []string{"", "another certificate", "handshake"} {
		if f := faults[w.replicas[i].addr.String()]; !strings.Contains(f, part) || part == "" && f != "" {
			t.Errorf("replica %d: %q", i, f)
		}
	}
	// The certificate is the right one, but under a CA that is not to come.
	got, err = call.probe(t.Context(), observed{served: want, offer: offer{roots: stale.roots}})
	if err != nil || !strings.Contains(got[0].fault, "does not verify") {
		t.Errorf("%+v %v", got, err)
	}
}

func TestHosts(t *testing.T) {
	s := Service{Name: "connected-registry", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.0.0.10"), netip.MustParseAddr("fd00::10")}}
	want := []string{
		"10.0.0.10", "fd00::10",
		"connected-registry", "connected-registry.ns", "connected-registry.ns.svc", "connected-registry.ns.svc.example.org",
		"connected-registry-rstorage", "connected-registry-rstorage.ns", "connected-registry-rstorage.ns.svc", "connected-registry-rstorage.ns.svc.example.org",
	}
	for login, host := range map[string]string{"": "", "Registry.Example:8443": "registry.example", "[fd00::20]:5000": "fd00::20", "10.9.9.9": "10.9.9.9"} {
		expected := slices.Clone(want)
		if host != "" {
			expected = append(expected, host)
		}
		if diff := cmp.Diff(expected, hosts(s, "ns", "example.org", login)); diff != "" {
			t.Errorf("%q: %s", login, diff)
		}
		if _, _, err := newAuthority(t, testStart).Issue(expected, testStart); err != nil {
			t.Error(err)
		}
	}
}
