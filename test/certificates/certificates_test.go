package certificates_test

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	core "k8s.io/client-go/applyconfigurations/core/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/syncer/certificates"
	"github.com/connected-registry/connected-registry/trust"
)

// leader is what the controller is to the package under test.
type leader struct {
	*world
	*certificates.Reconciler
	cr     *v1alpha1.ConnectedRegistry
	result certificates.Result
	events []certificates.Event
}

func (l *leader) reconcile(t *testing.T) {
	t.Helper()
	result, err := l.Reconcile(t.Context(), l.cr, certificates.Service{Name: service, ClusterIPs: []netip.Addr{netip.MustParseAddr(address)}})
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		return // somebody was faster: the next call sees it
	}
	if err != nil {
		t.Fatal(err)
	}
	l.result = result
	l.cr.Status.Trust = result.Trust.DeepCopy()
	l.events = append(l.events, result.Events...)
	l.mustHavePulled(t)
}

func (l *leader) condition(kind string) metav1.Condition {
	for _, c := range l.result.Conditions {
		if c.Type == kind {
			return c
		}
	}
	return metav1.Condition{}
}

// until reconciles until the condition holds.
func (l *leader) until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	began := time.Now()
	eventually(t, what, func() error {
		l.reconcile(t)
		if holds() {
			return nil
		}
		return fmt.Errorf("%+v %+v", l.result.Trust, l.result.Conditions)
	})
	t.Logf("%s: after %s and %d pulls", what, time.Since(began).Round(time.Second/10), l.pulls.Load())
}

// changed reports whether a rotation to other CAs than before has ended.
func (l *leader) changed(before string) func() bool {
	return func() bool {
		return l.result.Trust.Phase == v1alpha1.TrustPhaseStable && len(l.result.Trust.OldFingerprints) == 0 &&
			l.condition(certificates.ConditionCertificateReady).Status == metav1.ConditionTrue &&
			string(l.result.CABundle) != before && l.serves()
	}
}

// serves reports whether replicas serve what verifies under what is published.
func (l *leader) serves() bool {
	b, _, err := trust.ParseBundle(l.result.CABundle, time.Now())
	if err != nil {
		return false
	}
	for i := range l.serving {
		p := l.serving[i].Load()
		if p == nil {
			return false
		}
		if _, err := p.Leaf.Verify(x509.VerifyOptions{Roots: b.Pool(), DNSName: address}); err != nil {
			return false
		}
	}
	return true
}

func (l *leader) bundle() string { return string(l.result.CABundle) }

func TestCertificates(t *testing.T) {
	s := newSite(t)
	w := newWorld(t, s)
	r, err := certificates.New(certificates.Config{Client: s.kube, Dynamic: s.objects})
	if err != nil {
		t.Fatal(err)
	}
	spec := v1alpha1.Spec{
		LoginServer:       "registry.example",
		TLS:               v1alpha1.TLS{Source: v1alpha1.TLSSourceCertManager},
		TrustDistribution: v1alpha1.TrustDistribution{Hold: "PT3S"},
	}
	l := &leader{world: w, Reconciler: r, cr: s.create(t, spec)}

	// The resource is there before cert-manager is.
	l.until(t, "cert-manager is missing", func() bool {
		return l.condition(certificates.ConditionCertificateReady).Reason == "CertManagerMissing"
	})
	installed := installCertManager(t, s)
	l.until(t, "cert-manager is there", l.changed(""))
	if err := <-installed; err != nil {
		t.Fatal(err)
	}
	checkIssued(t, s)

	before := l.bundle()
	l.cr.Annotations[v1alpha1.AnnotationRotateCA] = "1"
	l.until(t, "rotated on demand by cert-manager", l.changed(before))

	// cert-manager's own renewal of the root, by the button of its command
	// line: the condition Issuing.
	before = l.bundle()
	renew(t, s, "connected-registry-root")
	l.until(t, "renewed by cert-manager", l.changed(before))

	before = l.bundle()
	l.cr.Spec.TLS.Source = v1alpha1.TLSSourceBuiltIn
	l.until(t, "from cert-manager to the built-in CA", l.changed(before))
	if out := s.kubectl(t, "get", "certificates,issuers", "--namespace="+namespace, "--output=name"); out != "" {
		t.Errorf("left with cert-manager: %s", out)
	}
	for i := range 10 {
		before = l.bundle()
		l.cr.Annotations[v1alpha1.AnnotationRotateCA] = fmt.Sprint("again ", i)
		l.until(t, "rotated on demand", l.changed(before))
	}

	before = l.bundle()
	putOwn(t, s, "own")
	l.cr.Spec.TLS = v1alpha1.TLS{Source: v1alpha1.TLSSourceSecret, SecretName: "own"}
	l.until(t, "from the built-in CA to the operator's certificate", l.changed(before))
	before = l.bundle()
	putOwn(t, s, "own")
	l.until(t, "the operator's certificate was replaced", l.changed(before))

	before = l.bundle()
	l.cr.Spec.TLS = v1alpha1.TLS{Source: v1alpha1.TLSSourceCertManager}
	l.until(t, "back to cert-manager", l.changed(before))
	l.mustHavePulled(t)
}

