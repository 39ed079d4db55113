package certificates

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

const (
	labelManagedBy = "app.kubernetes.io/managed-by"
	managedBy      = "connected-registry"
)

// write is one change in the cluster.
type write struct {
	what string
	do   func(ctx context.Context) error
}

// secrets are the Secrets as they were read, nil where there is none.
type secrets struct {
	root, issued, tls, ca, own *corev1.Secret
}

func (r *run) readSecrets(ctx context.Context) (s secrets, err error) {
	for name, secret := range map[string]**corev1.Secret{RootSecret: &s.root, IssuedSecret: &s.issued, TLSSecret: &s.tls, CASecret: &s.ca} {
		if *secret, err = r.secret(ctx, name); err != nil {
			return s, err
		}
	}
	if r.cr.Spec.TLS.Source == v1alpha1.TLSSourceSecret {
		s.own, err = r.secret(ctx, r.cr.Spec.TLS.SecretName)
	}
	return s, err
}

func (r *run) secret(ctx context.Context, name string) (*corev1.Secret, error) {
	secret, err := r.Client.CoreV1().Secrets(r.cr.Namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading secret %s/%s: %w", r.cr.Namespace, name, err)
	}
	return secret, nil
}

// put makes the Secret hold data and nothing else. have is what was read: if
// somebody else wrote since, nothing is written and the error is a conflict.
func (r *run) put(ctx context.Context, have *corev1.Secret, name string, kind corev1.SecretType, data map[string][]byte, annotations map[string]string) error {
	client := r.Client.CoreV1().Secrets(r.cr.Namespace)
	if have == nil {
		_, err := client.Create(ctx, &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{
				Name: name, Annotations: annotations,
				Labels:          map[string]string{labelManagedBy: managedBy},
				OwnerReferences: []metav1.OwnerReference{r.owner()},
			},
			Type: kind, Data: data,
		}, metav1.CreateOptions{})
		if err != nil {
			return fmt.Errorf("creating secret %s/%s: %w", r.cr.Namespace, name, err)
		}
		return nil
	}
	next := have.DeepCopy()
	next.Data = data
	next.Labels = with(next.Labels, map[string]string{labelManagedBy: managedBy})
	next.Annotations = with(next.Annotations, annotations)
	if metav1.GetControllerOf(next) == nil {
		next.OwnerReferences = slices.DeleteFunc(next.OwnerReferences, func(o metav1.OwnerReference) bool { return o.UID == r.cr.UID })
		next.OwnerReferences = append(next.OwnerReferences, r.owner())
	}
	if _, err := client.Update(ctx, next, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("updating secret %s/%s: %w", r.cr.Namespace, name, err)
	}
	return nil
}

// remove deletes the Secret that was read, not one that took its place.
func (r *run) remove(ctx context.Context, have *corev1.Secret) error {
	err := r.Client.CoreV1().Secrets(have.Namespace).Delete(ctx, have.Name, metav1.DeleteOptions{
		Preconditions: &metav1.Preconditions{UID: &have.UID, ResourceVersion: &have.ResourceVersion},
	})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting secret %s/%s: %w", have.Namespace, have.Name, err)
	}
	return nil
}

func (r *run) owner() metav1.OwnerReference {
	return *metav1.NewControllerRef(r.cr, schema.GroupVersionKind{Group: v1alpha1.Group, Version: v1alpha1.Version, Kind: v1alpha1.Kind})
}

func with(have, more map[string]string) map[string]string {
	all := maps.Clone(have)
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, more)
	return all
}

// publish makes connected-registry-ca hold bundle; an empty one needs no Secret.
func (r *run) publish(ctx context.Context, have *corev1.Secret, bundle trust.Bundle) error {
	switch {
	case bundle.Empty() && have == nil:
		return nil
	case bundle.Empty():
		return r.remove(ctx, have)
	}
	return r.put(ctx, have, CASecret, corev1.SecretTypeOpaque, map[string][]byte{v1alpha1.SecretKeyCA: bundle.PEM()}, nil)
}

// give makes connected-registry-tls hold p, and the CAs it verifies under.
func (r *run) give(ctx context.Context, have *corev1.Secret, p *pair, roots trust.Bundle) error {
	data := map[string][]byte{corev1.TLSCertKey: p.cert, corev1.TLSPrivateKeyKey: p.key}
	if !roots.Empty() {
		data[v1alpha1.SecretKeyCA] = roots.PEM()
	}
	return r.put(ctx, have, TLSSecret, corev1.SecretTypeTLS, data, nil)
}

// published reads connected-registry-ca. What cannot be read is untidy, and so
// is anything beside the certificates. One without data may be there for its
// annotations.
func published(secret *corev1.Secret, now time.Time) (b trust.Bundle, untidy bool) {
	if secret == nil || len(secret.Data) == 0 {
		return trust.Bundle{}, false
	}
	b, _, err := trust.ParseBundle(secret.Data[v1alpha1.SecretKeyCA], now)
	return b, err != nil || len(secret.Data) != 1
}

// served reads connected-registry-tls: nil if replicas can do nothing with it.
func served(secret *corev1.Secret, now time.Time) (*pair, trust.Bundle) {
	if secret == nil {
		return nil, trust.Bundle{}
	}
	p, err := parsePair(secret.Data[corev1.TLSCertKey], secret.Data[corev1.TLSPrivateKeyKey])
	if err != nil {
		return nil, trust.Bundle{}
	}
	roots, _, err := trust.ParseBundle(secret.Data[v1alpha1.SecretKeyCA], now)
	if err != nil {
		return p, trust.Bundle{}
	}
	return p, roots
}
