package storage

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"time"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// tombstone says that the collector is after something, which stays where it is
// meanwhile. It is an object below limbo, at the path of what it is about, and is
// changed on condition that it is what it was, so that of two who would, one
// does. It goes from
//
//	condemned: what it is about will be deleted if nobody asks for it, to
//	rescued:   somebody did, and from there to condemned again; or to
//	reaping:   it is being deleted, and can be had no more.
//
// What protects the work of others, without a lock:
//
//   - Whoever relies on a link renews it, on condition that it is still there,
//     and reads the tombstone after. A collector that has condemned or is reaping
//     a link looks at its time after.
//   - Whoever makes a link reads its tombstone after, and the blob's, and then
//     looks for the blob. A collector lists the links after it has condemned the
//     blob, and before it reaps it.
//   - Whoever meets a tombstone that says condemned, or puts a blob under one,
//     has it say rescued first. If it says reaping, they wait until it is gone,
//     and look again whether what it is about is.
//   - A collector deletes within half of reapTime of having said reaping, and a
//     tombstone that has said so for longer is as good as condemned. So one that
//     died on the way holds nobody up for long, and one that comes to its senses
//     late does no harm.
type tombstone struct {
	State string `json:"state"`
	Nonce string `json:"nonce"` // tells it from one that another has put
}

const (
	stateCondemned = "condemned"
	stateRescued   = "rescued"
	stateReaping   = "reaping"
)

const (
	reapTime = 4 * time.Minute
	waitTime = 30 * time.Second
	// orphanTime is for how long a tombstone stays when what it is about is gone.
	orphanTime = 24 * time.Hour
)

var errReaping = errors.New("it is being deleted: try again in a minute")

// grave is a tombstone as it was read.
type grave struct {
	tombstone
	version string
	since   time.Time
}

func limboKey(path string) string { return limboDir + path }

// grave reads the tombstone of what lies at path.
func (o *objects) grave(ctx context.Context, path string) (grave, error) {
	content, at, err := readObject(ctx, o.bucket, limboKey(path))
	if err != nil {
		return grave{}, err
	}
	g := grave{version: at.Version, since: o.clock.local(at.Modified)}
	if err := json.Unmarshal(content, &g.tombstone); err != nil {
		g.State = stateCondemned // damaged: nobody is reaping by it
	}
	return g, nil
}

// waiting tells whether the collector may go on with it: condemned, or given up
// half done.
func (o *objects) waiting(g grave) bool {
	return g.State == stateCondemned || g.State == stateReaping && time.Since(g.since) > o.reapTime
}

// bury puts a tombstone in the place of the one that was read; of none, if its
// version is empty. The error wraps bucket.ErrCondition when another did. After
// any other it may be there all the same: what is returned has no version then.
func (o *objects) bury(ctx context.Context, path, state string, was grave) (grave, error) {
	t := tombstone{State: state, Nonce: rand.Text()}
	content, err := json.Marshal(t)
	if err != nil {
		return grave{}, err
	}
	at, err := o.bucket.Put(ctx, limboKey(path), content, nil, bucket.Conditions{Absent: was.version == "", Version: was.version})
	if err != nil {
		return grave{tombstone: t}, err
	}
	o.clock.seen(at)
	return grave{tombstone: t, version: at.Version, since: o.clock.local(at.Modified)}, nil
}

// rely has whatever lies at path stay for somebody who has said so already, by
// making or renewing a link. It may have been deleted until then: waited tells
// that it is worth another look.
func (o *objects) rely(ctx context.Context, path string) (waited bool, err error) {
	began := time.Now()
	for pause := 50 * time.Millisecond; ; {
		g, err := o.grave(ctx, path)
		if errors.Is(err, fs.ErrNotExist) || err == nil && g.State == stateRescued {
			return waited, nil
		}
		if err != nil {
			return waited, err
		}
		if o.waiting(g) {
			_, err := o.bury(ctx, path, stateRescued, g)
			if errors.Is(err, bucket.ErrCondition) {
				continue // the collector, or another who relies on it
			}
			return waited, err
		}
		if time.Since(began) > o.waitTime {
			return waited, fmt.Errorf("%s: %w", path, errReaping)
		}
		waited = true
		if !sleep(ctx, pause) {
			return waited, context.Cause(ctx)
		}
		pause = min(2*pause, time.Second)
	}
}

