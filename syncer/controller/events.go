package controller

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// recorder raises Events on the resource.
type recorder struct {
	broadcaster record.EventBroadcaster
	record.EventRecorder
}

func newRecorder(ctx context.Context, c Config) *recorder {
	b := record.NewBroadcaster(record.WithContext(ctx))
	b.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: c.Client.CoreV1().Events(c.Namespace)})
	return &recorder{b, b.NewRecorder(scheme.Scheme, corev1.EventSource{Component: Lease, Host: c.Identity})}
}

func (r *recorder) raise(f *findings, e event) {
	kind := corev1.EventTypeNormal
	if e.warning {
		kind = corev1.EventTypeWarning
	}
	r.Event(&corev1.ObjectReference{
		APIVersion: v1alpha1.APIVersion, Kind: v1alpha1.Kind,
		Namespace: f.asked.Namespace, Name: f.asked.Name, UID: f.asked.UID,
	}, kind, e.reason, oneLine(e.message))
}

// close drops what was not raised yet.
func (r *recorder) close() { r.broadcaster.Shutdown() }
