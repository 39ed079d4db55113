package certificates

import (
	"context"

	corev1 "k8s.io/api/core/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

// builtIn offers certificates of the CA in connected-registry-root, which it
// makes, and makes anew when it nears its end or when asked to. What was asked
// for last is noted in the same write, so that it is done once.
func (r *run) builtIn(s secrets, o observed) offer {
	if s.root == nil {
		return offer{prepare: r.newRoot(nil)}
	}
	if certManagerMade(s.root) {
		return offer{prepare: r.retireCertManager(s.issued, r.newRoot(s.root))}
	}
	authority, err := trust.ParseAuthority(s.root.Data[corev1.TLSCertKey], s.root.Data[corev1.TLSPrivateKeyKey])
	if err != nil {
		return offer{fault: &fault{
			reason:  "RootUnusable",
			message: "secret " + RootSecret + ": " + err.Error() + "; or delete the secret to begin with a new CA",
		}}
	}
	roots := authority.Bundle()
	resting := o.published.Equal(roots) && o.served != nil && o.served.verify(roots, o.now) == nil
	if resting && (authority.NearsEnd(o.now) || r.rotationAsked(s.root)) {
		return offer{roots: roots, prepare: r.newRoot(s.root)}
	}
	return r.issueBy(authority, o)
}

func (r *run) issueBy(authority *trust.Authority, o observed) offer {
	offered := offer{roots: authority.Bundle()}
	if o.served != nil {
		current, err := authority.Current(o.served.leaf(), r.hosts, o.now)
		if err != nil {
			offered.fault = &fault{reason: "NamesInvalid", message: "the certificate's names: " + err.Error()}
			return offered
		}
		if current {
			return offered
		}
	}
	offered.next = func() (*pair, error) {
		cert, key, err := authority.Issue(r.hosts, o.now)
		if err != nil {
			return nil, err
		}
		return parsePair(cert, key)
	}
	return offered
}

// rotationAsked reports whether the resource asks for another CA than the one
// in root.
func (r *run) rotationAsked(root *corev1.Secret) bool {
	asked := r.cr.Annotations[v1alpha1.AnnotationRotateCA]
	return asked != "" && asked != root.Annotations[v1alpha1.AnnotationRotateCA]
}

// newRoot writes a CA with a new key in place of have.
func (r *run) newRoot(have *corev1.Secret) *write {
	return &write{what: "making a CA", do: func(ctx context.Context) error {
		authority, err := trust.NewAuthority(r.now)
		if err != nil {
			return err
		}
		cert, key, err := authority.PEM()
		if err != nil {
			return err
		}
		var asked map[string]string
		if value := r.cr.Annotations[v1alpha1.AnnotationRotateCA]; value != "" {
			asked = map[string]string{v1alpha1.AnnotationRotateCA: value}
		}
		return r.put(ctx, withoutCertManager(have), RootSecret, corev1.SecretTypeTLS,
			map[string][]byte{corev1.TLSCertKey: cert, corev1.TLSPrivateKeyKey: key}, asked)
	}}
}