// spare has a tombstone say rescued if it says condemned, and reports whether
// there was such a one.
func (o *objects) spare(ctx context.Context, path string) (bool, error) {
	for {
		g, err := o.grave(ctx, path)
		if err != nil {
			return false, ignoreAbsent(err)
		}
		if !o.waiting(g) {
			return g.State == stateRescued, nil
		}
		if _, err = o.bury(ctx, path, stateRescued, g); !errors.Is(err, bucket.ErrCondition) {
			return err == nil, err
		}
	}
}

// sentence has a tombstone say condemned, and reports whether it does.
func (o *objects) sentence(ctx context.Context, path string) (bool, error) {
	_, err := o.bury(ctx, path, stateCondemned, grave{})
	if !errors.Is(err, bucket.ErrCondition) {
		return err == nil, err
	}
	g, err := o.grave(ctx, path)
	if err != nil {
		return false, ignoreAbsent(err)
	}
	if g.State != stateRescued {
		return g.State == stateCondemned, nil
	}
	_, err = o.bury(ctx, path, stateCondemned, g)
	if errors.Is(err, bucket.ErrCondition) {
		return false, nil
	}
	return err == nil, err
}

// reaper deletes things under their tombstones, within the time that it has.
type reaper struct {
	o      *objects
	ctx    context.Context // ends with that time
	cancel context.CancelFunc
	graves map[string]grave // that say reaping, and that this one put, by path
}

// reaper begins to reap. Its release is to be called.
func (o *objects) reaper(ctx context.Context) *reaper {
	ctx, cancel := context.WithTimeout(ctx, o.reapTime/2)
	return &reaper{o: o, ctx: ctx, cancel: cancel, graves: make(map[string]grave)}
}

// claim has the tombstones of all paths say reaping. It is false when one of
// them has not waited for that.
func (r *reaper) claim(paths []string) (bool, error) {
	var mu sync.Mutex
	lost := false
	err := inParallel(r.ctx, paths, func(ctx context.Context, path string) error {
		g, err := r.o.grave(ctx, path)
		waiting := err == nil && r.o.waiting(g)
		if waiting {
			g, err = r.o.bury(ctx, path, stateReaping, g)
		}
		mu.Lock()
		defer mu.Unlock()
		if errors.Is(err, bucket.ErrCondition) || errors.Is(err, fs.ErrNotExist) || err == nil && !waiting {
			lost = true
			return nil
		}
		if waiting {
			r.graves[path] = g // perhaps, if there was an error
		}
		return err
	})
	return err == nil && !lost, err
}

// release gives back what was claimed and not deleted. What cannot be is as good
// as given back before long.
func (r *reaper) release() {
	r.cancel()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), r.o.waitTime)
	defer cancel()
	for path, mine := range r.graves {
		g := mine
		var err error
		if mine.version == "" {
			g, err = r.o.grave(ctx, path)
		}
		if err == nil && g.Nonce == mine.Nonce {
			_, err = r.o.bury(ctx, path, stateRescued, g)
		}
		if err != nil {
			r.o.log.Debug("tombstone not withdrawn", "path", path, "error", err)
		}
	}
}

// remove deletes what lies at paths, and then their tombstones.
func (r *reaper) remove(paths []string) error {
	for _, path := range paths {
		// Whatever the answer will be, it may be gone: nobody else is to be
		// told that it stays before it is clear.
		delete(r.graves, path)
	}
	err := inParallel(r.ctx, paths, func(ctx context.Context, path string) error {
		return r.o.bucket.Delete(ctx, objectKey(path))
	})
	if err != nil {
		return err
	}
	return inParallel(r.ctx, paths, func(ctx context.Context, path string) error {
		return r.o.bucket.Delete(ctx, limboKey(path))
	})
}

// sweepTombs removes tombstones of what is gone, which nobody has changed for
// long.
func (o *objects) sweepTombs(ctx context.Context) error {
	for at, err := range o.bucket.List(ctx, limboDir+"/", "", "") {
		if err != nil {
			return err
		}
		if time.Since(o.clock.local(at.Modified)) < orphanTime {
			continue
		}
		_, err := o.bucket.Stat(ctx, objectKey(strings.TrimPrefix(at.Key, limboDir)))
		if errors.Is(err, fs.ErrNotExist) {
			err = o.bucket.Delete(ctx, at.Key)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
