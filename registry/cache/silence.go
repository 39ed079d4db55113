package cache

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
)

// matter is what an upstream is silent on: everything (the zero value), what one
// client asks, or one content.
type matter struct {
	who    factKey
	digest digest.Digest
}

// covers reports whether q is about m.
func (m matter) covers(q question) bool {
	switch m {
	case matter{}, matter{who: q.who}, matter{digest: q.digest}:
		return true
	}
	return false
}

// silences are the matters on which an upstream has let somebody wait in vain.
// Nobody waits for it on these again, and who waits when one begins is let go: so
// a pull waits once, however many requests it makes. What was asked is asked anew
// where nobody waits, until it is answered or has not been wanted for a while.
type silences struct {
	doubted atomic.Bool // there was one on everything, and no answer since

	mu      sync.Mutex // guards everything below
	about   map[matter]*silence
	waiting map[*waiter]struct{} // for answers
	patient time.Duration        // when to ask again about everything for the first time
	ended   time.Time            // when it last answered after a silence on everything
}

// silence is one of them.
type silence struct {
	wanted time.Time // when somebody last asked
	again  again     // what was asked
}

// again asks something once more, and reports whether an answer came.
type again func(context.Context) bool

// waiter is a request without an answer so far.
type waiter struct {
	question question
	cancel   context.CancelCauseFunc
}

// wait reports whether an answer to q may be waited for. If so, a silence that
// begins before done is called cancels the request.
func (s *silences) wait(q question, cancel context.CancelCauseFunc) (done func(), ok bool) {
	w := &waiter{q, cancel}
	s.mu.Lock()
	defer s.mu.Unlock()
	for m := range s.about {
		if m.covers(q) && !q.again {
			return nil, false
		}
	}
	if s.waiting == nil {
		s.waiting = make(map[*waiter]struct{})
	}
	s.waiting[w] = struct{}{}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.waiting, w)
	}, true
}

// want takes note that somebody asks q, which is not waited for. From now on it is
// q that an upstream silent on everything is asked again, unless another
// silence covers it: what it has once been silent on, it may be for ever.
func (s *silences) want(q question, ask again) {
	s.mu.Lock()
	defer s.mu.Unlock()
	others := false
	for m, about := range s.about {
		if m.covers(q) {
			about.wanted = time.Now()
			others = others || m != matter{}
		}
	}
	if all := s.about[matter{}]; all != nil && ask != nil && !others {
		all.again = ask
	}
}

// answered takes note that the upstream is not silent altogether.
func (s *silences) answered() {
	if s.doubted.Load() {
		s.doubted.Store(false)
	}
}

// begin reports whether a silence on m begins now, and when to ask again.
func (s *silences) begin(m matter, ask again) (delay time.Duration, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.about[m] != nil || len(s.about) >= maxSilences && m != (matter{}) {
		return 0, false
	}
	if s.about == nil {
		s.about = make(map[matter]*silence)
	}
	s.about[m] = &silence{time.Now(), ask}
	for w := range s.waiting {
		if m.covers(w.question) {
			w.cancel(errDown)
		}
	}
	if m != (matter{}) {
		return firstAgain, true
	}
	s.doubted.Store(true)
	if time.Since(s.ended) < silenceMemory {
		s.patient = min(relapse*s.patient, silenceMemory)
	} else {
		s.patient = firstAgain
	}
	return s.patient, true
}

// next returns how to ask again about m; nil if nobody wants to know any more.
func (s *silences) next(m matter) again {
	s.mu.Lock()
	defer s.mu.Unlock()
	about := s.about[m]
	if time.Since(about.wanted) > silenceMemory {
		return nil
	}
	return about.again
}

func (s *silences) end(m matter) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.about, m)
	if m == (matter{}) {
		s.ended = time.Now()
	}
}

// fellSilent takes note that up let somebody wait in vain on m.
func (a *asker) fellSilent(up *upstream, m matter, ask again) {
	delay, begins := up.silences.begin(m, ask)
	if !begins {
		return
	}
	if m == (matter{}) {
		a.log.Warn("an upstream does not answer: it is passed over until it does", "upstream", up.name)
	}
	a.askAgain(up, m, delay)
}

// askAgain asks again after delay, and from then on less and less often.
func (a *asker) askAgain(up *upstream, m matter, delay time.Duration) {
	time.AfterFunc(delay, func() {
		if !a.enter() { // the cache is stopping
			up.silences.end(m)
			return
		}
		defer a.leave()
		ctx, cancel := context.WithTimeoutCause(context.Background(), a.timeouts.Headers, errSlowHeaders)
		defer cancel()
		ask := up.silences.next(m)
		if ask != nil && !ask(ctx) {
			a.askAgain(up, m, max(delay, min(2*delay, mostAgain)))
			return
		}
		up.silences.end(m)
		if ask != nil && m == (matter{}) {
			a.log.Info("an upstream answers again", "upstream", up.name)
		}
	})
}

// repeat makes a question one to ask again: whether up answers it within budget
// with content that comes, or with a refusal, or fails at once.
func (a *asker) repeat(up *upstream, q question, budget time.Duration) again {
	q.again = true
	return func(ctx context.Context) bool { return a.answers(ctx, up, q, budget) }
}

func (a *asker) answers(ctx context.Context, up *upstream, q question, budget time.Duration) bool {
	ans, err := a.askOne(ctx, up, q, budget)
	if err != nil {
		return !timedOut(err)
	}
	defer ans.close()
	if q.from > 0 && ans.StatusCode != http.StatusPartialContent {
		return false // what it stalled on may be far from here
	}
	body := a.watch(ans, a.timeouts.Stall)
	_, err = io.CopyN(io.Discard, body, body.quota)
	return !timedOut(err)
}

// timedOut tells silence from failures that cost no time.
func timedOut(err error) bool {
	var down *unavailable
	return errors.Is(err, errStalled) || errors.Is(err, errSlowHeaders) || errors.As(err, &down) && down.cause == "timeout"
}
