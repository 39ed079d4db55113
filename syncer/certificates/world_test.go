package certificates

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

// publicCA is what the system trusts in these tests.
var publicCA *trust.Authority

func TestMain(m *testing.M) {
	if err := trustOnly(&publicCA); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// trustOnly makes a CA the only one in the system's store, which is read once
// and then kept.
func trustOnly(ca **trust.Authority) error {
	authority, err := trust.NewAuthority(testStart)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "certificates-test-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "roots.pem")
	err = errors.Join(os.WriteFile(file, authority.Bundle().PEM(), 0o600), os.Setenv("SSL_CERT_FILE", file), os.Setenv("SSL_CERT_DIR", dir))
	if err != nil {
		return err
	}
	*ca = authority
	_, err = x509.SystemCertPool()
	return err
}

const testNamespace = "registry"

var (
	testStart   = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	testService = Service{Name: "connected-registry", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.0.0.10")}}
)

// world is a cluster whose agents and kubelets do their part when told to.
type world struct {
	t        testing.TB
	client   *fake.Clientset
	dynamic  *dynamicfake.FakeDynamicClient
	now      time.Time
	cr       *v1alpha1.ConnectedRegistry
	leader   *Reconciler
	result   Result
	events   []Event
	nodes    map[string]*testNode
	replicas []*testReplica
	// writes counts what the leader wrote; die, if set, is called ahead of each
	// write and says how it ends the leader.
	writes int
	die    func(write int) death
	// verified holds until when a chain may be taken to verify.
	verified map[verified]time.Time
}

type death int

const (
	lives death = iota
	diesBefore
	diesAfter
)

var errKilled = errors.New("the leader was killed")

// testNode is a node: what its containerd trusts, and whether its agent works.
type testNode struct {
	trusts trust.Bundle
	away   bool
}

// testReplica serves what its kubelet last delivered, over real TLS.
type testReplica struct {
	addr netip.AddrPort
	pair atomic.Pointer[tls.Certificate]
	down bool
}

func newWorld(t testing.TB, nodes, replicas int) *world {
	w := &world{
		t: t, now: testStart, nodes: map[string]*testNode{}, verified: map[verified]time.Time{},
		// The newer one tracks the fields of every writer, at ten times the cost.
		client:  fake.NewSimpleClientset(),
		dynamic: dynamicfake.NewSimpleDynamicClient(runtime.NewScheme()),
		cr: &v1alpha1.ConnectedRegistry{
			ObjectMeta: metav1.ObjectMeta{Name: "connected-registry", Namespace: testNamespace, UID: "1", Annotations: map[string]string{}},
			Spec:       v1alpha1.Spec{LoginServer: "registry.example:8443"},
		},
	}
	for _, verb := range []string{"create", "update", "delete"} {
		w.client.PrependReactor(verb, "secrets", w.react)
	}
	w.newLeader()
	for i := range nodes {
		w.addNode(fmt.Sprintf("node-%d", i))
	}
	for range replicas {
		w.addReplica()
	}
	return w
}

// react ends the leader around a write. The tracker does the write itself, so
// that a death after it leaves it done.
func (w *world) react(action k8stesting.Action) (bool, runtime.Object, error) {
	if w.die == nil {
		return false, nil, nil
	}
	w.writes++
	switch w.die(w.writes) {
	case diesBefore:
		return true, nil, errKilled
	case diesAfter:
		w.apply(action)
		return true, nil, errKilled
	}
	return false, nil, nil
}

func (w *world) apply(action k8stesting.Action) {
	var err error
	switch a := action.(type) {
	case k8stesting.CreateActionImpl:
		err = w.client.Tracker().Create(a.Resource, a.Object, a.Namespace)
	case k8stesting.UpdateActionImpl:
		err = w.client.Tracker().Update(a.Resource, a.Object, a.Namespace)
	case k8stesting.DeleteActionImpl:
		err = w.client.Tracker().Delete(a.Resource, a.Namespace, a.Name)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) newLeader() {
	r, err := New(Config{Client: w.client, Dynamic: w.dynamic, Now: func() time.Time { return w.now }})
	if err != nil {
		w.t.Fatal(err)
	}
	w.leader = r
}

func (w *world) addNode(name string) {
	w.nodes[name] = &testNode{}
	w.setReady(name, true)
}

func (w *world) setReady(name string, ready bool) {
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}}}}
	nodes := w.client.CoreV1().Nodes()
	_, err := nodes.Create(w.t.Context(), n, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = nodes.Update(w.t.Context(), n, metav1.UpdateOptions{})
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) addReplica() *testReplica {
	r := &testReplica{}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		if p := r.pair.Load(); p != nil {
			return p, nil
		}
		return nil, errors.New("not started")
	}})
	if err != nil {
		w.t.Fatal(err)
	}
	r.addr = netip.MustParseAddrPort(l.Addr().String())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			_ = conn.(*tls.Conn).Handshake()
			_ = conn.Close()
		}
	}()
	w.t.Cleanup(func() { _ = l.Close(); <-done })
	w.replicas = append(w.replicas, r)
	w.publishEndpoints()
	return r
}

// publishEndpoints keeps one EndpointSlice for each replica, since each has a
// port of its own.
func (w *world) publishEndpoints() {
	for i, r := range w.replicas {
		port, ready := int32(r.addr.Port()), r.pair.Load() != nil && !r.down
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("slice-%d", i), Namespace: testNamespace, Labels: map[string]string{discoveryv1.LabelServiceName: testService.Name}},
			Ports:      []discoveryv1.EndpointPort{{Port: &port}},
			Endpoints:  []discoveryv1.Endpoint{{Addresses: []string{r.addr.Addr().String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}},
		}
		slices := w.client.DiscoveryV1().EndpointSlices(testNamespace)
		_, err := slices.Create(w.t.Context(), slice, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			_, err = slices.Update(w.t.Context(), slice, metav1.UpdateOptions{})
		}
		if err != nil {
			w.t.Fatal(err)
		}
	}
}

