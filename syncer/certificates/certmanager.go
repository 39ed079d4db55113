package certificates

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

// The objects that cert-manager is given: an issuer that signs itself, the root
// that it issues, the issuer that signs with the root, and what that issues.
const (
	selfSignedIssuer  = "connected-registry-self-signed"
	rootCertificate   = "connected-registry-root"
	rootIssuer        = "connected-registry-root"
	issuedCertificate = "connected-registry-issued"
	// annotationCertificate is cert-manager's, on the Secrets that it writes.
	annotationCertificate = "cert-manager.io/certificate-name"
	fieldManager          = "connected-registry-syncer"
	// reapply is how often objects are applied again that somebody else may
	// have changed.
	reapply = 10 * time.Minute
	// reissueWait is what cert-manager is given to issue again.
	reissueWait = 30 * time.Second
)

var (
	certManagerVersion = schema.GroupVersion{Group: "cert-manager.io", Version: "v1"}
	issuers            = certManagerVersion.WithResource("issuers")
	certificates       = certManagerVersion.WithResource("certificates")
)

// certManager offers what cert-manager issues. It asks for it as soon as
// cert-manager is there, and again for the serving certificate when the root
// has changed, which cert-manager does not do by itself.
func (r *run) certManager(s secrets, o observed) offer {
	objects := r.certManagerObjects()
	if r.memory.applyDue(digestOf(objects), o.now) {
		return offer{prepare: r.applyCertManager(objects)}
	}
	if s.root == nil || !certManagerMade(s.root) {
		return r.awaitRoot(s)
	}
	roots, _, err := trust.ParseBundle(s.root.Data[corev1.TLSCertKey], o.now)
	if err != nil {
		return offer{fault: &fault{reason: "RootUnusable", message: "secret " + RootSecret + ": tls.crt: " + err.Error(), retry: laggingPoll}}
	}
	for _, made := range []*corev1.Secret{s.root, s.issued} {
		if made != nil && certManagerMade(made) && !r.owns(made) {
			return offer{roots: roots, prepare: r.own(made)}
		}
	}
	offered := offer{roots: roots}
	awaiting := "waiting for cert-manager to issue the serving certificate: see certificate " + issuedCertificate
	if s.issued == nil {
		offered.awaiting = awaiting
		return offered
	}
	issued, err := parsePair(s.issued.Data[corev1.TLSCertKey], s.issued.Data[corev1.TLSPrivateKeyKey])
	switch {
	case err == nil && issued.verify(roots, o.now) == nil && len(issued.missing(r.hosts)) == 0:
		if !issued.equal(o.served) || !roots.Equal(o.servedRoots) {
			offered.next = func() (*pair, error) { return issued, nil }
		}
	case err == nil && issued.verify(roots, o.now) == nil:
		offered.awaiting = awaiting // with the new names
	case o.now.Before(r.memory.reissued.Add(reissueWait)):
		offered.awaiting = awaiting
	default:
		offered.prepare = &write{what: "having cert-manager issue the serving certificate again", do: func(ctx context.Context) error {
			r.memory.reissued = r.now
			return r.remove(ctx, s.issued)
		}}
	}
	return offered
}

// awaitRoot waits for cert-manager's CA. A CA of ours in its place is taken away
// first: cert-manager would keep it as if it were its own.
func (r *run) awaitRoot(s secrets) offer {
	switch {
	case r.memory.applyFault != nil:
		return offer{fault: r.memory.applyFault}
	case s.root == nil:
		return offer{fault: &fault{reason: "WaitingForCertManager", message: "waiting for cert-manager to issue the CA: see certificate " + rootCertificate, retry: nodePoll}}
	case s.root.Labels[labelManagedBy] != managedBy:
		return offer{fault: &fault{reason: "RootForeign", message: "secret " + RootSecret + " was made by neither the syncer nor cert-manager: rename it, or delete it"}}
	}
	return offer{prepare: &write{what: "leaving the CA to cert-manager", do: func(ctx context.Context) error { return r.remove(ctx, s.root) }}}
}

// applyCertManager applies the objects, server-side. Where cert-manager is not
// there, or its webhook does not answer, the error is a fault.
func (r *run) applyCertManager(objects []*unstructured.Unstructured) *write {
	return &write{what: "asking cert-manager for certificates", do: func(ctx context.Context) error {
		err := r.apply(ctx, objects)
		r.memory.appliedNow(digestOf(objects), r.now, err)
		return err
	}}
}

