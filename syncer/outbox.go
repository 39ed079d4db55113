package syncer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

const (
	// lookInterval is how often the journal is looked at: replicas on other
	// machines write it, of which the file system tells nobody.
	lookInterval = time.Second
	// A parent that cannot be reached, or a repository that cannot be brought, is
	// tried again after a wait that doubles between these.
	firstOutboxWait = time.Second
	longOutboxWait  = 5 * time.Minute
	// maxOutbox is how many changes are dealt with at a time.
	maxOutbox = 1000
	// maxConflicts is how many conflicts are told of.
	maxConflicts = 20
)

// OutboxConfig is what an Outbox needs.
type OutboxConfig struct {
	// Store holds the journal and the content. Required.
	Store *storage.Store
	// Parent gets the changes. Its Endpoint empty: there is none, and changes
	// are told of and forgotten.
	Parent Parent
	// Repositories and Upstreams are those of the Config, for the names that
	// repositories have at the parent. What comes from another upstream stays
	// here when it is changed.
	Repositories []v1alpha1.Repository
	Upstreams    []Upstream
	// TTL is how long a change is kept for the parent. 0: two days.
	TTL time.Duration
	// ChunkSize is how many bytes of a blob one request sends. 0: 16 MiB.
	ChunkSize int64
	// Notify is told of each change, at least once, before it is forgotten. nil:
	// nobody is.
	Notify func(context.Context, storage.Entry) error
	// Logger takes the log. nil: none.
	Logger *slog.Logger
	// Metrics registers the outbox's metrics. nil: none are kept.
	Metrics prometheus.Registerer
}

// Outbox translates what a valid resource says about what clients change here.
// c is what FromSpec made of the same spec; Notify and all that belongs to the
// process are left to the caller.
func (c Config) Outbox(spec *v1alpha1.Spec, store *storage.Store) (OutboxConfig, error) {
	ttl, err := v1alpha1.ParseDuration(spec.Sync.MessageTTL)
	if err != nil {
		return OutboxConfig{}, fmt.Errorf("spec.sync.messageTTL: %w", err)
	}
	return OutboxConfig{
		Store:        store,
		Parent:       c.Parent,
		Repositories: c.Repositories,
		Upstreams:    c.Upstreams,
		TTL:          ttl,
		ChunkSize:    c.ChunkSize,
		Logger:       c.Logger,
	}, nil
}

// Outbox brings to the parent what clients pushed and deleted here: in order for
// each repository, at least once, within the TTL, from a journal that survives
// every process.
//
// Where a tag of the parent has moved meanwhile, to something that it stood for
// here neither before the change nor after, the parent's stays: the image that
// was pushed here goes to the parent by its digest alone, a deletion is dropped,
// the next synchronisation brings the parent's, and the conflict is reported.
//
// Of several changes to one tag that wait, the last counts. A repository that was
// deleted here stays at the parent, which knows no such request.
type Outbox struct {
	config    OutboxConfig
	store     *store
	limits    limits
	dial      dialer
	pace      *pace
	selection selection   // of the parent
	others    []selection // of the upstreams
	metrics   *outboxMetrics

	told  map[string]bool        // entries that Notify was told of
	waits map[string]*outboxWait // by repository
	down  outboxWait             // of the parent

	mu     sync.Mutex
	status OutboxStatus
}

type outboxWait struct {
	until time.Time
	wait  time.Duration
}

func (w *outboxWait) failed(now time.Time) {
	w.wait = min(max(2*w.wait, firstOutboxWait), longOutboxWait)
	w.until = now.Add(w.wait)
}

// OutboxStatus says how far the parent is behind.
type OutboxStatus struct {
	// Waiting is how many changes are to be brought, Oldest when the first of
	// them was made; the zero time when there is none.
	Waiting int
	Oldest  time.Time
	// Brought, Dropped and Conflicts count changes since the start: those that
	// the parent has taken, those that it has not within the TTL, and those
	// that contradict one there.
	Brought, Dropped, Conflicts int
	// Recent are the last conflicts and dropped changes, in one line each.
	Recent []string
	// Problems are why changes wait, by repository; under "" why all do.
	Problems map[string]string
}