// reconcile calls the leader, replacing it when it was killed, and keeps its
// status unless it was.
func (w *world) reconcile() {
	w.t.Helper()
	result, err := w.leader.Reconcile(w.t.Context(), w.cr, testService)
	if errors.Is(err, errKilled) {
		w.newLeader()
		w.result = Result{}
		return
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.result = result
	w.cr.Status.Trust = result.Trust.DeepCopy()
	w.events = append(w.events, result.Events...)
}

// deliver is the kubelet's part: the replica gets what the Secret holds.
func (w *world) deliver(r *testReplica) {
	secret := w.secret(TLSSecret)
	if secret == nil || r.down {
		return
	}
	pair, err := tls.X509KeyPair(secret.Data["tls.crt"], secret.Data["tls.key"])
	if err != nil {
		w.t.Fatal(err)
	}
	r.pair.Store(&pair)
	w.publishEndpoints()
}

// acknowledge is the agent's part.
func (w *world) acknowledge(name string) {
	n := w.nodes[name]
	if n.away {
		return
	}
	if secret := w.secret(CASecret); secret != nil {
		b, _, err := trust.ParseBundle(secret.Data["ca.crt"], w.now)
		if err != nil {
			w.t.Fatal(err)
		}
		n.trusts = b
	}
	w.writeLease(name, n.trusts)
}

func (w *world) writeLease(node string, b trust.Bundle) {
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{
		Name: leasePrefix + node, Namespace: testNamespace, Labels: map[string]string{"app.kubernetes.io/component": "node-agent"},
		Annotations: map[string]string{annotationFingerprints: strings.Join(b.Fingerprints(), ",")},
	}}
	leases := w.client.CoordinationV1().Leases(testNamespace)
	_, err := leases.Create(w.t.Context(), lease, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = leases.Update(w.t.Context(), lease, metav1.UpdateOptions{})
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) secret(name string) *corev1.Secret {
	secret, err := w.client.CoreV1().Secrets(testNamespace).Get(w.t.Context(), name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return secret
}

func (w *world) putSecret(name string, data map[string][]byte) {
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: testNamespace}, Data: data}
	gvr := corev1.SchemeGroupVersion.WithResource("secrets")
	err := w.client.Tracker().Create(gvr, secret, testNamespace)
	if apierrors.IsAlreadyExists(err) {
		err = w.client.Tracker().Update(gvr, secret, testNamespace)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) deleteSecret(name string) {
	err := w.client.Tracker().Delete(corev1.SchemeGroupVersion.WithResource("secrets"), testNamespace, name)
	if err != nil && !apierrors.IsNotFound(err) {
		w.t.Fatal(err)
	}
}

// settle lets everybody do their part until nothing moves any more.
func (w *world) settle() {
	w.t.Helper()
	for range 500 {
		w.reconcile()
		w.mustPull()
		for _, name := range w.nodeNames() {
			w.acknowledge(name)
		}
		w.mustPull()
		for _, r := range w.replicas {
			w.deliver(r)
		}
		w.mustPull()
		if w.quiet() {
			return
		}
		w.now = w.now.Add(w.result.RequeueAfter)
	}
	w.t.Fatalf("nothing settles: %+v", w.result.Trust)
}

func (w *world) quiet() bool {
	return w.result.Trust != nil && w.result.Trust.Phase == v1alpha1.TrustPhaseStable && w.result.RequeueAfter >= stablePoll
}

func (w *world) nodeNames() []string { return slices.Sorted(maps.Keys(w.nodes)) }

// mustPull is what all of this is for: every node that is not away verifies
// what every replica serves.
func (w *world) mustPull() {
	w.t.Helper()
	for _, name := range w.nodeNames() {
		n := w.nodes[name]
		if n.trusts.Empty() || n.away {
			continue // a node that is new, or not there, pulls nothing
		}
		for i, r := range w.replicas {
			if p := r.pair.Load(); p != nil && !r.down {
				// As containerd does, a node trusts the system's CAs as well.
				if err := w.verify(p, n.trusts); err != nil && w.verify(p, trust.Bundle{}) != nil {
					w.t.Fatalf("%s cannot pull from replica %d in %+v: %v", name, i, w.cr.Status.Trust, err)
				}
			}
		}
	}
}

// verify remembers what verified, since the same is asked again and again.
func (w *world) verify(p *tls.Certificate, roots trust.Bundle) error {
	key := verified{p.Leaf, roots.Fingerprint()}
	if until, ok := w.verified[key]; ok && w.now.Before(until) {
		return nil
	}
	chain := []*x509.Certificate{p.Leaf}
	for _, der := range p.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		chain = append(chain, c)
	}
	if err := verifyChain(chain, roots, w.now); err != nil {
		return err
	}
	w.verified[key] = w.now.AddDate(0, 1, 0)
	return nil
}

type verified struct {
	leaf  *x509.Certificate
	roots string
}

func (w *world) bundle() trust.Bundle {
	secret := w.secret(CASecret)
	if secret == nil {
		return trust.Bundle{}
	}
	b, _, err := trust.ParseBundle(secret.Data["ca.crt"], w.now)
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

func (w *world) hasEvent(reason string) bool {
	return slices.ContainsFunc(w.events, func(e Event) bool { return e.Reason == reason })
}

func (w *world) rotate(value string) { w.cr.Annotations[v1alpha1.AnnotationRotateCA] = value }
