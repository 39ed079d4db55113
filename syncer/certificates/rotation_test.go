package certificates

import (
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/google/go-cmp/cmp"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

func TestFirstInstall(t *testing.T) {
	w := newWorld(t, 2, 2)
	w.settle()
	secret := w.secret(TLSSecret)
	pair, err := tls.X509KeyPair(secret.Data["tls.crt"], secret.Data["tls.key"])
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{
		"10.0.0.10", "connected-registry", "connected-registry.registry", "connected-registry.registry.svc", "connected-registry.registry.svc.cluster.local",
		"connected-registry-rstorage.registry.svc.cluster.local", "registry.example",
	} {
		if err := pair.Leaf.VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
	ca := w.secret(CASecret)
	if len(ca.Data) != 1 || string(ca.Data["ca.crt"]) != string(w.result.CABundle) || len(w.result.CABundle) == 0 {
		t.Errorf("%s holds %d keys", CASecret, len(ca.Data))
	}
	for _, name := range []string{RootSecret, TLSSecret, CASecret} {
		s := w.secret(name)
		if !metav1.IsControlledBy(s, w.cr) || s.Labels[labelManagedBy] != managedBy {
			t.Errorf("%s belongs to nobody", name)
		}
	}
	for _, c := range w.result.Conditions {
		if c.Status != metav1.ConditionTrue {
			t.Errorf("%s is %s: %s", c.Type, c.Status, c.Message)
		}
	}
	want := &v1alpha1.TrustStatus{Phase: v1alpha1.TrustPhaseStable, Nodes: 2, NodesTrusting: 2, Fingerprints: w.bundle().Fingerprints()}
	got := w.result.Trust.DeepCopy()
	got.Since, got.CANotAfter, got.CertificateNotAfter = nil, nil, nil
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestRotation takes ten rotations in a row through all phases.
func TestRotation(t *testing.T) {
	w := newWorld(t, 3, 2)
	w.settle()
	for i := range 10 {
		before := w.bundle()
		w.rotate(fmt.Sprint(i))
		w.settle()
		if !w.bundle().Without(before).Equal(w.bundle()) || len(w.bundle().Certificates()) != 1 {
			t.Fatalf("rotation %d: the bundle holds %d certificates", i, len(w.bundle().Certificates()))
		}
	}
	for _, reason := range []string{"CAPublished", "CertificateGivenOut", "CARemoved"} {
		if !w.hasEvent(reason) {
			t.Errorf("no event %s", reason)
		}
	}
}

// TestPhases holds every party back in turn and looks at what the status says.
func TestPhases(t *testing.T) {
	w := newWorld(t, 2, 2)
	w.settle()
	old := w.bundle()
	w.rotate("now")
	steps := func() {
		for range 5 {
			w.reconcile()
			w.mustPull()
			w.now = w.now.Add(time.Second)
		}
	}
	check := func(phase v1alpha1.TrustPhase, certificates int) {
		t.Helper()
		steps()
		if got := w.result.Trust.Phase; got != phase || len(w.bundle().Certificates()) != certificates {
			t.Fatalf("phase %s with %d certificates, want %s with %d: %+v", got, len(w.bundle().Certificates()), phase, certificates, w.result.Trust)
		}
	}
	check(v1alpha1.TrustPhaseWaitingForNodes, 2)
	if diff := cmp.Diff([]string{"node-0", "node-1"}, w.result.Trust.NodesWaitedFor); diff != "" {
		t.Error(diff)
	}
	w.acknowledge("node-0")
	check(v1alpha1.TrustPhaseWaitingForNodes, 2)
	if diff := cmp.Diff([]string{"node-1"}, w.result.Trust.NodesWaitedFor); diff != "" {
		t.Error(diff)
	}
	w.acknowledge("node-1")
	check(v1alpha1.TrustPhaseWaitingForReplicas, 2)
	if got := len(w.result.Trust.ReplicasWaitedFor); got != 2 {
		t.Errorf("%d replicas are waited for", got)
	}
	w.deliver(w.replicas[0])
	w.now = w.now.Add(time.Hour) // for a replica that is ready there is no limit
	check(v1alpha1.TrustPhaseWaitingForReplicas, 2)
	w.deliver(w.replicas[1])
	check(v1alpha1.TrustPhaseHolding, 2)
	w.now = w.now.Add(4 * time.Minute)
	check(v1alpha1.TrustPhaseHolding, 2)
	w.now = w.now.Add(time.Minute)
	check(v1alpha1.TrustPhaseStable, 1)
	if w.bundle().Equal(old) {
		t.Error("the old CA stayed")
	}
}

func TestNodeAwayIsPassedAndCatchesUp(t *testing.T) {
	w := newWorld(t, 3, 1)
	w.cr.Spec.TrustDistribution.NodeTimeout = "PT10M"
	w.settle()
	w.nodes["node-1"].away = true
	w.setReady("node-1", false)
	w.rotate("1")
	began := w.now
	for w.result.Trust.Phase != v1alpha1.TrustPhaseHolding {
		w.reconcile()
		w.acknowledge("node-0")
		w.acknowledge("node-2")
		w.deliver(w.replicas[0])
		w.mustPull()
		w.now = w.now.Add(max(w.result.RequeueAfter, time.Second))
	}
	if waited := w.now.Sub(began); waited < 10*time.Minute || waited > 12*time.Minute {
		t.Errorf("waited %s for a node that is away", waited)
	}
	if diff := cmp.Diff([]string{"node-1"}, w.result.Trust.NodesPassed); diff != "" {
		t.Error(diff)
	}
	if !w.hasEvent("NodesPassed") {
		t.Error("no event")
	}
	w.nodes["node-1"].away = false
	w.acknowledge("node-1") // its own watch brings it what is published
	w.settle()
	if got := w.result.Trust; len(got.NodesPassed) != 0 || got.NodesTrusting != 3 {
		t.Errorf("the node came back, but %+v", got)
	}
}

// TestNodeWithoutAgent: a node on which no agent ever runs costs one timeout.
func TestNodeWithoutAgent(t *testing.T) {
	w := newWorld(t, 1, 1)
	w.settle()
	w.setReady("bare", true)
	w.setReady("down", false)
	w.rotate("1")
	w.settle()
	if w.now.Sub(testStart) < 15*time.Minute {
		t.Error("the node was not waited for")
	}
	w.now = w.now.Add(time.Hour)
	w.reconcile()
	if got := w.result.Trust; got.Nodes != 1 || got.NodesTrusting != 1 || got.NodesPassed != nil {
		t.Errorf("%+v", got)
	}
}

// TestNodeSelector: agents run on labelled nodes alone, and no other is waited
// for.
func TestNodeSelector(t *testing.T) {
	w := newWorld(t, 1, 1)
	labelled := map[string]string{"containerd-configured-by": "connected-registry"}
	w.cr.Spec.TrustDistribution.NodeSelector = labelled
	for _, name := range w.nodeNames() {
		n, err := w.client.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		n.Labels = labelled
		if _, err := w.client.CoreV1().Nodes().Update(t.Context(), n, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	w.setReady("bare", true)
	w.settle()
	w.rotate("1")
	w.settle()
	if got := w.now.Sub(testStart); got >= 15*time.Minute {
		t.Errorf("a node without an agent was waited for: %s", got)
	}
	if got := w.result.Trust; got.Nodes != 1 || got.NodesTrusting != 1 {
		t.Errorf("%+v", got)
	}
}

func TestReplicaThatIsDownIsWaitedForUpToATime(t *testing.T) {
	w := newWorld(t, 1, 2)
	w.settle()
	w.replicas[1].down = true
	w.publishEndpoints()
	w.rotate("1")
	w.settle()
	if waited := w.now.Sub(testStart); waited < 15*time.Minute {
		t.Errorf("waited only %s", waited)
	}
}

// TestLeaderKilledAroundEveryWrite kills the leader ahead of and behind every
// single write of an installation and a rotation.
func TestLeaderKilledAroundEveryWrite(t *testing.T) {
	for _, how := range []death{diesBefore, diesAfter} {
		for n := 1; ; n++ {
			w := newWorld(t, 2, 2)
			killed := false
			w.die = func(write int) death {
				if write == n {
					killed = true
					return how
				}
				return lives
			}
			w.settle()
			before := w.bundle()
			w.rotate("1")
			w.settle()
			if w.bundle().Equal(before) || len(w.bundle().Certificates()) != 1 {
				t.Fatalf("killed at write %d: %d certificates at the end", n, len(w.bundle().Certificates()))
			}
			root, err := trust.ParseAuthority(w.secret(RootSecret).Data["tls.crt"], w.secret(RootSecret).Data["tls.key"])
			if err != nil || !root.Bundle().Equal(w.bundle()) {
				t.Fatalf("killed at write %d: nodes trust another CA than the root: %v", n, err)
			}
			if !killed {
				if n < 7 {
					t.Fatalf("there were %d writes only", n)
				}
				break
			}
		}
	}
}

// TestAnyOrder lets everything happen in any order, and checks after each event
// that every node can pull from every replica. Whatever happened, it ends well.
func TestAnyOrder(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 4))
			w := newWorld(t, 3, 2)
			w.settle()
			own := []string{"own-a", "own-b"}
			for i, name := range own {
				w.putSecret(name, ownSecret(t, w.now, i == 0))
			}
			for range 120 {
				w.anything(rnd, own)
				w.mustPull()
			}
			w.die = nil
			for i, name := range own {
				w.putSecret(name, ownSecret(t, w.now, i == 0))
			}
			for _, n := range w.nodes {
				n.away = false
			}
			for _, r := range w.replicas {
				r.down = false
			}
			w.settle()
			if w.cr.Spec.TLS.Source != v1alpha1.TLSSourceSecret && len(w.bundle().Certificates()) != 1 {
				t.Errorf("%d certificates at the end", len(w.bundle().Certificates()))
			}
		})
	}
}

