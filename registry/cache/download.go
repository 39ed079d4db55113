package cache

import (
	"context"
	"errors"
	"time"

	"golang.org/x/time/rate"
)

// download carries the fill f out for rq.
func (c *Cache) download(ctx context.Context, f *fill, rq *request) {
	src, p, err := c.begin(ctx, f, rq)
	if err != nil {
		rq.disk.store.unclaim(f.digest)
		c.endFill(f)
		f.fail(err)
		return
	}
	defer src.close()
	err = c.transfer(ctx, f, p, src, rq.limit)
	switch {
	case err == nil:
		c.finish(f, p)
	case errors.Is(err, errBadContent):
		c.metrics.corrupt.WithLabelValues("upstream").Inc()
		c.log.Warn("an upstream served wrong bytes; they were not kept", "registry", rq.registry.host,
			"repository", rq.repo, "digest", f.digest, "upstream", src.names())
		for _, up := range src.used {
			c.faults.distrust(up, f.digest)
		}
		p.abandon()
		c.endFill(f)
		f.fail(err)
	default:
		c.log.Info("a download broke off", "registry", rq.registry.host, "repository", rq.repo,
			"digest", f.digest, "at", p.offset, "of", p.size, "error", err)
		p.suspend()
		c.endFill(f)
		f.fail(err)
	}
}

// begin opens both ends of the download, and lets the readers know the size.
func (c *Cache) begin(ctx context.Context, f *fill, rq *request) (*source, *partial, error) {
	store := rq.disk.store
	from := store.claim(f.digest)
	src := &source{cache: c, rq: rq, order: rq.registry.order(), size: -1, offset: from}
	err := src.connect(ctx)
	if from > 0 && errors.Is(err, errRange) {
		from = 0 // what is here is not the beginning of what is there
		src.rewind(from)
		err = src.connect(ctx)
	}
	if err != nil {
		return nil, nil, err
	}
	if src.used[0].peer == "" {
		rq.confirm() // a peer's answer is not the registry's word
	}
	p, err := store.create(f.digest, src.size, from)
	if err != nil {
		src.close()
		return nil, nil, &storeError{err}
	}
	if p.offset != from {
		src.rewind(p.offset)
	}
	f.update(func() {
		f.known, f.size, f.written = true, src.size, p.offset
		f.distrust = c.faults.wrong.has(served{upstream: src.used[0]})
	})
	return src, p, nil
}

// transfer writes the rest of the content, within limit as long as all readers
// are patient.
func (c *Cache) transfer(ctx context.Context, f *fill, p *partial, src *source, limit *rate.Limiter) error {
	place := c.takePlace(src.rq)
	defer place.leave()
	buf := make([]byte, fillChunk)
	for p.offset < p.size {
		n, err := src.read(ctx, buf[:min(int64(stepWithin(limit)), p.size-p.offset)])
		if n > 0 {
			if _, err := p.Write(buf[:n]); err != nil {
				return &storeError{err}
			}
			hurried := false
			f.update(func() { f.written, f.moved, hurried = p.offset, later(f.moved, src.moved), f.readers > f.patient })
			switch {
			case limit == nil:
				place.went(ctx, src.conn(), n, p.size-p.offset)
			case hurried:
				src.leavePatient()
			default:
				if err := f.rest(ctx, limit, n); err != nil {
					return err
				}
			}
		}
		if err != nil {
			return err
		}
	}
	if !p.verified() {
		return errBadContent
	}
	return nil
}

// rest waits until n bytes more are within the limit.
func (f *fill) rest(ctx context.Context, limit *rate.Limiter, n int) error {
	f.update(func() { f.resting = true })
	defer f.update(func() { f.resting, f.moved = false, time.Now() })
	if err := limit.WaitN(ctx, n); err != nil {
		return context.Cause(ctx)
	}
	return nil
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// stepWithin is how many bytes to go on by, so that the limit holds nobody up for
// long who comes meanwhile.
func stepWithin(limit *rate.Limiter) int {
	const perSecond, least = 8, 4 << 10
	if limit == nil {
		return fillChunk
	}
	return min(fillChunk, max(least, int(limit.Limit())/perSecond))
}

// finish lets the readers have the rest at once, and stores the file then.
func (c *Cache) finish(f *fill, p *partial) {
	f.update(func() { f.state = verified })
	err := p.commit(func(rename func() error) error {
		f.mu.Lock()
		defer f.mu.Unlock()
		err := rename()
		if err == nil {
			f.path = p.store.blobPath(f.digest)
		}
		return err
	})
	if err != nil {
		c.log.Warn("a download could not be kept", "digest", f.digest, "error", err)
	}
	c.endFill(f)
	f.update(func() { f.state = finished })
}

// storeError reports that the disk, not the upstream, failed.
type storeError struct{ err error }

func (e *storeError) Error() string { return "storing: " + e.err.Error() }
func (e *storeError) Unwrap() error { return e.err }
