package controller

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
	"github.com/connected-registry/connected-registry/syncer"
)

const (
	// patience is how long a synchronisation under way may go on when the
	// configuration has changed. What it has brought by then is not lost: the
	// next one goes on from it.
	patience = time.Minute
	// storeRetry is the time between two tries to open the content.
	storeRetry = 10 * time.Second
)

// job is what an engine does.
type job struct {
	// key changes with everything that the rest is made from.
	key  [sha256.Size]byte
	spec v1alpha1.Spec
	// config is made from the spec.
	config syncer.Config
}

// active reports whether there is anything to do beside looking after what is
// stored.
func (j *job) active() bool { return j != nil && !j.spec.Suspend }

// hasSource reports whether there is a registry that content comes from.
func (j *job) hasSource() bool {
	return j.config.Parent.Endpoint != "" || len(j.config.Upstreams) > 0
}

// engine synchronises, in both directions, as it is told last, and looks after
// what is stored. Its methods but run may be called from several goroutines.
type engine struct {
	open    func(context.Context) (*storage.Store, error)
	log     *slog.Logger
	metrics prometheus.Registerer
	changed chan struct{} // holds a value when the job or the resync asked for is another

	mu      sync.Mutex
	job     *job // nil: none
	resync  string
	current *syncer.Syncer // nil: not at work
	outbox  *syncer.Outbox
	before  v1alpha1.Status // as of the last syncer that ended
	resyncs string          // the last resync that was carried out
	fault   error           // why it is not at work though there is a job
}

func newEngine(open func(context.Context) (*storage.Store, error), before v1alpha1.Status, log *slog.Logger, metrics prometheus.Registerer) *engine {
	return &engine{
		open: open, log: log, metrics: metrics, changed: make(chan struct{}, 1),
		before: before, resyncs: before.LastResync, resync: before.LastResync,
	}
}

// set gives the engine another job; nil stops it. resync asks for a
// synchronisation now when it differs from what was carried out last.
func (e *engine) set(j *job, resync string) {
	e.mu.Lock()
	e.job, e.resync = j, resync
	e.mu.Unlock()
	select {
	case e.changed <- struct{}{}:
	default:
	}
}

// progress is how far an engine is.
type progress struct {
	v1alpha1.Status
	outbox syncer.OutboxStatus
	// fault is why nothing is synchronised though it should be.
	fault error
}

func (e *engine) progress() progress {
	e.mu.Lock()
	current, outbox := e.current, e.outbox
	p := progress{Status: e.before, fault: e.fault}
	resync := e.resyncs
	e.mu.Unlock()
	if current != nil {
		p.Status = current.Status()
	}
	if outbox != nil {
		p.outbox = outbox.Status()
	}
	p.LastResync = resync
	return p
}

func (e *engine) wanted() *job {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.job
}

// takeResync returns the resync that is asked for and was not carried out.
func (e *engine) takeResync() (value string, asked bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.resync, e.resync != "" && e.resync != e.resyncs
}

func (e *engine) fail(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil && (e.fault == nil || e.fault.Error() != err.Error()) {
		e.log.Error("nothing can be synchronised", "error", err)
	}
	e.fault = err
}

// run works until ctx ends.
func (e *engine) run(ctx context.Context) {
	store := e.store(ctx)
	if store == nil {
		return
	}
	defer store.Close() // never fails
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() { syncer.Maintain(ctx, store, e.collection, e.log) })
	for ctx.Err() == nil {
		j := e.wanted()
		if !j.active() {
			e.fail(nil)
			e.wait(ctx, 0)
			continue
		}
		if err := e.work(ctx, j, store); err != nil && ctx.Err() == nil {
			e.fail(err)
			e.wait(ctx, storeRetry)
		}
	}
}

// store opens the content, however often that takes. nil: ctx ended.
func (e *engine) store(ctx context.Context) *storage.Store {
	for ctx.Err() == nil {
		store, err := e.open(ctx)
		if err == nil {
			return store
		}
		if ctx.Err() == nil {
			e.fail(err)
			e.wait(ctx, storeRetry)
		}
	}
	return nil
}

