package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// What an agent says in its Lease.
const (
	// AnnotationFingerprints lists the CA certificates that the node trusts for
	// the registry's own names: SHA-256 of the DER encoding in hex, sorted and
	// separated by commas.
	AnnotationFingerprints = "connectedregistry.io/ca-fingerprints"
	// AnnotationConfiguration is the digest of the node.yaml that was applied.
	AnnotationConfiguration = "connectedregistry.io/configuration"
	// AnnotationError is what is wrong, in one line; absent if nothing is.
	AnnotationError = "connectedregistry.io/error"
	// AnnotationRuntime is what was found out about the container runtime.
	AnnotationRuntime = "connectedregistry.io/runtime"
	// AnnotationVersion is the program's version.
	AnnotationVersion = "connectedregistry.io/version"
	// AnnotationCleaned, with the value "true", says that the node is as it was
	// before the agent came.
	AnnotationCleaned = "connectedregistry.io/cleaned"

	// LeasePrefix and the node's name make the Lease's name.
	LeasePrefix = "connected-registry-node-"
	// LabelComponent with ComponentNodeAgent is on every such Lease.
	LabelComponent     = "app.kubernetes.io/component"
	ComponentNodeAgent = "node-agent"
)

const (
	// renewInterval is how often a Lease is written though nothing has changed,
	// at the least; leaseDuration after the last time its agent is gone.
	renewInterval = 5 * time.Minute
	leaseDuration = 2*renewInterval + time.Minute
	// coalesceTime is between two writes, so that a burst of changes is one.
	coalesceTime = time.Second
	// A write that failed is tried again after a wait that doubles between these.
	firstWriteRetry = time.Second
	longWriteRetry  = time.Minute
	requestTime     = 30 * time.Second
)

// leaser keeps the node's Lease as it was told last.
type leaser struct {
	// write brings the Lease to the annotations given, and renews it.
	write func(ctx context.Context, annotations map[string]string) error
	wrote func(err error) // for metrics
	log   *slog.Logger
	news  chan struct{} // holds one element when want has changed
	gap   time.Duration // coalesceTime

	mu   sync.Mutex // guards want
	want map[string]string
}

func newLeaser(l lease, wrote func(error), log *slog.Logger) *leaser {
	return &leaser{write: l.write, wrote: wrote, log: log, news: make(chan struct{}, 1), gap: coalesceTime}
}

// set replaces what the Lease is to say. It does not block.
func (l *leaser) set(annotations map[string]string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if maps.Equal(l.want, annotations) {
		return
	}
	l.want = annotations
	select {
	case l.news <- struct{}{}:
	default:
	}
}

func (l *leaser) current() map[string]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.want
}

// run writes until ctx ends. The last thing that a Lease says is that the node
// is cleaned: it is not renewed then, since it is about to be deleted.
func (l *leaser) run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	timer.Stop()
	retry := firstWriteRetry
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.news:
		case <-timer.C:
		}
		want := l.current()
		err := l.write(ctx, want)
		if ctx.Err() != nil {
			return
		}
		l.wrote(err)
		if err != nil {
			if retry == firstWriteRetry {
				l.log.Warn("the Lease of this node cannot be written, which is tried again", "error", err)
			}
			timer.Reset(jitter(retry))
			retry = min(2*retry, longWriteRetry)
			continue
		}
		retry = firstWriteRetry
		timer.Stop()
		if want[AnnotationCleaned] == "" {
			timer.Reset(jitter(renewInterval))
		}
		if !sleep(ctx, l.gap) {
			return
		}
	}
}

// lease is one node's Lease.
type lease struct {
	client *client
	node   string
	holder string
}

func (l lease) write(ctx context.Context, annotations map[string]string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	name := LeasePrefix + l.node
	patch, err := l.patch(annotations, time.Now())
	if err != nil {
		return err
	}
	err = l.client.coordination.Patch(types.MergePatchType).Namespace(l.client.namespace).Resource("leases").Name(name).
		Body(patch).Do(ctx).Error()
	if apierrors.IsNotFound(err) {
		err = l.client.coordination.Post().Namespace(l.client.namespace).Resource("leases").
			Body(l.object(annotations, time.Now())).Do(ctx).Error()
	}
	if err != nil {
		return fmt.Errorf("writing Lease %s/%s: %w", l.client.namespace, name, err)
	}
	return nil
}

// patch takes what is not said any more away.
func (l lease) patch(annotations map[string]string, now time.Time) ([]byte, error) {
	said := make(map[string]any)
	for _, key := range []string{AnnotationFingerprints, AnnotationConfiguration, AnnotationError, AnnotationRuntime, AnnotationVersion, AnnotationCleaned, v1alpha1.AnnotationPeerAddress} {
		said[key] = nil
		if value, ok := annotations[key]; ok {
			said[key] = value
		}
	}
	object := l.object(nil, now)
	return json.Marshal(map[string]any{
		"metadata": map[string]any{"labels": object.Labels, "annotations": said},
		"spec":     object.Spec,
	})
}

func (l lease) object(annotations map[string]string, now time.Time) *coordinationv1.Lease {
	renewed := metav1.NewMicroTime(now)
	seconds := int32(leaseDuration.Seconds())
	return &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{
			Name:        LeasePrefix + l.node,
			Namespace:   l.client.namespace,
			Labels:      map[string]string{LabelComponent: ComponentNodeAgent, "app.kubernetes.io/managed-by": "connected-registry"},
			Annotations: annotations,
		},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &l.holder, RenewTime: &renewed, LeaseDurationSeconds: &seconds},
	}
}
