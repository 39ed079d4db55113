package controller

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utiljson "k8s.io/apimachinery/pkg/util/json"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

const (
	// publishInterval is the least time between two writes of the status.
	publishInterval = time.Second
	// progressInterval is that between two which tell of progress alone.
	progressInterval = 5 * time.Second
)

// publisher writes the status.
type publisher struct {
	loop   *loop
	before v1alpha1.Status // as it was read first, or written last
	json   []byte          // the same as it is stored
	at     time.Time       // when it was last compared with what is stored
}

// run writes the status whenever it changes, until ctx ends.
func (p *publisher) run(ctx context.Context) {
	wait := publishInterval
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		if err := p.publish(ctx); err != nil && ctx.Err() == nil {
			wait = min(2*wait, maxRetry)
			p.loop.log.Warn("the status cannot be written", "error", err, "retry", wait)
		} else {
			wait = publishInterval
		}
	}
}

// publish writes the status if it is another than before, or if it was not
// looked at for long.
func (p *publisher) publish(ctx context.Context) error {
	found := p.loop.findings()
	if found == nil {
		return nil
	}
	sync, fault := p.loop.engine.status(ctx)
	now := time.Now()
	if justBegan(sync, now) || isSyncing(sync) && isSyncing(p.before) && now.Sub(p.at) < progressInterval {
		return nil
	}
	status := compose(view{
		now: metav1.NewTime(now), version: p.loop.config.Version,
		before: p.before, found: found, sync: sync, engine: fault,
	})
	data, err := json.Marshal(status)
	if err != nil {
		return err
	}
	if bytes.Equal(data, p.json) && now.Sub(p.at) < resyncInterval {
		return nil
	}
	if err := p.write(ctx, data); err != nil {
		return err
	}
	for _, e := range changes(p.before, status) {
		p.loop.recorder.raise(found, e)
	}
	p.before, p.json, p.at = status, data, now
	return nil
}

func isSyncing(s v1alpha1.Status) bool {
	return s.ConnectionState == v1alpha1.ConnectionStateSyncing
}

// write stores a status, given in JSON. It loses against every other write of
// the resource that comes between, and is to be repeated then.
func (p *publisher) write(ctx context.Context, data []byte) error {
	c := p.loop.config
	api := c.Dynamic.Resource(registries).Namespace(c.Namespace)
	object, err := withRequestTime(ctx, func(ctx context.Context) (*unstructured.Unstructured, error) {
		return api.Get(ctx, c.Name, metav1.GetOptions{})
	})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading ConnectedRegistry %s/%s: %w", c.Namespace, c.Name, err)
	}
	var status map[string]any
	if err := utiljson.Unmarshal(data, &status); err != nil {
		return err
	}
	if equality.Semantic.DeepEqual(object.Object["status"], any(status)) {
		return nil
	}
	object.Object["status"] = status
	_, err = withRequestTime(ctx, func(ctx context.Context) (*unstructured.Unstructured, error) {
		return api.UpdateStatus(ctx, object, metav1.UpdateOptions{})
	})
	if err != nil {
		return fmt.Errorf("writing the status of ConnectedRegistry %s/%s: %w", c.Namespace, c.Name, err)
	}
	return nil
}
