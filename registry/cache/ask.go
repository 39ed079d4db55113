package cache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
)

// question is what an upstream is asked.
type question struct {
	method string
	path   string
	filter string // artifactType
	accept string
	auth   string // the client's Authorization
	via    string
	from   int64                        // continue at this byte; 0: the whole
	ranges string                       // the client's own Range, passed on
	avoid  func(*upstream) *unavailable // why not to ask it; may be nil
	ns     string                       // the registry that is meant
	who    factKey                      // whose question it is
	small  bool                         // the answer costs an upstream little
	digest digest.Digest                // of what is asked for; "": unknown

	patient bool // nobody waits for what the answer brings
	again   bool // nobody waits for the answer: it is asked for to see if one comes
}

// answer is a response with status 200 or 206, whose body ends the request.
type answer struct {
	*http.Response
	upstream *upstream
	cancel   context.CancelCauseFunc
	deadline time.Time       // of the headers
	conn     syscall.RawConn // nil: unknown
}

// left is how long the rest may take, so that who waits for it does not wait for
// much longer than for the headers.
func (a *answer) left() time.Duration { return time.Until(a.deadline) + stallMargin }

func (a *answer) close() {
	a.cancel(nil)
	a.Body.Close()
}

var (
	errSlowHeaders = errors.New("no answer in time")
	errStalled     = errors.New("the transfer stalled")
	errDown        = errors.New("does not answer in time")
)

// asker asks the upstreams of registries.
type asker struct {
	timeouts Timeouts
	metrics  *metrics
	log      *slog.Logger
	work     *sync.WaitGroup // counts what goes on beside the requests
	enter    func() bool     // counts in what Run waits for, unless the cache is stopping
	leave    func()          // counts it out
}

// ask puts q to the upstreams in order, and returns the first answer that can be
// used, within budget. The body goes on under ctx. host is for metrics.
//
// Errors: a refusal when an upstream definitely refused (401 at once, otherwise
// when every upstream did: the gravest of them), else unavailable.
func (a *asker) ask(ctx context.Context, host string, q question, order []*upstream, budget time.Duration) (*answer, error) {
	deadline := time.Now().Add(budget)
	var refused *refusal
	var down *unavailable
	for i, up := range order {
		if q.avoid != nil {
			if why := q.avoid(up); why != nil {
				down = why
				continue
			}
		}
		left := time.Until(deadline)
		ans, err := a.askTwice(ctx, order[i:], q, left/time.Duration(len(order)-i))
		if err == nil {
			ans.deadline = deadline
			return ans, nil
		}
		if ctx.Err() != nil {
			return nil, &unavailable{"canceled", context.Cause(ctx)}
		}
		var no *refusal
		if errors.As(err, &no) {
			if no.status == http.StatusUnauthorized && q.auth == "" {
				return nil, no // the client has yet to send what it has
			}
			refused = graver(refused, no)
			continue
		}
		errors.As(err, &down)
		a.metrics.failures.WithLabelValues(host, down.cause).Inc()
		a.log.Debug("an upstream gave no usable answer", "registry", host, "upstream", up.name,
			"path", q.path, "cause", down.cause, "error", down.err)
	}
	// A 404 is the registry's word only if every upstream was heard.
	if refused != nil && (down == nil || refused.status != http.StatusNotFound) {
		return nil, refused
	}
	return nil, down
}

// graver prefers the refusal that a client can do something about.
func graver(a, b *refusal) *refusal {
	rank := map[int]int{http.StatusUnauthorized: 2, http.StatusForbidden: 1}
	if a == nil || rank[b.status] > rank[a.status] {
		return b
	}
	return a
}

// askTwice asks the first of order and, if that takes unusually long for
// something small, another one with the same content as well, or the same one
// by another connection. The first answer counts.
func (a *asker) askTwice(ctx context.Context, order []*upstream, q question, budget time.Duration) (*answer, error) {
	first, second := order[0], order[0]
	if len(order) > 1 && order[1].group == first.group {
		second = order[1]
	}
	delay := max(a.timeouts.Hedge, first.health.usual())
	if !q.small || delay >= budget {
		return a.askOne(ctx, first, q, budget)
	}
	h := hedge{asker: a, question: q, answers: make(chan hedged, 2)}
	h.start(ctx, first, budget)
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case got := <-h.answers:
		return got.answer, got.err
	case <-timer.C:
	}
	if !second.health.spend() {
		got := <-h.answers
		return got.answer, got.err
	}
	a.metrics.hedges.Inc()
	h.start(ctx, second, budget-delay)
	return h.first()
}

// hedge is a question that is asked twice.
type hedge struct {
	asker    *asker
	question question
	answers  chan hedged
	cancels  []context.CancelFunc
}

