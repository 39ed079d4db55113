package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/flowcontrol"
)

const (
	component = "connected-registry-agent"
	// One Event in half a minute, and this many in a burst: what is wrong stays
	// in the Lease, Events are only for the operator's attention.
	eventsPerSecond = 1.0 / 30
	eventBurst      = 10
	maxEventMessage = 1024 // bytes, by the API
)

// object is what an Event is about, in the agent's namespace.
type object struct{ kind, name, uid string }

// occurrence is what an Event says.
type occurrence struct {
	about           object
	reason, message string
}

// recorder raises Events. One that cannot be raised is lost.
type recorder struct {
	client *client
	node   string
	pod    string
	log    *slog.Logger
	limit  flowcontrol.PassiveRateLimiter
	queue  chan occurrence
}

func newRecorder(c *client, node, pod string, log *slog.Logger) *recorder {
	return &recorder{
		client: c, node: node, pod: pod, log: log,
		limit: flowcontrol.NewTokenBucketPassiveRateLimiter(eventsPerSecond, eventBurst),
		queue: make(chan occurrence, eventBurst),
	}
}

// warn does not block.
func (r *recorder) warn(o occurrence) {
	if !r.limit.TryAccept() {
		return
	}
	select {
	case r.queue <- o:
	default:
	}
}

func (r *recorder) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case o := <-r.queue:
			if err := r.raise(ctx, o); err != nil && ctx.Err() == nil {
				r.log.Debug("an Event could not be raised", "error", err)
			}
		}
	}
}

func (r *recorder) raise(ctx context.Context, o occurrence) error {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	now := metav1.Now()
	message := o.message
	if len(message) > maxEventMessage {
		message = strings.ToValidUTF8(message[:maxEventMessage-3], "") + "…"
	}
	event := &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{
			Name:      fmt.Sprintf("%.200s.%s", o.about.name, strconv.FormatInt(now.UnixNano(), 16)),
			Namespace: r.client.namespace,
		},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: "v1", Kind: o.about.kind, Namespace: r.client.namespace, Name: o.about.name, UID: types.UID(o.about.uid),
		},
		Reason: o.reason, Message: message, Type: corev1.EventTypeWarning,
		Source:         corev1.EventSource{Component: component, Host: r.node},
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
		ReportingController: component, ReportingInstance: r.pod,
	}
	return r.client.core.Post().Namespace(r.client.namespace).Resource("events").Body(event).Do(ctx).Error()
}
