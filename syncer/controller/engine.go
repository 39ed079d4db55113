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
	// key changes with everything that config is made from.
	key    [sha256.Size]byte
	config syncer.Config
}

// engine synchronises as it is told last. Its methods but run may be called from
// several goroutines.
type engine struct {
	open    func(context.Context) (*storage.Store, error)
	log     *slog.Logger
	metrics prometheus.Registerer
	changed chan struct{} // holds a value when the job or the resync asked for is another

	mu      sync.Mutex
	job     *job // nil: none
	resync  string
	current *syncer.Syncer  // nil: not at work
	before  v1alpha1.Status // as of the last one that ended
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

// status is how far the synchronisation is. The error is why there is none.
func (e *engine) status() (v1alpha1.Status, error) {
	e.mu.Lock()
	current, status, resync, fault := e.current, e.before, e.resyncs, e.fault
	e.mu.Unlock()
	if current != nil {
		status = current.Status()
	}
	status.LastResync = resync
	return status, fault
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
	var store *storage.Store
	defer func() {
		if store != nil {
			_ = store.Close() // never fails
		}
	}()
	for ctx.Err() == nil {
		j := e.wanted()
		if j == nil {
			e.fail(nil)
			e.wait(ctx, 0)
			continue
		}
		var err error
		if store == nil {
			store, err = e.open(ctx)
		}
		if err == nil {
			err = e.work(ctx, j, store)
		}
		if err != nil && ctx.Err() == nil {
			e.fail(err)
			e.wait(ctx, storeRetry)
		}
	}
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
	config := j.config
	config.Store, config.Driver = store.Namespace(), store.Driver()
	config.Logger = e.log
	if e.metrics != nil {
		config.Metrics = registered
	}
	e.mu.Lock()
	config.Before = e.before
	e.mu.Unlock()
	s, err := syncer.New(config)
	if err != nil {
		return fmt.Errorf("preparing the synchronisation: %w", err)
	}
	e.fail(nil)
	e.begin(s)
	defer e.end()
	ctx, stop := context.WithCancel(ctx)
	var group sync.WaitGroup
	group.Go(func() {
		_ = s.Run(ctx) // never fails
	})
	defer group.Wait()
	defer stop()
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
		if next := e.wanted(); next == nil {
			return nil
		} else if next.key != j.key {
			e.finish(ctx, s)
			return nil
		}
	}
}

// carryOut synchronises by hand. It counts as done when it ended by itself, so
// that one which the leader's end interrupted is done again by the next.
func (e *engine) carryOut(ctx context.Context, s *syncer.Syncer, value string) {
	_, _ = s.Sync(ctx, v1alpha1.SyncTriggerManual) // logged, and in the status
	if ctx.Err() == nil {
		e.mu.Lock()
		e.resyncs = value
		e.mu.Unlock()
	}
}

// finish lets the synchronisation under way end, within reason.
func (e *engine) finish(ctx context.Context, s *syncer.Syncer) {
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
			if e.wanted() == nil {
				cancel()
			}
		}
	}
}

func (e *engine) begin(s *syncer.Syncer) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.current = s
}

func (e *engine) end() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.before, e.current = e.current.Status(), nil
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