type hedged struct {
	answer *answer
	err    error
	number int
}

func (h *hedge) start(ctx context.Context, up *upstream, budget time.Duration) {
	ctx, cancel := context.WithCancel(ctx)
	number := len(h.cancels)
	h.cancels = append(h.cancels, cancel)
	h.asker.work.Go(func() {
		ans, err := h.asker.askOne(ctx, up, h.question, budget)
		if err != nil {
			cancel()
		} else {
			ended := ans.cancel
			ans.cancel = func(cause error) { ended(cause); cancel() }
		}
		h.answers <- hedged{ans, err, number}
	})
}

// first returns the first good answer and ends the other request. If neither
// is good, the error is that of the first request.
func (h *hedge) first() (*answer, error) {
	got := <-h.answers
	if got.err != nil {
		other := <-h.answers
		if other.err == nil || other.number == 0 {
			got = other
		}
		return got.answer, got.err
	}
	h.cancels[1-got.number]()
	h.asker.work.Go(func() {
		if late := <-h.answers; late.err == nil {
			late.answer.close()
		}
	})
	return got.answer, nil
}

// askOne asks one upstream, unless it is silent on what q is about. Errors:
// refusal or unavailable.
func (a *asker) askOne(ctx context.Context, up *upstream, q question, budget time.Duration) (*answer, error) {
	client := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	done, ok := up.silences.wait(q, cancel)
	if !ok {
		cancel(nil)
		up.silences.want(q, a.repeat(up, q, budget))
		return nil, &unavailable{"timeout", fmt.Errorf("%s %w", up.name, errDown)}
	}
	defer done()
	var conn atomic.Pointer[net.Conn]
	trace := &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) { conn.Store(&got.Conn) }}
	began := up.health.begin()
	timer := time.AfterFunc(budget, func() { cancel(errSlowHeaders) })
	resp, err := up.client.Do(up.request(httptrace.WithClientTrace(ctx, trace), q))
	if !timer.Stop() && err == nil {
		resp.Body.Close() // the answer came together with the end of its time
		err = errSlowHeaders
	}
	up.health.end(began, err == nil)
	if err != nil {
		err := transportError(ctx, up, err)
		if client.Err() == nil {
			a.failed(up, q, err, budget, began, conn.Load() != nil)
		}
		cancel(nil)
		return nil, err
	}
	up.silences.answered()
	if err := judge(up, resp, q); err != nil {
		resp.Body.Close()
		cancel(nil)
		return nil, err
	}
	return &answer{Response: resp, upstream: up, cancel: cancel, conn: rawConn(*conn.Load())}, nil
}

// failed takes note of a request that was not answered. Silence is the
// upstream's fault, and all requests pass it over from now on. But one that
// has answered others meanwhile is alive, and so may be one that took a
// request with credentials, since a wrong password takes long to refuse: then
// only those who asked pass it over.
func (a *asker) failed(up *upstream, q question, err *unavailable, budget time.Duration, began time.Time, connected bool) {
	retry := time.Now().Add(a.timeouts.Retry)
	switch again := a.repeat(up, q, budget); {
	case err.cause != "timeout": // it costs nobody time
		up.silences.answered()
		up.health.failed(retry)
	case q.again, errors.Is(err, errDown): // it is known
	case up.health.answeredSince(began), connected && q.auth != "":
		a.fellSilent(up, matter{who: q.who}, again)
	default:
		up.health.failed(retry)
		a.fellSilent(up, matter{}, again)
	}
}

func (up *upstream) request(ctx context.Context, q question) *http.Request {
	u := *up.base
	u.Path = q.path
	query := url.Values{}
	switch up.namespace {
	case u.Host:
	case "":
		query.Set("ns", q.ns)
	default:
		query.Set("ns", up.namespace)
	}
	if q.filter != "" {
		query.Set("artifactType", q.filter)
	}
	u.RawQuery = query.Encode()
	h := http.Header{
		"User-Agent":      {"connected-registry-cache"},
		"Accept-Encoding": {"identity"},
		"Via":             {q.via},
	}
	set := func(name, value string) {
		if value != "" {
			h.Set(name, value)
		}
	}
	set(peerHeader, up.peer)
	if q.patient && up.peer != "" {
		set(patientHeader, "1")
	}
	set("Accept", q.accept)
	set("Range", q.ranges)
	if q.from > 0 {
		set("Range", "bytes="+strconv.FormatInt(q.from, 10)+"-")
	}
	if !up.anonymous {
		set("Authorization", q.auth)
	}
	req := &http.Request{Method: q.method, URL: &u, Host: u.Host, Header: h, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}
	return req.WithContext(ctx)
}
