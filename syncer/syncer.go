package syncer

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/distribution/distribution/v3"
	"github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

// Config is what a Syncer needs. Store, Driver and Parent.Endpoint are required.
type Config struct {
	// Store is where content is written.
	Store distribution.Namespace
	// Driver is the storage under Store. It is used to find, and to clear away,
	// what an interrupted synchronisation left behind, which Store cannot do.
	Driver driver.StorageDriver
	// Parent is where content comes from.
	Parent Parent
	// Repositories select the content. Empty: nothing.
	Repositories []v1alpha1.Repository
	// Upstreams are further registries that content comes from. Parent.Endpoint
	// may be empty when there are some.
	Upstreams []Upstream
	// Schedule is a cron line of five fields in UTC; see
	// v1alpha1.ParseSchedule. Empty: every minute.
	Schedule string
	// Window bounds one synchronisation. 0: no bound.
	Window time.Duration
	// Concurrency is how many requests for blobs are under way at once: for
	// several blobs, and for several chunks of one. 0: 6.
	Concurrency int
	// ChunkSize is how many bytes of a blob one request asks for. 0: 16 MiB.
	ChunkSize int64
	// MaxBandwidth is how many bytes of blobs come in a second, from all
	// registries together. 0: no limit.
	MaxBandwidth int64
	// MaxRequestsPerHour is how many requests each registry is asked in any hour;
	// what does not fit waits. Not counted are its token service, and the storage
	// that it redirects to. 0: no limit but its own.
	MaxRequestsPerHour int
	// OnDemand brings what replicas ask for before everything else, while Run
	// runs; see OnDemand.
	OnDemand bool
	// Referrers brings signatures, attestations and other referrers too.
	Referrers bool
	// DeletePropagation removes tags that are gone at the parent or no longer
	// selected, wherever they came from: nobody else may write tags then.
	DeletePropagation bool
	// MaxRemovals is how much of a repository's tags DeletePropagation removes
	// at once, in percent; more are held until a ManualResync. 0: 50.
	MaxRemovals int
	// ReadWrite says that clients push and delete, too. What they changed is not
	// changed back before the parent was told; see Outbox.
	ReadWrite bool
	// Name, LoginServer and Version are what this registry says of itself to a
	// parent that is a connected registry too. Name empty: nothing.
	Name, LoginServer, Version string
	// Before is what was known when the last Syncer ended, of another
	// configuration or in another process; from it, Status goes on. Zero:
	// nothing was ever synchronised.
	Before v1alpha1.Status
	// Logger takes the log. nil: none.
	Logger *slog.Logger
	// Progress is told what happens while it happens, from several goroutines,
	// which wait for it, and hold no lock. Of EventFetched there are many: it must
	// return from that at once. nil: nobody is told.
	Progress func(Event)
	// Metrics registers the syncer's metrics. nil: none are kept.
	Metrics prometheus.Registerer
}

// Parent is the registry that content comes from, with its secrets resolved.
type Parent struct {
	// Endpoint is its host, with a port unless it is the scheme's own, without
	// a scheme.
	Endpoint string
	// Insecure speaks plain HTTP.
	Insecure bool
	// CA verifies the parent's certificate. nil: the system's roots.
	CA *x509.CertPool
	// Username and Password are sent to the parent, and to the token service
	// that it names. Both empty: anonymous. Username empty: Password is an
	// OAuth2 refresh token.
	Username string
	Password string
	// Credentials gives the username and password, in the place of those, each
	// time that they are needed: for credentials that do not last. Its errors are
	// one line that names the remedy. nil: Username and Password hold.
	Credentials func(context.Context) (username, password string, err error)
}

// Upstream is a registry besides the parent.
type Upstream struct {
	Parent
	// Prefix stands before the names that its repositories have here. Empty:
	// they keep theirs.
	Prefix string
	// Repositories select its content.
	Repositories []v1alpha1.Repository
}

// Syncer brings content from a parent. Its methods may be called from several
// goroutines; synchronisations run one after another.
type Syncer struct {
	config Config
	// upstreams are the parent and the Upstreams; selections and paces belong to
	// them by their order.
	upstreams  []Upstream
	selections []selection
	paces      []*pace
	schedule   v1alpha1.Schedule
	store      *store
	limits     limits
	bandwidth  *bandwidth
	metrics    *metrics
	// dial opens connections to the parent. nil: as net does; tests have a
	// network of their own, whose time is theirs, too.
	dial dialer

	// What is remembered from one synchronisation to the next.
	fetcher *fetcher
	checked *checks
	etags   *etags
	wanted  *wanted

	turn   chan struct{}     // holds a value while a synchronisation runs
	logged map[string]string // the last problem of each repository; for the holder of turn
	held   map[string]string // why its removals were held last; for the holder of turn

	mu      sync.Mutex      // guards what follows
	last    v1alpha1.Status // as of the last synchronisation that ended
	running *run            // nil between synchronisations
	silent  map[string]bool // repositories of which the parent listed no tag last
}

