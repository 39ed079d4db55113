package syncer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
	"github.com/connected-registry/connected-registry/syncer/notify"
)

// DutiesConfig is what Duties need.
type DutiesConfig struct {
	// Name is the resource's. Required.
	Name string
	// Spec is a valid one with its defaults set. Required.
	Spec *v1alpha1.Spec
	// Sync is what FromSpec made of Spec. Required, and may be empty.
	Sync Config
	// Store is looked after. Required.
	Store *storage.Store
	// Secrets has what receivers of notifications are sent as credentials.
	// Required if the spec names any.
	Secrets Secrets
	// Logger takes the log. nil: none.
	Logger *slog.Logger
	// Metrics registers the metrics. nil: none are kept.
	Metrics prometheus.Registerer
}

// Duties are what one process, the leader, does for the content besides bringing
// it: what clients change goes to the parent, who wants to know is told, and
// garbage is collected.
type Duties struct {
	outbox   *Outbox
	notifier *notify.Notifier // nil: nobody wants to know
	collect  v1alpha1.GarbageCollection
	metrics  *maintainMetrics
	store    *storage.Store
	log      *slog.Logger
}

// NewDuties checks the configuration and reads the Secrets. It starts nothing.
func NewDuties(ctx context.Context, c DutiesConfig) (*Duties, error) {
	d := &Duties{collect: c.Spec.GarbageCollection, store: c.Store, log: c.Logger}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if d.metrics, err = newMaintainMetrics(c.Metrics); err != nil {
		return nil, err
	}
	outbox, err := c.Sync.Outbox(c.Spec, c.Store)
	if err != nil {
		return nil, err
	}
	outbox.Logger, outbox.Metrics = d.log, c.Metrics
	if c.Spec.Suspend {
		// What clients change waits until there is a parent again.
		return d, nil
	}
	if len(c.Spec.Notifications) > 0 {
		if d.notifier, err = newNotifier(ctx, c, outbox.TTL, d.log); err != nil {
			return nil, err
		}
		outbox.Notify = d.changed
	}
	if d.outbox, err = NewOutbox(outbox); err != nil {
		return nil, err
	}
	return d, nil
}

func newNotifier(ctx context.Context, c DutiesConfig, ttl time.Duration, log *slog.Logger) (*notify.Notifier, error) {
	config := notify.Config{
		Notes:   c.Store.Notes("notifications"),
		Source:  "/connectedregistries/" + c.Name,
		TTL:     ttl,
		Logger:  log,
		Metrics: c.Metrics,
	}
	for i, n := range c.Spec.Notifications {
		r := notify.Receiver{URL: n.URL}
		for _, pattern := range n.Events {
			p, err := v1alpha1.ParseEventPattern(pattern)
			if err != nil {
				return nil, fmt.Errorf("spec.notifications[%d].events: %q %w", i, pattern, err)
			}
			r.Patterns = append(r.Patterns, p)
		}
		if n.SecretRef != nil {
			authorization, err := c.Secrets.Secret(ctx, n.SecretRef.Name, v1alpha1.SecretKeyAuthorization)
			if err != nil {
				return nil, fmt.Errorf("spec.notifications[%d]: %w", i, err)
			}
			if r.Authorization, err = headerValue(authorization); err != nil {
				return nil, fmt.Errorf("spec.notifications[%d]: Secret %s, key %s: %w", i, n.SecretRef.Name, v1alpha1.SecretKeyAuthorization, err)
			}
		}
		config.Receivers = append(config.Receivers, r)
	}
	return notify.New(ctx, config)
}

// headerValue is a Secret's content as the value of a header: without the line
// break that files end with. The error does not quote it.
func headerValue(secret []byte) (string, error) {
	for len(secret) > 0 && (secret[len(secret)-1] == '\n' || secret[len(secret)-1] == '\r') {
		secret = secret[:len(secret)-1]
	}
	for _, b := range secret {
		if b < ' ' && b != '\t' || b == 0x7f {
			return "", errors.New("holds what no header can: write one line of text")
		}
	}
	return string(secret), nil
}

// Run does them until ctx ends, then returns nil.
func (d *Duties) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	if d.outbox != nil {
		g.Go(func() error { return d.outbox.Run(ctx) })
	}
	if d.notifier != nil {
		g.Go(func() error { return d.notifier.Run(ctx) })
	}
	g.Go(func() error {
		keepMaintained(ctx, d.store, func() v1alpha1.GarbageCollection { return d.collect }, d.metrics, d.log)
		return nil
	})
	return g.Wait()
}

// changed tells of what a client did.
func (d *Duties) changed(ctx context.Context, e storage.Entry) error {
	return d.notifier.Add(ctx, notify.Event{
		Time:       e.Time,
		Delete:     e.Action == storage.ActionDelete,
		Repository: e.Repository,
		Tag:        e.Tag,
		Digest:     e.Digest,
		MediaType:  e.MediaType,
		Size:       e.Size,
		Actor:      e.Actor,
	})
}

// tellTimeout bounds how long it takes to keep an event, or to tell of what is
// missing.
const tellTimeout = 10 * time.Second

// Progress tells of what a synchronisation brought and removed. It is for
// Config.Progress.
func (d *Duties) Progress(e Event) {
	if d.notifier == nil || e.Kind != EventTagged && e.Kind != EventRemoved {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), tellTimeout) // what has happened is told in any case
	defer cancel()
	err := d.notifier.Add(ctx, notify.Event{
		Time:       time.Now(),
		Delete:     e.Kind == EventRemoved,
		Repository: e.Repository,
		Tag:        e.Tag,
		Digest:     digest.Digest(e.Digest),
	})
	if err != nil {
		d.log.Error("a synchronised tag cannot be told of", "repository", e.Repository, "tag", e.Tag, "error", err)
	}
}

// Status adds to a status what the duties have to say: Changes, Notifications and
// Children. Children stay as they were while it cannot be read who they are.
func (d *Duties) Status(ctx context.Context, s *v1alpha1.Status) {
	if d.outbox != nil {
		o := d.outbox.Status()
		s.Changes = &v1alpha1.ChangesStatus{Waiting: o.Waiting, Brought: o.Brought, Dropped: o.Dropped, Conflicts: o.Conflicts}
		if !o.Oldest.IsZero() {
			s.Changes.OldestTime = new(metav1.NewTime(o.Oldest))
		}
		s.Changes.Problems = o.problems()
	}
	if d.notifier != nil {
		n := d.notifier.Stats()
		s.Notifications = &v1alpha1.NotificationsStatus{Waiting: n.Waiting, Delivered: n.Delivered, DeadLetters: n.Dead, LastError: n.LastError}
	}
	children, err := d.store.Children(ctx)
	if err != nil {
		d.log.Error("children cannot be listed", "error", err)
		return
	}
	s.Children = nil
	for _, c := range children {
		child := v1alpha1.Child{
			Name: c.Name, ClientToken: c.Token, Mode: v1alpha1.Mode(c.Mode), ConnectionState: v1alpha1.ConnectionState(c.ConnectionState),
			LoginServer: c.LoginServer, Version: c.Version, LastActivityTime: new(metav1.NewTime(c.Seen)),
		}
		if !c.LastSync.IsZero() {
			child.LastSyncTime = new(metav1.NewTime(c.LastSync))
		}
		s.Children = append(s.Children, child)
	}
}
