// Package notify tells other programs what is pushed to and deleted from the
// registry: as CloudEvents 1.0 in the structured mode of its HTTP protocol
// binding, durably, in order for each receiver, and at least once.
//
// An event that waits is a note on the registry's storage, in a folder for each
// receiver, so that it survives the process and is sent by the next leader. It holds no secrets: a receiver's URL and credentials come from the
// configuration whenever it is sent.
//
// It may import api.
package notify

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

const (
	// maxWaiting bounds what waits for one receiver.
	maxWaiting = 10_000
	// maxDead is how many dead letters are kept to be looked at.
	maxDead = 1000

	sendTimeout  = 15 * time.Second
	firstBackoff = time.Second
	longBackoff  = 5 * time.Minute
	maxReply     = 64 << 10 // bytes of an answer that are read
)

// The types of the events.
const (
	TypePush   = "io.connectedregistry.push"
	TypeDelete = "io.connectedregistry.delete"
)

// Event is one thing that happened to a repository.
type Event struct {
	// Time is when. Required.
	Time time.Time
	// Delete says that something was deleted. False: pushed.
	Delete bool
	// Repository is where. Required.
	Repository string
	// Tag and Digest are what; either may be empty.
	Tag    string
	Digest digest.Digest
	// MediaType and Size, in bytes, are the manifest's, as far as known.
	MediaType string
	Size      int64
	// Actor is the client token's name. Empty: not known, or the syncer.
	Actor string
}

func (e Event) action() string {
	if e.Delete {
		return "delete"
	}
	return "push"
}

// Receiver takes events.
type Receiver struct {
	// Patterns choose the events. Required.
	Patterns []v1alpha1.EventPattern
	// URL is where they are posted. Required. Never logged: it may hold a key.
	URL string
	// Authorization is sent as the header of that name. Empty: none.
	Authorization string
}

// id names the receiver in file names, metrics and the log, without what may be
// secret.
func (r Receiver) id() string {
	sum := sha256.Sum256([]byte(r.URL))
	return hex.EncodeToString(sum[:6])
}

// Config is what a Notifier needs.
type Config struct {
	// Notes are where events wait. Required.
	Notes Notes
	// Source is the event's source attribute, a URI reference that names this
	// registry. Required.
	Source string
	// Receivers take the events. Empty: nobody does.
	Receivers []Receiver
	// TTL is how long an event is tried; then it is a dead letter. 0: two days.
	TTL time.Duration
	// Transport makes the requests. nil: one of its own.
	Transport http.RoundTripper
	// Logger takes the log. nil: none.
	Logger *slog.Logger
	// Metrics registers the notifier's metrics. nil: none are kept.
	Metrics prometheus.Registerer
}

// Stats counts events, each once for each receiver.
type Stats struct {
	// Waiting are still to be sent.
	Waiting int
	// Delivered were sent since the start.
	Delivered int
	// Dead were given up since the start. They stay in the folder dead, the latest
	// thousand.
	Dead int
	// LastError is why the last attempt failed; empty after one that did not.
	LastError string
}

// Notifier keeps and sends events.
type Notifier struct {
	config    Config
	spool     *spool
	client    *http.Client
	receivers map[string]*receiver

	mu    sync.Mutex
	stats Stats

	delivered, dead prometheus.Counter
}

type receiver struct {
	Receiver
	more chan struct{} // holds a value when something was added
}

// New checks the configuration and what waits. It sends nothing.
func New(ctx context.Context, c Config) (*Notifier, error) {
	if c.TTL == 0 {
		c.TTL = 48 * time.Hour
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	spool, err := openSpool(ctx, c.Notes)
	if err != nil {
		return nil, fmt.Errorf("notifications: %w", err)
	}
	n := &Notifier{
		config: c,
		spool:  spool,
		client: &http.Client{
			Transport: c.Transport,
			Timeout:   sendTimeout,
			// Another address has not been given the credentials.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		receivers: make(map[string]*receiver),
		delivered: prometheus.NewCounter(prometheus.CounterOpts{Name: "connected_registry_notifications_delivered_total", Help: "Events that a receiver has taken."}),
		dead:      prometheus.NewCounter(prometheus.CounterOpts{Name: "connected_registry_notifications_dead_letters_total", Help: "Events that were given up."}),
	}
	if c.Transport == nil {
		n.client.Transport = http.DefaultTransport.(*http.Transport).Clone()
	}
	for _, r := range c.Receivers {
		n.receivers[r.id()] = &receiver{r, make(chan struct{}, 1)}
	}
	if c.Metrics != nil {
		for _, m := range []prometheus.Collector{n.delivered, n.dead} {
			if err := c.Metrics.Register(m); err != nil {
				return nil, fmt.Errorf("notifications: %w", err)
			}
		}
	}
	return n, nil
}

// Add keeps an event for every receiver that wants it, durably when it returns.
// An error says that some of them will not get it.
func (n *Notifier) Add(ctx context.Context, e Event) error {
	var errs []error
	for id, r := range n.receivers {
		if !r.wants(e) {
			continue
		}
		if n.spool.count(id) >= maxWaiting {
			n.bury(1)
			errs = append(errs, fmt.Errorf("notifications: %d events wait for receiver %s already: the %s of %s is not sent: see that it answers", maxWaiting, id, e.action(), e.Repository))
			continue
		}
		if err := n.spool.add(ctx, id, newMessage(n.config.Source, e)); err != nil {
			errs = append(errs, fmt.Errorf("notifications: keeping the %s of %s: %w", e.action(), e.Repository, err))
			continue
		}
		select {
		case r.more <- struct{}{}:
		default:
		}
	}
	return errors.Join(errs...)
}

func (r Receiver) wants(e Event) bool {
	for _, p := range r.Patterns {
		if p.Match(e.Repository, e.Tag, e.Digest.String(), e.action()) {
			return true
		}
	}
	return false
}

// Stats returns the counts.
func (n *Notifier) Stats() Stats {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.stats
	for id := range n.receivers {
		s.Waiting += n.spool.count(id)
	}
	return s
}

func (n *Notifier) bury(count int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stats.Dead += count
	n.dead.Add(float64(count))
}

// Run sends until ctx ends, then returns nil.
func (n *Notifier) Run(ctx context.Context) error {
	defer n.client.CloseIdleConnections()
	if gone, err := n.spool.forget(ctx, n.receivers); err != nil {
		n.config.Logger.Error("events of receivers that are gone cannot be put away", "error", err)
	} else if gone > 0 {
		n.bury(gone)
		n.config.Logger.Warn("events were waiting for receivers that are no longer configured", "events", gone)
	}
	g, ctx := errgroup.WithContext(ctx)
	for id, r := range n.receivers {
		g.Go(func() error {
			n.serve(ctx, id, r)
			return nil
		})
	}
	return g.Wait()
}

// randomID is an event's id: unique with its source.
func randomID() string {
	var b [12]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