func (w *world) anything(rnd *rand.Rand, own []string) {
	node := w.nodeNames()[rnd.IntN(len(w.nodes))]
	replica := w.replicas[rnd.IntN(len(w.replicas))]
	switch p := rnd.IntN(100); {
	case p < 40:
		w.reconcile()
		w.now = w.now.Add(time.Second)
	case p < 60:
		w.acknowledge(node)
	case p < 75:
		w.deliver(replica)
	case p < 80:
		w.newLeader()
	case p < 84:
		how := death(1 + rnd.IntN(2))
		w.die = func(int) death { w.die = nil; return how }
	case p < 87:
		w.rotate(fmt.Sprint(rnd.Int()))
	case p < 89:
		w.cr.Spec.TLS = v1alpha1.TLS{Source: v1alpha1.TLSSourceSecret, SecretName: own[rnd.IntN(len(own))]}
	case p < 91:
		w.cr.Spec.TLS = v1alpha1.TLS{}
	case p < 93:
		w.putSecret(own[rnd.IntN(len(own))], ownSecret(w.t, w.now, rnd.IntN(2) == 0))
	case p < 94:
		if w.quiet() {
			w.deleteSecret(CASecret)
		}
	case p < 95:
		w.deleteSecret(RootSecret)
	case p < 96:
		w.putSecret(own[rnd.IntN(len(own))], map[string][]byte{"tls.crt": []byte("nonsense")})
	case p < 97:
		for _, name := range w.nodeNames() {
			w.acknowledge(name) // agents take seconds
		}
		w.now = w.now.Add(6 * time.Minute)
	case p < 98:
		w.cr.Status.Trust = nil // somebody wiped it
		w.newLeader()
	default:
		w.cr.Spec.LoginServer = fmt.Sprintf("registry-%d.example", rnd.IntN(3))
	}
}

// ownSecret is an operator's Secret: self-signed, or of a CA of their own.
func ownSecret(t testing.TB, now time.Time, withCA bool) map[string][]byte {
	t.Helper()
	authority, err := trust.NewAuthority(now)
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := authority.Issue([]string{"10.0.0.10", "registry.example"}, now)
	if err != nil {
		t.Fatal(err)
	}
	data := map[string][]byte{corev1.TLSCertKey: cert, corev1.TLSPrivateKeyKey: key}
	if withCA {
		data["ca.crt"] = authority.Bundle().PEM()
	} else {
		data[corev1.TLSCertKey] = append(cert, authority.Bundle().PEM()...)
	}
	return data
}
