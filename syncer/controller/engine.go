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
	// config is made from the spec and secrets, which were read for it.
	config  syncer.Config
	secrets syncer.Secrets
}

// synchronises reports whether there is a registry that content comes from, and
// whether it is to be asked.
func (j *job) synchronises() bool {
	return j != nil && !j.spec.Suspend && (j.config.Parent.Endpoint != "" || len(j.config.Upstreams) > 0)
}

// engine synchronises as it is told last, and does what goes with that; see
// syncer.Duties. Its methods but run may be called from several goroutines.
type engine struct {
	open    func(context.Context) (*storage.Store, error)
	log     *slog.Logger
	metrics prometheus.Registerer
	changed chan struct{} // holds a value when the job or the resync asked for is another

	mu      sync.Mutex
	job     *job // nil: none
	resync  string
	current *syncer.Syncer // nil: not at work
	duties  *syncer.Duties
	before  v1alpha1.Status // as of the last job that ended
	looked  time.Time       // when the duties were last asked how they stand
	resyncs string          // the last resync that was carried out
	fault   error           // why it is not at work though there is a job
}

func newEngine(open func(context.Context) (*storage.Store, error), before v1alpha1.Status, log *slog.Logger, metrics prometheus.Registerer) *engine {
	return &engine{
		open: open, log: log, metrics: metrics, changed: make(chan struct{}, 1),
		before: syncer.TakenOver(before), resyncs: before.LastResync, resync: before.LastResync,
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

// status is how far the engine is. The error is why nothing is synchronised though
// it should be.
func (e *engine) status(ctx context.Context) (v1alpha1.Status, error) {
	e.look(ctx)
	e.mu.Lock()
	defer e.mu.Unlock()
	status := e.before
	if e.current != nil {
		status = e.current.Status()
		status.Changes, status.Notifications, status.Children = e.before.Changes, e.before.Notifications, e.before.Children
	}
	status.LastResync = e.resyncs
	return status, e.fault
}

// look asks the duties how they stand, if that was a while ago. They read what is
// stored for it, while nothing else waits.
func (e *engine) look(ctx context.Context) {
	e.mu.Lock()
	duties, stand := e.duties, e.before
	due := duties != nil && time.Since(e.looked) >= progressInterval
	if due {
		e.looked = time.Now()
	}
	e.mu.Unlock()
	if !due {
		return
	}
	duties.Status(ctx, &stand)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.duties == duties { // else the job has ended, and it is known how
		e.before.Changes, e.before.Notifications, e.before.Children = stand.Changes, stand.Notifications, stand.Children
	}
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
	defer func() { _ = store.Close() }() // never fails
	for ctx.Err() == nil {
		j := e.wanted()
		if j == nil {
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
	s, duties, err := e.prepare(ctx, j, store, registered)
	if err != nil {
		return err
	}
	e.begin(s, duties)
	defer e.end(context.WithoutCancel(ctx))
	ctx, stop := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer stop()
	group.Go(func() { _ = duties.Run(ctx) }) // never fails
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
		if next := e.wanted(); next == nil || next.spec.Suspend && !j.spec.Suspend {
			return nil
		} else if next.key != j.key {
			e.finish(ctx, s)
			return nil
		}
	}
}

// prepare makes what works on a job. The syncer is nil when there is nothing to
// synchronise with.
func (e *engine) prepare(ctx context.Context, j *job, store *storage.Store, registered *scope) (*syncer.Syncer, *syncer.Duties, error) {
	config := j.config
	config.Store, config.Driver, config.Logger = store.Namespace(), store.Driver(), e.log
	if e.metrics != nil {
		config.Metrics = registered
	}
	duties, err := syncer.NewDuties(ctx, syncer.DutiesConfig{
		Name: config.Name, Spec: &j.spec, Sync: config, Store: store, Secrets: j.secrets, Logger: e.log, Metrics: config.Metrics,
	})
	if err != nil {
		return nil, nil, err
	}
	if !j.synchronises() {
		return nil, duties, nil
	}
	config.Progress = duties.Progress
	e.mu.Lock()
	config.Before = e.before
	e.mu.Unlock()
	s, err := syncer.New(config)
	if err != nil {
		return nil, nil, fmt.Errorf("preparing the synchronisation: %w", err)
	}
	return s, duties, nil
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
			if !e.wanted().synchronises() {
				cancel()
			}
		}
	}
}

func (e *engine) begin(s *syncer.Syncer, duties *syncer.Duties) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.current, e.duties, e.fault, e.looked = s, duties, nil, time.Time{}
}

// lastLook bounds for how long what is stored is looked at when an engine ends.
const lastLook = 5 * time.Second

func (e *engine) end(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lastLook)
	defer cancel()
	e.mu.Lock()
	current, duties, last := e.current, e.duties, e.before
	e.mu.Unlock()
	if current != nil {
		children := last.Children
		last = current.Status()
		last.Children = children
	}
	duties.Status(ctx, &last)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.before, e.current, e.duties = last, nil, nil
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
