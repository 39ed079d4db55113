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
	// and must not block. nil: nobody is told.
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

// EventKind says what an Event is about.
type EventKind string

// The kinds of event.
const (
	// EventPlanned: Repository was compared with the parent, which has Tags
	// tags that are wanted.
	EventPlanned EventKind = "planned"
	// EventStarted: the image Digest, which Tag and perhaps other tags of
	// Repository stand for, is being brought; Missing are its blobs that are to
	// come.
	EventStarted EventKind = "started"
	// EventFetched: Bytes more of the blob Digest have arrived.
	EventFetched EventKind = "fetched"
	// EventBlob: the blob Digest of Bytes bytes is stored, or was already here
	// and is linked now (Linked).
	EventBlob EventKind = "blob"
	// EventTagged: Repository:Tag is whole and stands for Digest.
	EventTagged EventKind = "tagged"
	// EventRemoved: Repository:Tag is gone at the parent, or no longer selected,
	// and has been removed.
	EventRemoved EventKind = "removed"
	// EventFailed: Repository, or Repository:Tag, could not be brought, for
	// Err.
	EventFailed EventKind = "failed"
)

// Event is one thing that happened during a synchronisation. Which fields are
// set is said at each EventKind; Repository always is.
type Event struct {
	Kind       EventKind
	Repository string
	Tag        string
	Digest     string
	Tags       int
	Bytes      int64
	Linked     bool
	Missing    []Blob
	Err        error
}

// Blob is a blob by its digest, with its size in bytes.
type Blob struct {
	Digest string
	Size   int64
}

// Result is how one synchronisation went.
type Result struct {
	Trigger v1alpha1.SyncTrigger
	State   v1alpha1.SyncState
	Start   time.Time
	End     time.Time
	// BytesFetched is what the parent sent as blobs, manifests and lists.
	BytesFetched int64
	// BlobsFetched counts the blobs that were fetched, BlobsLinked the links
	// that were written to those which another repository had already.
	BlobsFetched int
	BlobsLinked  int
	// TagsUpdated is how many tags were written.
	TagsUpdated int
	// TagsRemoved is how many tags were removed.
	TagsRemoved int
	// Repositories are the selected repositories, by name, and those no longer
	// selected whose tags are held or could not be removed.
	Repositories []RepositoryResult
}

// RepositoryResult is how one repository went.
type RepositoryResult struct {
	Name        string
	TagsWanted  int
	TagsPresent int
	BytesLeft   int64
	// Held is why tags that are gone at the parent, or no longer selected, are
	// still here, in one line. Empty: none is held.
	Held string
	// Err is nil when everything wanted is present.
	Err error
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

// newRun prepares a synchronisation. It must be closed.
func (s *Syncer) newRun() *run {
	r := &run{
		origins:     s.origins(),
		store:       s.store,
		fetcher:     s.fetcher,
		referrers:   s.config.Referrers,
		removing:    s.config.DeletePropagation,
		clients:     s.config.ReadWrite,
		maxRemovals: s.config.MaxRemovals,
		checked:     s.checked,
		etags:       s.etags,
		progress:    s.config.Progress,
		log:         s.config.Logger,
	}
	s.mu.Lock()
	r.silentBefore = s.silent
	s.mu.Unlock()
	return r
}

func (r *run) close() {
	for _, o := range r.origins {
		o.parent.close()
	}
}

// received is how many bytes the registries sent.
func (r *run) received() (bytes int64) {
	for _, o := range r.origins {
		bytes += o.parent.received.Load()
	}
	return bytes
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

// finish sums a synchronisation up, clears away what it left, and makes the
// outcome the status.
func (s *Syncer) finish(ctx context.Context, r *run, trigger v1alpha1.SyncTrigger, start time.Time) (Result, error) {
	result := Result{Trigger: trigger, State: v1alpha1.SyncStateSucceeded, Start: start, BytesFetched: r.received()}
	var errs []error
	for _, err := range []error{r.unasked(), r.err} {
		if err != nil {
			errs = append(errs, err)
		}
	}
	for _, repo := range r.repositories {
		res := repo.result()
		result.Repositories = append(result.Repositories, res)
		if res.Err != nil {
			errs = append(errs, res.Err)
		}
	}
	if len(errs) == 0 && ctx.Err() == nil {
		// What was begun and nothing wants any more.
		if _, err := r.store.content.RemovePartials(); err != nil {
			errs = append(errs, writing("removing unfinished transfers", err))
		}
	}
	err := joinOnce(errs)
	switch {
	case errors.Is(err, errWindow):
		result.State = v1alpha1.SyncStateTimedOut
	case err != nil:
		result.State = v1alpha1.SyncStateFailed
	}
	r.mu.Lock()
	result.BlobsFetched, result.BlobsLinked, result.TagsUpdated = r.blobsFetched, r.blobsLinked, r.tagsUpdated
	result.TagsRemoved = r.tagsRemoved
	r.mu.Unlock()
	result.End = time.Now()
	s.checked.expire(result.End)
	s.end(result, err)
	return result, err
}

// joinOnce joins errors, each text once: that the parent is down is not said for
// every repository.
func joinOnce(errs []error) error {
	seen := make(map[string]bool)
	var distinct []error
	for _, err := range errs {
		if !seen[err.Error()] {
			distinct = append(distinct, err)
		}
		seen[err.Error()] = true
	}
	if len(distinct) == 1 {
		return distinct[0]
	}
	return errors.Join(distinct...)
}

// report logs how a synchronisation went. A problem that persists is logged when
// it appears and when it is gone, not every minute.
func (s *Syncer) report(ctx context.Context, result Result) {
	log := s.config.Logger
	if ctx.Err() != nil && !errors.Is(context.Cause(ctx), errWindow) {
		// Nothing is wrong with any repository: the program ends.
		log.Info("synchronisation interrupted, the next one goes on with it", "trigger", result.Trigger, "bytes_fetched", result.BytesFetched)
		s.metrics.observe(result)
		return
	}
	for _, repo := range result.Repositories {
		problem := ""
		if repo.Err != nil {
			problem = repo.Err.Error()
		}
		switch problem {
		case s.logged[repo.Name]:
		case "":
			log.Info("repository is complete again", "repository", repo.Name)
		default:
			log.Warn("repository is not complete", "repository", repo.Name, "tags_wanted", repo.TagsWanted, "tags_present", repo.TagsPresent, "error", problem)
		}
		s.logged[repo.Name] = problem
		if repo.Held != "" && repo.Held != s.held[repo.Name] {
			log.Warn("removal of tags is held", "repository", repo.Name, "reason", repo.Held)
		}
		s.held[repo.Name] = repo.Held
	}
	level := slog.LevelDebug
	if result.TagsUpdated > 0 || result.TagsRemoved > 0 || result.Trigger != v1alpha1.SyncTriggerSchedule {
		level = slog.LevelInfo
	}
	log.Log(ctx, level, "synchronisation ended",
		"trigger", result.Trigger, "state", result.State, "duration", result.End.Sub(result.Start).Round(time.Millisecond),
		"tags_updated", result.TagsUpdated, "tags_removed", result.TagsRemoved, "blobs_fetched", result.BlobsFetched, "blobs_linked", result.BlobsLinked, "bytes_fetched", result.BytesFetched)
	s.metrics.observe(result)
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