func (r *run) apply(ctx context.Context, objects []*unstructured.Unstructured) error {
	_, err := r.Client.Discovery().ServerResourcesForGroupVersion(certManagerVersion.String())
	if apierrors.IsNotFound(err) {
		return &fault{reason: "CertManagerMissing", message: "cert-manager is not installed: install it, or set spec.tls.source to BuiltIn or Secret"}
	}
	if err != nil {
		return &fault{reason: "CertManagerUnreachable", message: "looking for cert-manager: " + err.Error()}
	}
	for _, object := range objects {
		_, err := r.Dynamic.Resource(resourceOf(object)).Namespace(r.cr.Namespace).
			Apply(ctx, object.GetName(), object, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
		if err != nil {
			return &fault{reason: "CertManagerUnreachable", message: fmt.Sprintf("applying %s %s: %v", object.GetKind(), object.GetName(), err)}
		}
	}
	return nil
}

func (r *run) certManagerObjects() []*unstructured.Unstructured {
	names, addresses := split(r.hosts)
	subject := map[string]any{"organizations": []any{"connected-registry"}}
	if asked := r.cr.Annotations[v1alpha1.AnnotationRotateCA]; asked != "" {
		// Another subject makes cert-manager issue another root, with a new key.
		sum := sha256.Sum256([]byte(asked))
		subject["serialNumber"] = hex.EncodeToString(sum[:8])
	}
	key := map[string]any{"algorithm": "ECDSA", "size": int64(256), "encoding": "PKCS8", "rotationPolicy": "Always"}
	return []*unstructured.Unstructured{
		r.object("Issuer", selfSignedIssuer, map[string]any{"selfSigned": map[string]any{}}),
		r.object("Certificate", rootCertificate, map[string]any{
			"secretName": RootSecret, "isCA": true, "commonName": "Connected Registry CA", "subject": subject,
			"duration": "87600h0m0s", "renewBeforePercentage": int64(20), "privateKey": key,
			"usages":    []any{"cert sign", "crl sign", "digital signature"},
			"issuerRef": map[string]any{"name": selfSignedIssuer, "kind": "Issuer", "group": certManagerVersion.Group},
		}),
		r.object("Issuer", rootIssuer, map[string]any{"ca": map[string]any{"secretName": RootSecret}}),
		r.object("Certificate", issuedCertificate, map[string]any{
			"secretName": IssuedSecret, "commonName": "connected-registry", "dnsNames": anys(names), "ipAddresses": anys(addresses),
			"duration": "17520h0m0s", "renewBeforePercentage": int64(33), "privateKey": key,
			"usages":    []any{"server auth", "digital signature"},
			"issuerRef": map[string]any{"name": rootIssuer, "kind": "Issuer", "group": certManagerVersion.Group},
		}),
	}
}

func (r *run) object(kind, name string, spec map[string]any) *unstructured.Unstructured {
	u := &unstructured.Unstructured{Object: map[string]any{"spec": spec}}
	u.SetGroupVersionKind(certManagerVersion.WithKind(kind))
	u.SetName(name)
	u.SetNamespace(r.cr.Namespace)
	u.SetLabels(map[string]string{labelManagedBy: managedBy})
	u.SetOwnerReferences([]metav1.OwnerReference{r.owner()})
	return u
}

func resourceOf(u *unstructured.Unstructured) schema.GroupVersionResource {
	if u.GetKind() == "Issuer" {
		return issuers
	}
	return certificates
}

func digestOf(objects []*unstructured.Unstructured) string {
	h := sha256.New()
	for _, o := range objects {
		data, _ := o.MarshalJSON() // of what was just made of strings and numbers
		h.Write(data)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func anys(list []string) []any {
	all := make([]any, len(list))
	for i, s := range list {
		all[i] = s
	}
	return all
}

// own has a Secret of cert-manager's, which cert-manager would leave behind, go
// with the resource.
func (r *run) own(secret *corev1.Secret) *write {
	return &write{what: "owning secret " + secret.Name, do: func(ctx context.Context) error {
		owner := r.owner()
		owner.Controller, owner.BlockOwnerDeletion = nil, nil
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
			"uid": secret.UID, "ownerReferences": []metav1.OwnerReference{owner},
		}})
		if err != nil {
			return err
		}
		_, err = r.Client.CoreV1().Secrets(secret.Namespace).Patch(ctx, secret.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("owning secret %s/%s: %w", secret.Namespace, secret.Name, err)
		}
		return nil
	}}
}

func (r *run) owns(secret *corev1.Secret) bool {
	return slices.ContainsFunc(secret.OwnerReferences, func(o metav1.OwnerReference) bool { return o.UID == r.cr.UID })
}

// certManagerMade reports whether cert-manager wrote the Secret for us.
func certManagerMade(secret *corev1.Secret) bool {
	return slices.Contains([]string{rootCertificate, issuedCertificate}, secret.Annotations[annotationCertificate])
}

// retireCertManager takes away the objects that cert-manager was given, so that
// it does not write to our Secrets any more, and what it issued; then it goes
// on. The mark in connected-registry-root goes last.
func (r *run) retireCertManager(issued *corev1.Secret, then *write) *write {
	return &write{what: "taking over from cert-manager", do: func(ctx context.Context) error {
		for _, object := range slices.Backward(r.certManagerObjects()) {
			err := r.Dynamic.Resource(resourceOf(object)).Namespace(r.cr.Namespace).Delete(ctx, object.GetName(), metav1.DeleteOptions{})
			if err != nil && !apierrors.IsNotFound(err) {
				return fmt.Errorf("deleting %s %s: %w", object.GetKind(), object.GetName(), err)
			}
		}
		if issued != nil && certManagerMade(issued) {
			if err := r.remove(ctx, issued); err != nil {
				return err
			}
		}
		return then.do(ctx)
	}}
}

// withoutCertManager is the Secret without cert-manager's marks.
func withoutCertManager(have *corev1.Secret) *corev1.Secret {
	if have == nil {
		return nil
	}
	next := have.DeepCopy()
	ours := func(name, _ string) bool { return strings.Contains(name, "cert-manager.io/") }
	maps.DeleteFunc(next.Annotations, ours)
	maps.DeleteFunc(next.Labels, ours)
	return next
}
