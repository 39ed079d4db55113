package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"syscall"
	"time"
)

// errRange reports that an upstream has no bytes where a download should go on.
var errRange = errors.New("no such range")

// source reads a blob's bytes from one upstream after another.
type source struct {
	cache    *Cache
	rq       *request
	order    []*upstream
	size     int64
	offset   int64 // of the next byte read
	body     *body // nil: to be asked for
	used     []*upstream
	moved    time.Time // when bytes last came as fast as they should
	got      int64     // since then, in bytes
	breaks   int
	failures int  // without a byte in between
	stalled  bool // the last failure was a stall
	peers    bool // have been asked
	next     int  // upstream to ask next
}

// connect asks the upstreams, the next one first, for the rest, and takes the
// first answer that fits. Errors are those of ask; one that wraps errRange says
// that there is nothing at the offset.
func (s *source) connect(ctx context.Context) error {
	q := s.rq.question(http.MethodGet)
	q.patient = s.rq.patient()
	q.from = s.offset
	if done, err := s.connectPeer(ctx, q); done || err != nil {
		return err
	}
	var err error
	for range s.order {
		var ans *answer
		next := slices.Concat(s.order[s.next:], s.order[:s.next])
		ans, err = s.cache.asker.ask(ctx, s.rq.registry.host, q, next, s.cache.cfg.Timeouts.Headers)
		if err != nil {
			return err
		}
		s.next = 1 + slices.Index(s.order, ans.upstream)
		if err = s.take(ans); err == nil {
			return nil
		}
		ans.close()
	}
	return err
}

// connectPeer asks other nodes, once, if the registry lets this client have the
// blob.
func (s *source) connectPeer(ctx context.Context, q question) (done bool, err error) {
	p := s.cache.peers
	if p == nil || s.peers || len(p.bookkeepers(s.rq.digest)) == 0 {
		return false, nil
	}
	s.peers = true
	if _, err := s.cache.permit(ctx, s.rq); err != nil {
		return false, err
	}
	ans := p.fetch(ctx, q, s.rq.digest)
	if ans == nil {
		return false, nil
	}
	done = s.take(ans) == nil
	if !done {
		ans.close()
	}
	return done, nil
}

// take makes ans the source of the next bytes, if it begins or can be made to
// begin at the offset, and is as long as those before.
func (s *source) take(ans *answer) error {
	host := ans.upstream.name
	start, size := int64(0), ans.ContentLength
	if ans.StatusCode == http.StatusPartialContent {
		got, total, ok := parseContentRange(ans.Header.Get("Content-Range"))
		start, size = got.start, total
		if !ok || got.start != s.offset || got.end != total {
			return &unavailable{"range", fmt.Errorf("%s answered with another range than asked for: %w", host, errRange)}
		}
	}
	switch {
	case size < 0 || s.size >= 0 && size != s.size:
		return &unavailable{"length", fmt.Errorf("%s gives no length for the content, or another than before", host)}
	case size < s.offset:
		return &unavailable{"range", fmt.Errorf("%s has less content than is here: %w", host, errRange)}
	}
	body := s.cache.asker.watch(ans, s.cache.cfg.Timeouts.Stall)
	if _, err := io.CopyN(io.Discard, body, s.offset-start); err != nil {
		return &unavailable{"broken", fmt.Errorf("%s: %w", host, err)}
	}
	s.size, s.body = size, body
	s.used = append(s.used, ans.upstream)
	return nil
}

// leavePatient makes the next read go to the registry, if this one came from a
// node that was told that nobody waits.
func (s *source) leavePatient() {
	if s.body != nil && s.body.upstream.peer != "" && s.rq.patient() {
		s.close()
	}
}

func (s *source) names() []string {
	var names []string
	for _, up := range s.used {
		names = append(names, up.name)
	}
	return names
}

// read is an io.Reader's Read that goes on with the next upstream where one
// breaks off. It gives up when all have broken off, one of them twice, without
// a byte in between, or one after the other stalled, which has cost the reader its patience.
func (s *source) read(ctx context.Context, p []byte) (int, error) {
	for {
		if s.body == nil {
			if err := s.connect(ctx); err != nil {
				return 0, err
			}
		}
		n, err := s.body.Read(p)
		s.offset += int64(n)
		if n > 0 {
			s.failures, s.stalled = 0, false
			s.advance(int64(n))
		}
		if err == nil || s.offset == s.size {
			return n, nil
		}
		if err := s.broke(ctx, err); err != nil {
			return n, err
		}
		if n > 0 {
			return n, nil
		}
	}
}

// advance takes note of n bytes more.
func (s *source) advance(n int64) {
	if s.got += n; s.got >= s.body.quota {
		s.moved, s.got = time.Now(), 0
	}
}

// broke decides what the end of a body before its time means: nil to go on.
func (s *source) broke(ctx context.Context, err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	up := s.body.upstream
	s.close()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	cause, stalled := "broken", errors.Is(err, errStalled)
	if stalled {
		cause = "stalled"
		s.stuck(up)
	}
	s.cache.metrics.failures.WithLabelValues(s.rq.registry.host, cause).Inc()
	up.health.failed(time.Now().Add(s.cache.cfg.Timeouts.Retry))
	s.failures++
	s.breaks++
	n := len(s.order)
	if up.peer != "" {
		return nil // the registry has not been asked yet
	}
	if s.breaks > maxBreaks || s.failures > n+1 || stalled && (s.stalled || n == 1) {
		return &unavailable{cause, fmt.Errorf("%s: %w", up.name, err)}
	}
	s.stalled = stalled
	return nil
}

// stuck takes note of an upstream that has stalled. Who asks it for other content
// will tell whether it is so with that as well: nobody need wait to find out.
func (s *source) stuck(up *upstream) {
	a := s.cache.asker
	q := s.rq.question(http.MethodGet)
	q.from = s.offset
	again := a.repeat(up, q, a.timeouts.Headers)
	a.fellSilent(up, matter{digest: q.digest}, again)
	a.fellSilent(up, matter{}, again)
}

// rewind makes the next read begin at offset.
func (s *source) rewind(offset int64) {
	s.close()
	s.offset = offset
	s.next = 0
}

// conn is what the next bytes come through, as far as that is known.
func (s *source) conn() syscall.RawConn {
	if s.body == nil {
		return nil
	}
	return s.body.conn
}

func (s *source) close() {
	if s.body != nil {
		s.body.close()
		s.body = nil
	}
}
