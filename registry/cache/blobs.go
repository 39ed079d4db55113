package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
)

// errAgain asks serveBlob to look again: what was found has changed meanwhile.
var errAgain = errors.New("look again")

// serveBlob answers a request for a blob from the store, from a download under
// way, or by starting one.
func (c *Cache) serveBlob(w http.ResponseWriter, r *http.Request, rq *request) error {
	ctx := r.Context()
	var err error
	for range 2 + len(rq.registry.order()) {
		var b *blob
		b, err = rq.disk.store.open(ctx, rq.digest, c.cfg.Timeouts.Headers)
		switch {
		case err == nil:
			if err = c.serveStored(w, r, rq, b); !errors.Is(err, errAgain) {
				return err
			}
		case errors.Is(err, errBusy):
			return refuse(http.StatusServiceUnavailable, "verifying", err.Error())
		case !errors.Is(err, fs.ErrNotExist):
			c.log.Warn("a stored blob cannot be read; it is passed through", "digest", rq.digest, "error", err)
			return c.passThrough(w, r, rq, "disk-error")
		}
		if err = c.serveContent(w, r, rq); !errors.Is(err, errElsewhere) {
			return err
		}
		if r.Method == http.MethodHead {
			return c.headBlob(w, r, rq)
		}
		if err = c.serveFill(w, r, rq); !errors.Is(err, errAgain) {
			return err
		}
	}
	return &unavailable{"broken", fmt.Errorf("every download of %s broke off", rq.digest)}
}

// serveStored answers with b, and closes it. The error is errAgain if b turned
// out to be damaged.
func (c *Cache) serveStored(w http.ResponseWriter, r *http.Request, rq *request, b *blob) error {
	defer func() { _ = b.Close() }()
	how, err := c.permit(r.Context(), rq)
	if err != nil {
		return err
	}
	rng := rangeOf(r, rq.digest)
	s, ok := rng.of(b.size)
	if !ok {
		return outOfRange(w, b.size)
	}
	if r.Method == http.MethodGet && s.start == 0 && rq.disk.store.doubtful(rq.digest) {
		err := rq.disk.store.verify(r.Context(), rq.digest, c.cfg.Timeouts.Headers)
		if errors.Is(err, fs.ErrNotExist) {
			return errAgain
		}
	}
	c.blobHeader(w, rq, rng.set, s, b.size, how)
	if r.Method == http.MethodHead {
		return nil
	}
	if s.start > 0 {
		if _, err := b.Seek(s.start, io.SeekStart); err != nil {
			c.log.Warn("a stored blob cannot be read", "digest", rq.digest, "error", err)
			return nil // the body stays short, and containerd goes on elsewhere
		}
	}
	// The plain file and writer meet in sendfile.
	n, _ := io.CopyN(w, b.File, s.len())
	c.metrics.sent(how, n)
	return nil
}

// headBlob answers for a blob that is not stored.
func (c *Cache) headBlob(w http.ResponseWriter, r *http.Request, rq *request) error {
	ans, err := c.asker.ask(r.Context(), rq.registry.host, rq.question(http.MethodHead), rq.registry.order(), c.cfg.Timeouts.Headers)
	if err != nil {
		rq.learn(err)
		return rq.offline(err)
	}
	defer ans.close()
	if ans.ContentLength < 0 {
		return &unavailable{"length", fmt.Errorf("%s gives no length for the content", ans.upstream.name)}
	}
	rq.confirm()
	c.blobHeader(w, rq, false, span{0, ans.ContentLength}, ans.ContentLength, missHead)
	return nil
}