// problems are Recent and Problems, in one line each.
func (s OutboxStatus) problems() []string {
	lines := slices.Clone(s.Recent)
	for _, name := range slices.Sorted(maps.Keys(s.Problems)) {
		line := s.Problems[name]
		if name != "" {
			line = name + ": " + line
		}
		lines = append(lines, line)
	}
	return lines
}

// NewOutbox checks the configuration.
func NewOutbox(c OutboxConfig) (*Outbox, error) {
	if c.Store == nil {
		return nil, errors.New("outbox: Store is required")
	}
	c.TTL = cmp.Or(c.TTL, 48*time.Hour)
	c.ChunkSize = cmp.Or(c.ChunkSize, v1alpha1.DefaultChunkSizeInMb<<20)
	c.Logger = cmp.Or(c.Logger, slog.New(slog.DiscardHandler))
	o := &Outbox{
		config: c,
		store:  &store{c.Store.Namespace(), c.Store},
		limits: defaultLimits(),
		pace:   &pace{},
		told:   make(map[string]bool),
		waits:  make(map[string]*outboxWait),
	}
	var err error
	if o.selection, err = newSelection("", c.Repositories); err != nil {
		return nil, fmt.Errorf("outbox: Repositories: %w", err)
	}
	for _, u := range c.Upstreams {
		other, err := newSelection(u.Prefix, u.Repositories)
		if err != nil {
			return nil, fmt.Errorf("outbox: Upstreams: %w", err)
		}
		o.others = append(o.others, other)
	}
	if o.metrics, err = newOutboxMetrics(c.Metrics); err != nil {
		return nil, fmt.Errorf("outbox: Metrics: %w", err)
	}
	return o, nil
}

// Status returns a snapshot.
func (o *Outbox) Status() OutboxStatus {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.status
	s.Recent = slices.Clone(s.Recent)
	s.Problems = maps.Clone(s.Problems)
	return s
}

// Run brings changes until ctx ends, then returns nil.
func (o *Outbox) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := o.look(ctx); err != nil && ctx.Err() == nil {
			o.problem("", err)
		}
		_ = sleep(ctx, lookInterval)
	}
	return nil
}

// look deals with what is in the journal, as far as that can be done now.
func (o *Outbox) look(ctx context.Context) error {
	entries, err := o.config.Store.Journal().Entries(ctx, maxOutbox)
	if err != nil {
		return err
	}
	o.count(ctx, entries)
	o.tell(ctx, entries)
	if len(entries) == 0 || time.Now().Before(o.down.until) {
		return nil
	}
	var p *parent
	if o.config.Parent.Endpoint != "" {
		p = newParent(o.config.Parent, o.limits, o.dial, o.config.Logger)
		p.pace = o.pace
		defer p.close()
	}
	for _, name := range repositoriesOf(entries) {
		if w := o.waits[name]; w != nil && time.Now().Before(w.until) {
			continue
		}
		err := o.repository(ctx, p, name, entries)
		if ctx.Err() != nil {
			return nil
		}
		if f, ok := errors.AsType[*fault](err); ok && (f.down || f.unreachable) {
			o.down.failed(time.Now())
			return err
		}
		o.settle(name, err)
	}
	o.down = outboxWait{}
	o.problem("", nil)
	return nil
}

// settle remembers how a repository went.
func (o *Outbox) settle(name string, err error) {
	o.problem(name, err)
	if err == nil {
		delete(o.waits, name)
		return
	}
	w := o.waits[name]
	if w == nil {
		w = &outboxWait{}
		o.waits[name] = w
	}
	w.failed(time.Now())
}

// problem records why changes wait, nil if they do not, and logs what is new.
func (o *Outbox) problem(name string, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err == nil {
		delete(o.status.Problems, name)
		return
	}
	if o.status.Problems[name] != err.Error() {
		o.config.Logger.Error("what clients changed cannot be brought to the parent", "repository", name, "error", err)
	}
	if o.status.Problems == nil {
		o.status.Problems = make(map[string]string)
	}
	o.status.Problems[name] = err.Error()
}

