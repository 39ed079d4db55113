package daemon

import (
	"context"
	"fmt"
	"sync"
	"time"
)

const (
	// runtimeInterval is between two looks at a runtime that nothing is wrong
	// with, runtimeRetry when something is. firstLookTime bounds the look that
	// everything else waits for.
	runtimeInterval = 5 * time.Minute
	runtimeRetry    = time.Minute
	firstLookTime   = 15 * time.Second
)

// Runtime is the node's container runtime as the agent sees it.
type Runtime interface {
	// Look finds out about the runtime and, if that is allowed and needed,
	// changes its configuration and restarts it when it is this node's turn. The
	// error says what is wrong, or left to do; the findings hold all the same.
	// What was begun is ended though ctx is.
	Look(ctx context.Context, allowed bool, turn Turn) (RuntimeFindings, error)
}

// Turn waits until this node alone may restart its runtime, or ctx ends. Unlock
// ends the turn.
type Turn func(ctx context.Context) (unlock func(), err error)

// RuntimeFindings are what was found out about a node's runtime.
type RuntimeFindings struct {
	// CertsDir is the hosts directory that it reads, inside the node root. Empty:
	// it is not known.
	CertsDir string
	// Reserved are registries that the node's distribution looks after, and that
	// are not mirrored therefore.
	Reserved []string
	// Report is for AnnotationRuntime.
	Report string
}

// runtimeNews is what a look gave.
type runtimeNews struct {
	RuntimeFindings
	err error
}

// runtimeWatch looks at the runtime now and then.
type runtimeWatch struct {
	runtime Runtime
	turn    Turn
	tell    func(runtimeNews)
	woken   chan struct{} // holds one element when there is something to do

	mu      sync.Mutex // guards what follows
	allowed bool
	left    bool
	cancel  context.CancelFunc // of the look under way
	looking sync.Mutex         // held by it
}

// allow says whether the runtime may be changed from now on. It ends a leave.
func (w *runtimeWatch) allow(allowed bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if allowed == w.allowed && !w.left {
		return
	}
	w.allowed, w.left = allowed, false
	select {
	case w.woken <- struct{}{}:
	default:
	}
}

// leave ends all looks, and waits for the one under way.
func (w *runtimeWatch) leave() {
	w.mu.Lock()
	w.left = true
	if w.cancel != nil {
		w.cancel()
	}
	w.mu.Unlock()
	w.looking.Lock()
	defer w.looking.Unlock()
}

// first looks once, without changing anything.
func (w *runtimeWatch) first(ctx context.Context) runtimeNews {
	if w.runtime == nil {
		return runtimeNews{}
	}
	ctx, cancel := context.WithTimeout(ctx, firstLookTime)
	defer cancel()
	findings, err := w.runtime.Look(ctx, false, w.turn)
	return runtimeNews{findings, err}
}

func (w *runtimeWatch) run(ctx context.Context) {
	if w.runtime == nil {
		return
	}
	timer := time.NewTimer(jitter(runtimeRetry))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.woken:
		case <-timer.C:
		}
		err := w.look(ctx)
		timer.Reset(runtimeInterval)
		if err != nil {
			timer.Reset(runtimeRetry)
		}
	}
}

func (w *runtimeWatch) look(ctx context.Context) error {
	w.looking.Lock()
	defer w.looking.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w.mu.Lock()
	allowed, left := w.allowed, w.left
	w.cancel = cancel
	w.mu.Unlock()
	if left {
		return nil
	}
	findings, err := w.runtime.Look(ctx, allowed, w.turn)
	if ctx.Err() == nil {
		w.tell(runtimeNews{findings, err})
	}
	return err
}

// certsDir is where host configuration is written.
func (d *Daemon) certsDir() string {
	if d.cfg.CertsDir != "" {
		return d.cfg.CertsDir
	}
	return d.found.CertsDir
}

func (d *Daemon) runtimeFault() error {
	if d.found.err == nil {
		return nil
	}
	return fmt.Errorf("container runtime: %w", d.found.err)
}