// New returns a Syncer, or an error that names the field of config that is
// wrong. It starts nothing and asks nothing of the parent.
func New(config Config) (*Syncer, error) {
	switch {
	case config.Store == nil:
		return nil, errors.New("syncer: Store is required")
	case config.Driver == nil:
		return nil, errors.New("syncer: Driver is required")
	case storage.StoreOf(config.Driver) == nil:
		return nil, errors.New("syncer: Driver is not that of a storage.Store")
	case config.Parent.Endpoint == "" && len(config.Upstreams) == 0:
		return nil, errors.New("syncer: Parent.Endpoint is required")
	case config.ChunkSize < 0:
		return nil, errors.New("syncer: ChunkSize is negative")
	case config.MaxBandwidth < 0:
		return nil, errors.New("syncer: MaxBandwidth is negative")
	case config.MaxRequestsPerHour < 0:
		return nil, errors.New("syncer: MaxRequestsPerHour is negative")
	case config.Concurrency < 0:
		return nil, errors.New("syncer: Concurrency is negative")
	case config.Window < 0:
		return nil, errors.New("syncer: Window is negative")
	case config.MaxRemovals < 0 || config.MaxRemovals > 100:
		return nil, errors.New("syncer: MaxRemovals is not a percentage")
	}
	config.Concurrency = cmp.Or(config.Concurrency, v1alpha1.DefaultConcurrency)
	config.MaxRemovals = cmp.Or(config.MaxRemovals, v1alpha1.DefaultMaxRemovals)
	config.ChunkSize = cmp.Or(config.ChunkSize, v1alpha1.DefaultChunkSizeInMb<<20)
	config.Logger = cmp.Or(config.Logger, slog.New(slog.DiscardHandler))
	schedule, err := v1alpha1.ParseSchedule(cmp.Or(config.Schedule, v1alpha1.DefaultSchedule))
	if err != nil {
		return nil, fmt.Errorf("syncer: Schedule: %w", err)
	}
	metrics, err := newMetrics(config.Metrics)
	if err != nil {
		return nil, fmt.Errorf("syncer: Metrics: %w", err)
	}
	s := &Syncer{
		config:    config,
		schedule:  schedule,
		store:     &store{config.Store, storage.StoreOf(config.Driver)},
		limits:    defaultLimits(),
		bandwidth: newBandwidth(config.MaxBandwidth),
		metrics:   metrics,
		checked:   newChecks(),
		etags:     newETags(),
		wanted:    newWanted(),
		turn:      make(chan struct{}, 1),
		logged:    make(map[string]string),
		held:      make(map[string]string),
		last:      TakenOver(config.Before),
	}
	s.fetcher = &fetcher{
		store:      s.store,
		queue:      newQueue(config.Concurrency),
		streams:    config.Concurrency,
		chunk:      config.ChunkSize,
		distrusted: newDistrust(),
		flights:    make(map[digest.Digest]*flight),
	}
	if err := s.addUpstreams(); err != nil {
		return nil, err
	}
	return s, nil
}

// addUpstreams prepares the registries that content comes from.
func (s *Syncer) addUpstreams() error {
	all := s.config.Upstreams
	if s.config.Parent.Endpoint != "" {
		all = append([]Upstream{{Parent: s.config.Parent, Repositories: s.config.Repositories}}, all...)
	}
	for _, from := range all {
		if from.Endpoint == "" || strings.ContainsAny(from.Endpoint, "/@") {
			return errors.New("syncer: Parent.Endpoint must be a host with or without a port")
		}
		selection, err := newSelection(from.Prefix, from.Repositories)
		if err != nil {
			return fmt.Errorf("syncer: Repositories: %w", err)
		}
		s.paces = append(s.paces, s.paceOf(from.Endpoint))
		s.upstreams = append(s.upstreams, from)
		s.selections = append(s.selections, selection)
	}
	return nil
}

// paceOf is the pace at which a registry is asked: one for each, however many
// upstreams it is.
func (s *Syncer) paceOf(endpoint string) *pace {
	for i, other := range s.upstreams {
		if other.Endpoint == endpoint {
			return s.paces[i]
		}
	}
	return &pace{perHour: s.config.MaxRequestsPerHour}
}

// errWindow is the cause that a synchronisation's context ends with when its
// window does.
var errWindow = errors.New("the window ended before everything was here: it goes on in the next synchronisation")

// Sync brings everything that is wanted and not here, once. If another
// synchronisation is under way, it waits for that to end. The error is non-nil
// when something could not be brought, one line for each repository; the Result
// is valid either way. A repository that fails stops no other.
//
// With the trigger ManualResync, what was put off is tried again: referrers of
// unchanged images, and blobs for which the parent had sent wrong bytes. Removals
// that were held for their number are carried out.
func (s *Syncer) Sync(ctx context.Context, trigger v1alpha1.SyncTrigger) (Result, error) {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return Result{}, context.Cause(ctx)
	}
	if trigger == v1alpha1.SyncTriggerManual {
		s.checked.clear()
		s.fetcher.distrusted.clear()
	}
	if s.config.Window > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.config.Window, errWindow)
		defer cancel()
	}
	r := s.newRun()
	r.manual = trigger == v1alpha1.SyncTriggerManual
	defer r.close()
	start := time.Now()
	s.begin(r, trigger, start)
	r.sync(ctx)
	result, err := s.finish(ctx, r, trigger, start)
	s.report(ctx, result)
	return result, err
}

// Finish waits until no synchronisation is under way, and lets no other begin.
// The error is the context's.
func (s *Syncer) Finish(ctx context.Context) error {
	select {
	case s.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Run synchronises at once and then on schedule, until ctx ends; then it returns
// nil. What goes wrong meanwhile is logged and stands in Status.
func (s *Syncer) Run(ctx context.Context) error {
	first := v1alpha1.SyncTriggerInitial
	if s.Status().LastSyncTime != nil {
		first = v1alpha1.SyncTriggerEvent
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.serveWishes(ctx) })
	if s.config.OnDemand {
		g.Go(func() error {
			if err := s.watchWishes(ctx); err != nil {
				// Everything comes on schedule all the same.
				s.config.Logger.Error("replicas cannot ask for anything", "error", err)
			}
			return nil
		})
	}
	g.Go(func() error {
		return recur(ctx, first, s.schedule, s.setNext, func(ctx context.Context, trigger v1alpha1.SyncTrigger) {
			// The error has been logged, and is in the status.
			_, _ = s.Sync(ctx, trigger)
		})
	})
	return g.Wait()
}
