package cache

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	// prefetchEvery is how often wanted images are looked at again: tags move,
	// and the store may have had to give something up.
	prefetchEvery = 15 * time.Minute
	// While something is missing they are looked at after prefetchRetry, which
	// doubles up to prefetchEvery.
	prefetchRetry = time.Minute
)

// wanted is what SetPrefetch was given last.
type wanted struct {
	images    []string
	bandwidth int64
	replaced  chan struct{} // closed when it is not what is wanted any more
}

// SetPrefetch replaces the images that Run keeps here, and the bandwidth for
// bringing them; see [Cache.Prefetch] for both. They are brought at once, and
// looked at again every quarter of an hour. What is not wanted any more stays
// like everything else.
func (c *Cache) SetPrefetch(images []string, bandwidth int64) {
	old := c.wanted.Swap(&wanted{images: images, bandwidth: bandwidth, replaced: make(chan struct{})})
	close(old.replaced)
}

// keepPrefetched brings what is wanted until ctx ends.
func (c *Cache) keepPrefetched(ctx context.Context) {
	said := ""
	retry := prefetchRetry
	var before *wanted
	for ctx.Err() == nil {
		w := c.wanted.Load()
		if w != before {
			before, retry = w, prefetchRetry
		}
		wait := prefetchEvery
		failed := c.prefetchWanted(ctx, w)
		if replaced(w) || ctx.Err() != nil {
			continue
		}
		c.metrics.prefetched(len(w.images)-len(failed), len(failed))
		said = c.logPrefetch(w, failed, said)
		if len(failed) > 0 {
			wait, retry = retry, min(2*retry, prefetchEvery)
		} else {
			retry = prefetchRetry
		}
		select {
		case <-ctx.Done():
		case <-w.replaced:
		case <-time.After(wait + rand.N(wait/10)): // not all nodes at once
		}
	}
}

func replaced(w *wanted) bool {
	select {
	case <-w.replaced:
		return true
	default:
		return false
	}
}

// prefetchWanted looks at all of w once, and gives up when it is replaced.
func (c *Cache) prefetchWanted(ctx context.Context, w *wanted) (failed []error) {
	if len(w.images) == 0 {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	var watcher sync.WaitGroup
	watcher.Go(func() {
		select {
		case <-ctx.Done():
		case <-w.replaced:
			cancel()
		}
	})
	failed = c.prefetchAll(ctx, w.images, w.bandwidth)
	cancel()
	watcher.Wait()
	return failed
}

// logPrefetch tells what was not told last, and returns it.
func (c *Cache) logPrefetch(w *wanted, failed []error, said string) string {
	what := ""
	if err := errors.Join(failed...); err != nil {
		what = err.Error()
	}
	switch {
	case what == said:
	case what == "":
		c.log.Info("all images that are wanted before they are needed are here", "images", len(w.images))
	default:
		c.log.Warn("images that are wanted before they are needed are missing", "missing", len(failed), "of", len(w.images), "error", what)
	}
	return what
}
