package controller

import (
	"context"
	"fmt"
	"io/fs"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// secretReader reads Secrets for one reconciliation: each once, so that all of it
// sees the same.
type secretReader struct {
	client    kubernetes.Interface
	namespace string
	read      map[string]*corev1.Secret // nil: not there
}

func newSecretReader(client kubernetes.Interface, namespace string) *secretReader {
	return &secretReader{client: client, namespace: namespace, read: make(map[string]*corev1.Secret)}
}

// Secret is syncer.Secrets.
func (r *secretReader) Secret(ctx context.Context, name, key string) ([]byte, error) {
	s, err := r.get(ctx, name)
	if err != nil {
		return nil, err
	}
	if s == nil {
		return nil, fmt.Errorf("Secret %s: %w: create it in namespace %s", name, fs.ErrNotExist, r.namespace)
	}
	value, ok := s.Data[key]
	if !ok {
		return nil, fmt.Errorf("Secret %s: key %s: %w", name, key, fs.ErrNotExist)
	}
	return value, nil
}

// get returns nil when there is no such Secret.
func (r *secretReader) get(ctx context.Context, name string) (*corev1.Secret, error) {
	if s, ok := r.read[name]; ok {
		return s, nil
	}
	s, err := withRequestTime(ctx, func(ctx context.Context) (*corev1.Secret, error) {
		return r.client.CoreV1().Secrets(r.namespace).Get(ctx, name, metav1.GetOptions{})
	})
	switch {
	case apierrors.IsNotFound(err):
		s = nil
	case err != nil:
		return nil, fmt.Errorf("reading Secret %s: %w", name, err)
	}
	r.read[name] = s
	return s, nil
}
