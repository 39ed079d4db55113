package cache

import (
	"context"
	"errors"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// fill is the download of one blob that any number of readers follow.
//
// It runs on its own: readers come and go, and read the file behind it at their
// own pace. What may be read of it is decided by limit.
type fill struct {
	digest   digest.Digest
	cancel   context.CancelCauseFunc
	patience time.Duration // with a download that brings nothing

	mu       sync.Mutex // guards everything below
	changed  chan struct{}
	path     string // of the file to read
	known    bool   // size is
	size     int64
	written  int64
	moved    time.Time // when bytes last came as fast as they should, or it began
	resting  bool      // within its own limit
	distrust bool      // an upstream in use was wrong lately: nothing is read before it is verified
	state    fillState
	err      error // of a failed fill
	readers  int
	patient  int // among the readers: those that nobody waits behind
	unread   *time.Timer
}

type fillState int

const (
	filling  fillState = iota
	verified           // every byte is right; the file is being put into the store
	finished           // nothing more will happen: in the store, or not kept
	failed
)

var (
	// errBadContent reports that an upstream's bytes did not match the digest.
	errBadContent = errors.New("the upstream's content does not match the digest")
	// errStuck sends the readers away from a download that brings nothing.
	errStuck = errors.New("the download brings nothing")
	// errUnread ends a download that nobody has read for long.
	errUnread = errors.New("nobody reads it any more")
	// errShutdown ends downloads when the cache stops.
	errShutdown = errors.New("the cache is stopping")
)

func newFill(d digest.Digest, path string, patience time.Duration, cancel context.CancelCauseFunc) *fill {
	return &fill{digest: d, path: path, patience: patience, cancel: cancel, moved: time.Now(), changed: make(chan struct{})}
}

// update changes the fill under its lock and wakes everyone who waits for it.
func (f *fill) update(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fill) fail(err error) {
	f.update(func() { f.state, f.err = failed, err })
}

// await blocks until ready returns true, which is called with the lock held. It
// returns errStuck when the download has brought nothing for as long as its
// readers have patience: those who come again then do not wait anew.
func (f *fill) await(ctx context.Context, ready func() bool) error {
	for {
		f.mu.Lock()
		ok, changed, left := ready(), f.changed, time.Until(f.moved.Add(f.patience))
		if f.resting {
			left = f.patience
		}
		f.mu.Unlock()
		switch {
		case ok:
			return nil
		case left <= 0:
			return errStuck
		}
		timer := time.NewTimer(left)
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// awaitSize blocks until the size is known or the fill has failed.
func (f *fill) awaitSize(ctx context.Context) (int64, error) {
	err := f.await(ctx, func() bool { return f.known || f.state == failed })
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil && !f.known {
		err = f.err
	}
	return f.size, err
}

// awaitEnd blocks until the blob is in the store, or will not be, however long
// that takes.
func (f *fill) awaitEnd(ctx context.Context) error {
	for {
		f.mu.Lock()
		ended, err, changed := f.state == finished || f.state == failed, f.err, f.changed
		f.mu.Unlock()
		if ended {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// awaitStart blocks until there is something to read at pos, or nothing at all
// in an empty body, but no longer than patience. An error says that nothing
// will come, and that nothing has been promised to the client yet.
func (f *fill) awaitStart(ctx context.Context, pos int64, patience time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errBusy)
	defer cancel()
	var failure error
	err := f.await(ctx, func() bool {
		if f.limit(false) > pos || f.state == verified || f.state == finished {
			return true
		}
		failure = f.err
		return f.state == failed
	})
	if err == nil || errors.Is(err, errBusy) {
		return failure
	}
	return err
}

// limit returns how far the content may be read: all of it once it is
// verified; before, a small or dubious body not at all and a larger one up to
// its tail, so that no wrong body can ever be complete. Raw readers, which
// verify for themselves, get what there is. f.mu is held.
func (f *fill) limit(raw bool) int64 {
	switch {
	case f.state == verified, f.state == finished:
		return f.size
	case errors.Is(f.err, errBadContent):
		return 0
	case raw:
		return f.written
	default:
		return max(0, min(f.written, f.size-f.holdBack()))
	}
}

// holdBack returns how many bytes at the end wait for the digest. f.mu is held.
func (f *fill) holdBack() int64 {
	if f.size <= HoldBackWhole || f.distrust {
		return f.size
	}
	return holdBackTail
}

// readable is awaitBytes without the wait.
func (f *fill) readable(pos int64, raw bool) (limit int64, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	limit = f.limit(raw)
	return limit, limit > pos
}

// awaitBytes blocks until there is something to read at pos, and returns up to
// where. It returns the fill's error when nothing will come.
func (f *fill) awaitBytes(ctx context.Context, pos int64, raw bool) (int64, error) {
	var limit int64
	var failure error
	err := f.await(ctx, func() bool {
		limit, failure = f.limit(raw), f.err
		return limit > pos || f.state == failed
	})
	if err == nil && limit <= pos {
		err = failure
	}
	return limit, err
}

// open returns the file to follow, with an offset of its own.
func (f *fill) open() (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return os.Open(f.path)
}

// whole reports whether every byte is on the disk and right.
func (f *fill) whole() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state == verified || f.state == finished
}

// join and leave count the readers. A fill without any goes on for a while. A
// patient one makes hurry before it leaves.
func (f *fill) join(patient bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.readers++
	if patient {
		f.patient++
	}
	if f.unread != nil {
		f.unread.Stop()
		f.unread = nil
	}
}

func (f *fill) hurry() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.patient--
}

func (f *fill) leave(patience time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.readers--
	if f.readers == 0 && f.state == filling {
		f.unread = time.AfterFunc(patience, func() { f.cancel(errUnread) })
	}
}

// joinFill returns the download of d that is under way, nil if there is none.
// The caller leaves it when done.
func (c *Cache) joinFill(d digest.Digest) *fill { return c.joinFillAs(d, false) }

// joinFillAs is joinFill for a reader that may be a patient one.
func (c *Cache) joinFillAs(d digest.Digest, patient bool) *fill {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.fills[d]
	if f != nil {
		f.join(patient)
	}
	return f
}

// startFill begins the download that rq asks for, or joins one: started tells
// which. The caller leaves it when done. The error is errAgain when a download
// has just ended and the blob is in the store.
func (c *Cache) startFill(rq *request) (f *fill, started bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := rq.digest
	if f := c.fills[d]; f != nil {
		f.join(rq.patient())
		return f, false, nil
	}
	if c.stopping {
		return nil, false, refuse(http.StatusServiceUnavailable, "stopping", errShutdown.Error())
	}
	if rq.disk.store.has(d) {
		return nil, false, errAgain
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	f = newFill(d, rq.disk.store.partialPath(d), c.cfg.Timeouts.Headers+stallMargin, cancel)
	f.join(rq.patient())
	c.fills[d] = f
	c.work.Go(func() {
		defer cancel(nil)
		began := time.Now()
		c.metrics.inFlight.Inc()
		c.download(ctx, f, rq)
		c.metrics.inFlight.Dec()
		c.metrics.fillSeconds.Observe(time.Since(began).Seconds())
	})
	return f, true, nil
}

// endFill makes the next request for the blob look at the store again.
func (c *Cache) endFill(f *fill) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.fills, f.digest)
	f.mu.Lock()
	if f.unread != nil {
		f.unread.Stop()
	}
	f.mu.Unlock()
}