func (o *Outbox) count(ctx context.Context, entries []storage.Entry) {
	waiting, oldest := len(entries), time.Time{}
	if len(entries) > 0 {
		oldest = entries[0].Time
	}
	if len(entries) == maxOutbox {
		if n, _, err := o.config.Store.Journal().Backlog(ctx); err == nil {
			waiting = n
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.status.Waiting, o.status.Oldest = waiting, oldest
	o.metrics.waiting.Set(float64(waiting))
}

// tell tells of the changes that are new.
func (o *Outbox) tell(ctx context.Context, entries []storage.Entry) {
	if o.config.Notify == nil {
		return
	}
	still := make(map[string]bool, len(entries))
	for _, e := range entries {
		still[e.ID] = true
		if o.told[e.ID] {
			continue
		}
		if err := o.config.Notify(ctx, e); err != nil {
			o.config.Logger.Error("a change cannot be told of", "repository", e.Repository, "error", err)
		}
	}
	o.told = still
}

func repositoriesOf(entries []storage.Entry) []string {
	var names []string
	for _, e := range entries {
		if !slices.Contains(names, e.Repository) {
			names = append(names, e.Repository)
		}
	}
	return names
}

// repository deals with the changes of one repository, in order.
func (o *Outbox) repository(ctx context.Context, p *parent, name string, entries []storage.Entry) error {
	remote, ours := o.remote(name)
	for _, c := range changesOf(name, entries) {
		outcome := outcome{}
		if p != nil && ours {
			var err error
			w := &outboxWriter{Outbox: o, parent: p, local: name, remote: remote}
			if outcome, err = w.bring(ctx, c); err != nil {
				if time.Since(c.last.Time) <= o.config.TTL || ctx.Err() != nil {
					return err
				}
				outcome.dropped = fmt.Sprintf("%s is not at the parent: it could not be brought within %s: %s", c, o.config.TTL, err)
			}
		}
		if err := o.config.Store.Journal().Done(ctx, c.ids...); err != nil {
			return err
		}
		o.record(c, outcome)
	}
	return nil
}

// remote is what a repository here is called at the parent; ours is false when it
// comes from another upstream.
func (o *Outbox) remote(local string) (remote string, ours bool) {
	if part, remote := o.selection.of(local); len(part) > 0 {
		return remote, true
	}
	for _, other := range o.others {
		if part, _ := other.of(local); len(part) > 0 {
			return "", false
		}
	}
	return local, true
}

// outcome is what became of a change.
type outcome struct {
	conflict string // why it was not carried out, in one line
	dropped  string // the same
}

func (o *Outbox) record(c change, out outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := len(c.ids)
	switch {
	case out.dropped != "":
		o.status.Dropped += n
		o.metrics.dropped.Add(float64(n))
	case out.conflict != "":
		o.status.Conflicts += n
		o.metrics.conflicts.Add(float64(n))
	default:
		o.status.Brought += n
		o.metrics.brought.Add(float64(n))
		return
	}
	line := cmp.Or(out.dropped, out.conflict)
	o.config.Logger.Warn(line)
	o.status.Recent = append(o.status.Recent, line)
	o.status.Recent = o.status.Recent[max(len(o.status.Recent)-maxConflicts, 0):]
}

// change is what waits for one tag, or for one manifest without.
type change struct {
	last storage.Entry
	ids  []string
	// known are what the tag stood for here before and after each change, which
	// the parent's may stand for without being lost.
	known []digest.Digest
	// pushed are what was pushed.
	pushed []digest.Digest
}

func (c change) String() string {
	s := "the " + string(c.last.Action) + " of " + c.last.Repository
	if c.last.Tag != "" {
		s += ":" + c.last.Tag
	}
	if c.last.Digest != "" {
		s += "@" + c.last.Digest.String()
	}
	return s
}

// changesOf puts together what happened to the same tag of a repository, in the
// order in which that happened last.
func changesOf(repository string, entries []storage.Entry) []change {
	var changes []change
	for _, e := range entries {
		if e.Repository != repository {
			continue
		}
		c := change{last: e, ids: []string{e.ID}, known: []digest.Digest{e.Previous, e.Digest}}
		if e.Action == storage.ActionPush {
			c.pushed = []digest.Digest{e.Digest}
		}
		i := slices.IndexFunc(changes, func(c change) bool {
			return c.last.Tag == e.Tag && (e.Tag != "" || c.last.Digest == e.Digest && c.last.Action == e.Action)
		})
		if i >= 0 {
			c.ids = append(changes[i].ids, c.ids...)
			c.known = append(changes[i].known, c.known...)
			c.pushed = append(changes[i].pushed, c.pushed...)
			changes = slices.Delete(changes, i, i+1)
		}
		changes = append(changes, c)
	}
	return changes
}