// serveFill follows the download of a blob. The error is errAgain when the
// download did not come to where it could be followed, or ended meanwhile.
func (c *Cache) serveFill(w http.ResponseWriter, r *http.Request, rq *request) error {
	ctx, rng := r.Context(), rangeOf(r, rq.digest)
	f, started := c.joinFill(rq.digest), false
	if f == nil {
		if why := c.whyNotFill(rq, rng); why != "" {
			return c.passThrough(w, r, rq, why)
		}
		var err error
		if f, started, err = c.startFill(rq); err != nil {
			return err
		}
	}
	defer f.leave(c.cfg.Timeouts.Unread)
	how := missStored
	size, err := f.awaitSize(ctx)
	if err != nil {
		return c.fillFailed(w, r, rq, err, started)
	}
	if !started {
		permitted, err := c.permit(ctx, rq)
		if err != nil {
			return err
		}
		how = missJoined
		if f.whole() {
			how = permitted // all of it is on the disk; only its place in the store is to come
		}
	}
	s, ok := rng.of(size)
	if !ok {
		return outOfRange(w, size)
	}
	// Once headers are out, a download that brings nothing would have containerd
	// come back here once more: so wait until that would have shown.
	patience := f.patience + stallMargin
	if err := f.awaitStart(ctx, s.start, patience); err != nil {
		return c.fillFailed(w, r, rq, err, started)
	}
	file, err := f.open()
	if err != nil {
		return errAgain
	}
	defer file.Close()
	if _, err := file.Seek(s.start, io.SeekStart); err != nil {
		return c.passThrough(w, r, rq, "disk-error")
	}
	c.blobHeader(w, rq, rng.set, s, size, how)
	c.follow(ctx, w, f, file, s, how)
	return nil
}

// whyNotFill returns why a blob should be passed through: "" if it should not.
func (c *Cache) whyNotFill(rq *request, rng byteRange) string {
	if c.noRoom.has(rq.digest) {
		return "no-space"
	}
	if rng.suffix || rng.set && rng.first > rq.disk.store.held(rq.digest)+farRange {
		return "far-range"
	}
	return ""
}

// fillFailed decides what becomes of a client whose download failed before it
// was sent anything. own tells that the failure answers this very client.
func (c *Cache) fillFailed(w http.ResponseWriter, r *http.Request, rq *request, err error, own bool) error {
	var disk *storeError
	switch {
	case r.Context().Err() != nil:
		return refuse(http.StatusServiceUnavailable, "canceled", "the client has gone")
	case errors.As(err, &disk):
		why := "disk-error"
		if errors.Is(err, errNoSpace) {
			why = "no-space"
		}
		c.noRoom.add(rq.digest, noSpaceMemory)
		c.log.Warn("a blob cannot be stored; it is passed through", "digest", rq.digest, "error", err)
		return c.passThrough(w, r, rq, why)
	case errors.Is(err, errBadContent):
		return errAgain // the next attempt leaves out who served it
	case errors.Is(err, errStuck):
		return rq.offline(&unavailable{"stalled", err})
	case own:
		rq.learn(err)
		return rq.offline(err)
	case errors.Is(err, errShutdown):
		return refuse(http.StatusServiceUnavailable, "stopping", err.Error())
	default:
		return errAgain
	}
}

// follow sends the span as it becomes readable. When it ends early, the body is
// short of its Content-Length, so that the connection is closed and containerd
// goes on where it stopped.
func (c *Cache) follow(ctx context.Context, w http.ResponseWriter, f *fill, file io.Reader, s span, how outcome) {
	raw := how.source == toPeer.source
	flushed := false
	for pos := s.start; pos < s.end; {
		limit, ok := f.readable(pos, raw)
		if !ok {
			if !flushed {
				_ = http.NewResponseController(w).Flush() // let the client know that bytes will come
				flushed = true
			}
			var err error
			if limit, err = f.awaitBytes(ctx, pos, raw); err != nil {
				c.log.Debug("a transfer to a client ends early", "digest", f.digest, "at", pos, "error", err)
				return
			}
		}
		n, err := io.CopyN(w, file, min(limit, s.end)-pos)
		pos += n
		c.metrics.sent(how, n)
		if err != nil {
			return
		}
	}
}
