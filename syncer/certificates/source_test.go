package certificates

import (
	"bytes"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

func (w *world) condition(kind string) metav1.Condition {
	for _, c := range w.result.Conditions {
		if c.Type == kind {
			return c
		}
	}
	w.t.Fatalf("no condition %s", kind)
	return metav1.Condition{}
}

func (w *world) own(name string) {
	w.cr.Spec.TLS = v1alpha1.TLS{Source: v1alpha1.TLSSourceSecret, SecretName: name}
}

// issuedBy is an operator's Secret without its CA.
func issuedBy(t testing.TB, a *trust.Authority, now time.Time, hosts ...string) map[string][]byte {
	t.Helper()
	cert, key, err := a.Issue(hosts, now)
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{corev1.TLSCertKey: cert, corev1.TLSPrivateKeyKey: key}
}

func newAuthority(t testing.TB, now time.Time) *trust.Authority {
	t.Helper()
	a, err := trust.NewAuthority(now)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestOwnSecretAtFault: whatever is wrong with the operator's Secret is said,
// and what is served stays.
func TestOwnSecretAtFault(t *testing.T) {
	a, other := newAuthority(t, testStart), newAuthority(t, testStart)
	good := issuedBy(t, a, testStart, "10.0.0.10", "registry.example")
	_, caKey, err := a.PEM()
	if err != nil {
		t.Fatal(err)
	}
	plus := func(key string, data []byte) map[string][]byte {
		m := map[string][]byte{key: data}
		for k, v := range good {
			if k != key {
				m[k] = v
			}
		}
		return m
	}
	tests := map[string]struct {
		data map[string][]byte
		want []string
	}{
		"not there":       {nil, []string{"SecretMissing", "create it"}},
		"empty":           {map[string][]byte{}, []string{"SecretInvalid", "tls.crt or tls.key is missing"}},
		"no CA":           {good, []string{"SecretInvalid", "add the CA that issued it as ca.crt"}},
		"another CA":      {plus("ca.crt", other.Bundle().PEM()), []string{"SecretInvalid", "does not verify under ca.crt"}},
		"a key as CA":     {plus("ca.crt", caKey), []string{"SecretInvalid", "ca.crt: contains a private key"}},
		"garbage as CA":   {plus("ca.crt", []byte("x")), []string{"SecretInvalid", "ca.crt: "}},
		"another key":     {plus("tls.key", caKey), []string{"SecretInvalid", "no pair"}},
		"expired":         {ownSecret(t, testStart.AddDate(-5, 0, 0), true), []string{"SecretInvalid", "expired on 20"}},
		"garbage as cert": {plus("tls.crt", []byte("x")), []string{"SecretInvalid", "no pair"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, 1)
			w.settle()
			before := w.secret(TLSSecret).Data
			if tt.data != nil {
				w.putSecret("own", tt.data)
			}
			w.own("own")
			for range 3 {
				w.reconcile()
			}
			c := w.condition(ConditionCertificateReady)
			told := c.Reason + ": " + c.Message
			for _, want := range append(tt.want, "what was served stays") {
				if !strings.Contains(told, want) {
					t.Errorf("%q lacks %q", told, want)
				}
			}
			if c.Status != metav1.ConditionFalse || !bytes.Equal(before["tls.crt"], w.secret(TLSSecret).Data["tls.crt"]) {
				t.Errorf("%s; or something else is served", c.Status)
			}
			if got := len(w.bundle().Certificates()); got != 1 {
				t.Errorf("%d certificates are published", got)
			}
			n := 0
			for _, e := range w.events {
				if e.Warning {
					n++
				}
				if strings.Contains(e.Message, "PRIVATE KEY-") {
					t.Error("an event shows a key")
				}
			}
			if n != 1 {
				t.Errorf("%d warnings, want one for the same fault", n)
			}
			// Put right, it goes through.
			w.putSecret("own", plus("ca.crt", a.Bundle().PEM()))
			w.settle()
			if !w.bundle().Equal(a.Bundle()) || w.condition(ConditionCertificateReady).Status != metav1.ConditionTrue {
				t.Error("nothing came of the good Secret")
			}
		})
	}
}

// TestPublicCA needs nothing published, and takes back what was.
func TestPublicCA(t *testing.T) {
	w := newWorld(t, 2, 2)
	w.putSecret("own", issuedBy(t, publicCA, testStart, "10.0.0.10", "registry.example"))
	w.own("own")
	w.settle()
	if w.secret(CASecret) != nil || w.result.CABundle != nil {
		t.Error("a CA was published that every node has")
	}
	if c := w.condition(ConditionCertificateReady); c.Status != metav1.ConditionTrue {
		t.Error(c.Message)
	}
	w.cr.Spec.TLS = v1alpha1.TLS{}
	w.settle()
	if len(w.bundle().Certificates()) != 1 {
		t.Error("the built-in CA was not published")
	}
	w.own("own")
	w.settle()
	if w.secret(CASecret) != nil {
		t.Error("the built-in CA stays published")
	}
}

// TestNamesMissing: a certificate that clients will refuse is served, since
// nobody knows better than the operator, and reported.
func TestNamesMissing(t *testing.T) {
	w := newWorld(t, 1, 1)
	a := newAuthority(t, testStart)
	data := issuedBy(t, a, testStart, "registry.example")
	data["ca.crt"] = a.Bundle().PEM()
	w.putSecret("own", data)
	w.own("own")
	w.settle()
	if c := w.condition(ConditionCertificateReady); c.Reason != "NamesMissing" || !strings.Contains(c.Message, "10.0.0.10") || strings.Contains(c.Message, "registry.example") {
		t.Errorf("%s: %s", c.Reason, c.Message)
	}
}

// TestDirect: a Secret that replicas mount themselves is never written, and both
// CAs are published as soon as it changes.
func TestDirect(t *testing.T) {
	w := newWorld(t, 1, 1)
	first, second := ownSecret(t, testStart, true), ownSecret(t, testStart, true)
	w.putSecret(TLSSecret, first)
	w.own(TLSSecret)
	w.settle()
	w.putSecret(TLSSecret, second)
	w.reconcile()
	if len(w.bundle().Certificates()) != 2 {
		t.Error("the new CA is not out")
	}
	w.settle()
	secret := w.secret(TLSSecret)
	if !bytes.Equal(secret.Data["tls.crt"], second["tls.crt"]) || len(secret.OwnerReferences) != 0 {
		t.Error("the operator's Secret was written to")
	}
	if string(w.bundle().PEM()) != string(second["ca.crt"]) {
		t.Error("the old CA stays")
	}
}

func TestForeignSecretIsLeftAlone(t *testing.T) {
	w := newWorld(t, 1, 1)
	w.putSecret(TLSSecret, ownSecret(t, testStart, true))
	for range 5 {
		w.reconcile()
	}
	if c := w.condition(ConditionCertificateReady); c.Reason != "SecretForeign" {
		t.Errorf("%s: %s", c.Reason, c.Message)
	}
	if w.secret(TLSSecret).Labels != nil {
		t.Error("it was written to")
	}
}

func TestUnusableRootIsNotReplaced(t *testing.T) {
	w := newWorld(t, 1, 1)
	w.settle()
	before := w.bundle()
	w.putSecret(RootSecret, map[string][]byte{"tls.crt": []byte("x")})
	for range 3 {
		w.reconcile()
	}
	if c := w.condition(ConditionCertificateReady); c.Reason != "RootUnusable" || !strings.Contains(c.Message, "delete the secret") {
		t.Errorf("%s: %s", c.Reason, c.Message)
	}
	w.deleteSecret(RootSecret)
	w.settle()
	if w.bundle().Equal(before) {
		t.Error("there is no new CA")
	}
}

// TestTenYears lets time go by: certificates are renewed in time, and the CA
// gives way to another, with every pull on the way.
func TestTenYears(t *testing.T) {
	w := newWorld(t, 2, 2)
	w.settle()
	first := w.bundle()
	leaves := map[string]bool{}
	for w.now.Before(testStart.AddDate(10, 0, 0)) {
		w.now = w.now.AddDate(0, 2, 0)
		w.settle()
		leaves[string(w.secret(TLSSecret).Data["tls.crt"])] = true
		if left := w.result.Trust.CertificateNotAfter.Sub(w.now); left < 200*24*time.Hour {
			t.Fatalf("only %s left", left)
		}
	}
	if n := len(leaves); n < 6 || n > 12 {
		t.Errorf("%d certificates in ten years", n)
	}
	if w.bundle().Equal(first) {
		t.Error("the CA is the same after ten years")
	}
}

func TestPlainHTTP(t *testing.T) {
	w := newWorld(t, 1, 1)
	w.cr.Spec.TLS.Disabled = true
	w.reconcile()
	if w.result.Trust.Phase != v1alpha1.TrustPhaseDisabled || w.secret(RootSecret) != nil {
		t.Error("certificates were made for plain HTTP")
	}
}

// TestNodesByHand: without agents the overlap lasts as long as nodes would be
// waited for, ahead of the new certificate.
func TestNodesByHand(t *testing.T) {
	w := newWorld(t, 1, 1)
	w.cr.Spec.TrustDistribution.Disabled = true
	w.settle()
	old := w.secret(TLSSecret).Data["tls.crt"]
	w.rotate("1")
	began := w.now
	for bytes.Equal(old, w.secret(TLSSecret).Data["tls.crt"]) {
		w.reconcile()
		w.now = w.now.Add(w.result.RequeueAfter)
	}
	// A second is what a timestamp may be off.
	if waited := w.now.Sub(began); waited < 15*time.Minute-time.Second || waited > 16*time.Minute {
		t.Errorf("nodes had %s", waited)
	}
}

// TestCertManagerMissing: without cert-manager it is said so, and asked for less
// and less often; what is under way goes on.
func TestCertManagerMissing(t *testing.T) {
	w := newWorld(t, 1, 1)
	w.settle()
	before := w.bundle()
	w.cr.Spec.TLS.Source = v1alpha1.TLSSourceCertManager
	var waits []time.Duration
	for range 8 {
		w.reconcile()
		waits = append(waits, w.result.RequeueAfter)
		w.now = w.now.Add(w.result.RequeueAfter)
		if c := w.condition(ConditionCertificateReady); c.Reason != "CertManagerMissing" {
			t.Fatalf("%s: %s", c.Reason, c.Message)
		}
	}
	if waits[0] > 5*time.Second || waits[7] != time.Minute {
		t.Errorf("asked again after %v", waits)
	}
	// As if cert-manager had issued before it went away.
	a := newAuthority(t, w.now)
	cert, key, err := a.PEM()
	if err != nil {
		t.Fatal(err)
	}
	w.putMarked(RootSecret, rootCertificate, map[string][]byte{"tls.crt": cert, "tls.key": key})
	w.putMarked(IssuedSecret, issuedCertificate, issuedBy(t, a, w.now, hosts(testService, testNamespace, "cluster.local", w.cr.Spec.LoginServer)...))
	w.settle()
	if w.bundle().Equal(before) || !w.bundle().Equal(a.Bundle()) {
		t.Error("nothing came of what cert-manager issued")
	}
	for _, name := range []string{RootSecret, IssuedSecret} {
		if refs := w.secret(name).OwnerReferences; len(refs) != 1 || refs[0].UID != w.cr.UID || refs[0].Controller != nil {
			t.Errorf("%s would be left behind: %v", name, refs)
		}
	}
	// A root that changes has the serving certificate issued again.
	b := newAuthority(t, w.now)
	if cert, key, err = b.PEM(); err != nil {
		t.Fatal(err)
	}
	w.now = w.now.Add(reissueWait)
	w.putMarked(RootSecret, rootCertificate, map[string][]byte{"tls.crt": cert, "tls.key": key})
	for range 5 {
		w.reconcile()
	}
	if w.secret(IssuedSecret) != nil {
		t.Error("cert-manager was not made to issue again")
	}
	// And back: what cert-manager holds is taken over.
	w.cr.Spec.TLS.Source = v1alpha1.TLSSourceBuiltIn
	w.settle()
	if refs := w.secret(RootSecret).OwnerReferences; len(refs) != 1 || refs[0].Controller == nil {
		t.Errorf("owners of the CA that was taken over: %v", refs)
	}
	if root := w.secret(RootSecret); certManagerMade(root) || len(w.bundle().Certificates()) != 1 || w.bundle().Equal(b.Bundle()) {
		t.Error("cert-manager's CA stays")
	}
	deleted := 0
	for _, a := range w.dynamic.Actions() {
		if a.GetVerb() == "delete" && a.GetResource().GroupVersion() == (schema.GroupVersion{Group: "cert-manager.io", Version: "v1"}) {
			deleted++
		}
	}
	if deleted != 4 {
		t.Errorf("%d of cert-manager's objects were deleted", deleted)
	}
}

// putMarked is a Secret as cert-manager writes it.
func (w *world) putMarked(name, certificate string, data map[string][]byte) {
	w.putSecret(name, data)
	secret := w.secret(name)
	secret.Annotations = map[string]string{annotationCertificate: certificate}
	if err := w.client.Tracker().Update(corev1.SchemeGroupVersion.WithResource("secrets"), secret, testNamespace); err != nil {
		w.t.Fatal(err)
	}
}