func installCertManager(t *testing.T, s *site) <-chan error {
	t.Helper()
	if err := s.LoadCertManager(t.Context()); err != nil {
		t.Fatal(err)
	}
	chart, err := s.CertManagerChart(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := s.Helm(t.Context(), "install", "cert-manager", chart, "--namespace=cert-manager", "--create-namespace",
			"--set=crds.enabled=true", "--wait", "--timeout=4m")
		done <- err
	}()
	return done
}

// checkIssued holds what cert-manager issued against what was asked for.
func checkIssued(t *testing.T, s *site) {
	t.Helper()
	root, leaf := certificateOf(t, s, certificates.RootSecret), certificateOf(t, s, certificates.IssuedSecret)
	if life := root.NotAfter.Sub(root.NotBefore); !root.IsCA || life < 3649*24*time.Hour || life > 3651*24*time.Hour {
		t.Errorf("the root: CA %v, valid for %s", root.IsCA, life)
	}
	if life := leaf.NotAfter.Sub(leaf.NotBefore); leaf.IsCA || life < 729*24*time.Hour || life > 731*24*time.Hour {
		t.Errorf("the serving certificate: CA %v, valid for %s", leaf.IsCA, life)
	}
	for _, name := range []string{address, "connected-registry." + namespace + ".svc", "connected-registry-rstorage." + namespace + ".svc.cluster.local", "registry.example"} {
		if err := leaf.VerifyHostname(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{certificates.RootSecret, certificates.IssuedSecret, certificates.TLSSecret, certificates.CASecret} {
		secret, err := s.kube.CoreV1().Secrets(namespace).Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(secret.OwnerReferences) != 1 || secret.OwnerReferences[0].Kind != v1alpha1.Kind {
			t.Errorf("%s would be left behind: %v", name, secret.OwnerReferences)
		}
	}
	secret, err := s.kube.CoreV1().Secrets(namespace).Get(t.Context(), certificates.CASecret, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(secret.Data) != 1 || strings.Contains(string(secret.Data["ca.crt"]), "PRIVATE") {
		t.Error("what nodes read holds more than certificates")
	}
}

func certificateOf(t *testing.T, s *site, name string) *x509.Certificate {
	t.Helper()
	secret, err := s.kube.CoreV1().Secrets(namespace).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(secret.Data[corev1.TLSCertKey])
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// renew does what cmctl renew does.
func renew(t *testing.T, s *site, name string) {
	t.Helper()
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []map[string]string{
		{"type": "Ready", "status": "True", "reason": "Ready", "message": "kept"},
		{"type": "Issuing", "status": "True", "reason": "ManuallyTriggered", "message": "by the test"},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	s.kubectl(t, "patch", "certificate", name, "--namespace="+namespace, "--subresource=status", "--type=merge", "--patch="+string(patch))
}

func putOwn(t *testing.T, s *site, name string) {
	t.Helper()
	authority, err := trust.NewAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := authority.Issue([]string{address, "registry.example"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	data := map[string][]byte{corev1.TLSCertKey: cert, corev1.TLSPrivateKeyKey: key, "ca.crt": authority.Bundle().PEM()}
	secret := core.Secret(name, namespace).WithType(corev1.SecretTypeTLS).WithData(data)
	if _, err := s.kube.CoreV1().Secrets(namespace).Apply(t.Context(), secret, metav1.ApplyOptions{FieldManager: "operator"}); err != nil {
		t.Fatal(err)
	}
}