// collection is what is wanted of garbage collection now.
func (e *engine) collection() v1alpha1.GarbageCollection {
	if j := e.wanted(); j != nil {
		return j.spec.GarbageCollection
	}
	return v1alpha1.GarbageCollection{Enabled: new(false), Schedule: v1alpha1.DefaultGarbageCollectionSchedule}
}

// wait returns when something changed, ctx ends, or d has passed. 0: never.
func (e *engine) wait(ctx context.Context, d time.Duration) {
	var after <-chan time.Time
	if d > 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		after = timer.C
	}
	select {
	case <-ctx.Done():
	case <-e.changed:
	case <-after:
	}
}

// work does a job until there is another one or ctx ends.
func (e *engine) work(ctx context.Context, j *job, store *storage.Store) error {
	registered := &scope{Registerer: e.metrics}
	defer registered.close()
	s, outbox, err := e.prepare(j, store, registered)
	if err != nil {
		return err
	}
	e.begin(s, outbox)
	defer e.end()
	ctx, stop := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer stop()
	group.Go(func() { _ = outbox.Run(ctx) }) // never fails
	if s != nil {
		group.Go(func() { _ = s.Run(ctx) }) // never fails
	}
	resyncing := ""
	for {
		if value, asked := e.takeResync(); asked && value != resyncing {
			resyncing = value
			group.Go(func() { e.carryOut(ctx, s, value) })
		}
		select {
		case <-ctx.Done():
			return nil
		case <-e.changed:
		}
		if next := e.wanted(); !next.active() {
			return nil
		} else if next.key != j.key {
			e.finish(ctx, s)
			return nil
		}
	}
}

// prepare makes what works on a job. The syncer is nil when there is nothing to
// synchronise with.
func (e *engine) prepare(j *job, store *storage.Store, registered *scope) (*syncer.Syncer, *syncer.Outbox, error) {
	config := j.config
	config.Store, config.Driver, config.Logger = store.Namespace(), store.Driver(), e.log
	out, err := config.Outbox(&j.spec, store)
	if err != nil {
		return nil, nil, err
	}
	if e.metrics != nil {
		config.Metrics, out.Metrics = registered, registered
	}
	outbox, err := syncer.NewOutbox(out)
	if err != nil || !j.hasSource() {
		return nil, outbox, err
	}
	e.mu.Lock()
	config.Before = e.before
	e.mu.Unlock()
	s, err := syncer.New(config)
	if err != nil {
		return nil, nil, fmt.Errorf("preparing the synchronisation: %w", err)
	}
	return s, outbox, nil
}

// carryOut synchronises by hand. It counts as done when it ended by itself, so
// that one which the leader's end interrupted is done again by the next.
func (e *engine) carryOut(ctx context.Context, s *syncer.Syncer, value string) {
	if s != nil {
		_, _ = s.Sync(ctx, v1alpha1.SyncTriggerManual) // logged, and in the status
	}
	if ctx.Err() == nil {
		e.mu.Lock()
		e.resyncs = value
		e.mu.Unlock()
	}
}

// finish lets the synchronisation under way end, within reason.
func (e *engine) finish(ctx context.Context, s *syncer.Syncer) {
	if s == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		_ = s.Finish(ctx) // or not: then it is interrupted
	}()
	for {
		select {
		case <-finished:
			return
		case <-e.changed:
			if !e.wanted().active() {
				cancel()
			}
		}
	}
}

func (e *engine) begin(s *syncer.Syncer, outbox *syncer.Outbox) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.current, e.outbox, e.fault = s, outbox, nil
}

func (e *engine) end() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.current != nil {
		e.before = e.current.Status()
	}
	e.current, e.outbox = nil, nil
}

// scope registers metrics for as long as one syncer lives.
type scope struct {
	prometheus.Registerer
	registered []prometheus.Collector
}

func (s *scope) Register(c prometheus.Collector) error {
	err := s.Registerer.Register(c)
	if err == nil {
		s.registered = append(s.registered, c)
	}
	return err
}

func (s *scope) MustRegister(all ...prometheus.Collector) {
	for _, c := range all {
		if err := s.Register(c); err != nil {
			panic(err)
		}
	}
}

func (s *scope) close() {
	for _, c := range s.registered {
		s.Unregister(c)
	}
}
