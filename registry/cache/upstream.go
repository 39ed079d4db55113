package cache

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// registry is one registry that the cache answers for.
type registry struct {
	host      string
	cfg       Registry
	upstreams []*upstream
}

func (reg *registry) closeIdle() {
	for _, up := range reg.upstreams {
		up.transport.CloseIdleConnections()
	}
}

// upstream is one server of a registry.
type upstream struct {
	base      *url.URL
	namespace string
	anonymous bool
	transport *http.Transport
	client    *http.Client

	// down is the time, in Unix nanoseconds, until which it is not asked
	// because it did not answer in time; 0 when it does.
	down atomic.Int64
}

func newRegistry(host string, cfg Registry, t Timeouts, log *slog.Logger) (*registry, error) {
	reg := &registry{host: host, cfg: cfg}
	for _, u := range cfg.Upstreams {
		base, err := u.parse()
		if err != nil {
			return nil, err
		}
		up := &upstream{base: base, namespace: u.Namespace, anonymous: u.WithoutCredentials}
		if up.namespace == "" {
			up.namespace = host
		}
		up.transport = newTransport(base, &authorities{path: u.CAFile, log: log}, t)
		up.client = &http.Client{Transport: up.transport, CheckRedirect: checkRedirect}
		reg.upstreams = append(reg.upstreams, up)
	}
	return reg, nil
}

// newTransport speaks HTTP/1.1 only: each transfer then has a connection of its
// own, and none waits for another's flow control. It uses no proxy: upstreams
// are near, and what is not can be reached by containerd itself.
func newTransport(base *url.URL, ca *authorities, t Timeouts) *http.Transport {
	dialer := &net.Dialer{Timeout: t.Dial, KeepAlive: 15 * time.Second}
	return &http.Transport{
		DialContext: dialer.DialContext,
		DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, t.Dial)
			defer cancel()
			host, _, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			// Redirects lead to object stores, which have certificates of
			// their own: there the system's authorities count as well.
			pool, err := ca.pool(addr != hostPort(base))
			if err != nil {
				return nil, err
			}
			d := tls.Dialer{NetDialer: dialer, Config: &tls.Config{
				RootCAs: pool, ServerName: host, MinVersion: tls.VersionTLS12,
			}}
			return d.DialContext(ctx, network, addr)
		},
		DisableCompression:  true, // digests are of the bytes as they are
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     90 * time.Second,
		ReadBufferSize:      64 << 10,
	}
}

func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// checkRedirect keeps the client's credentials at the server they were meant
// for. The http package alone would also pass them to subdomains.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) > 5 {
		return errors.New("more than 5 redirects")
	}
	first := via[0].URL
	if first.Scheme == "https" && req.URL.Scheme != "https" {
		return errors.New("redirected from https to http")
	}
	if req.URL.Scheme != first.Scheme || hostPort(req.URL) != hostPort(first) {
		req.Header.Del("Authorization")
	}
	return nil
}

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
}

// answer is a response with status 200 or 206, whose body ends the request.
type answer struct {
	*http.Response
	upstream *upstream
	cancel   context.CancelCauseFunc
}

func (a *answer) close() {
	a.cancel(nil)
	a.Body.Close()
}

var (
	errSlowHeaders = errors.New("no answer in time")
	errStalled     = errors.New("the transfer stalled")
	errDown        = errors.New("did not answer in time a moment ago")
)

// asker asks the upstreams of registries.
type asker struct {
	timeouts Timeouts
	metrics  *metrics
	log      *slog.Logger
}

// ask puts q to the upstreams of reg in turn, starting with the start-th, and
// returns the first answer that can be used, within budget. The body goes on
// under ctx.
//
// Errors: a refusal when an upstream definitely refused (401 at once, otherwise
// when every upstream did: the gravest of them), else unavailable.
func (a *asker) ask(ctx context.Context, reg *registry, q question, start int, budget time.Duration) (*answer, error) {
	deadline := time.Now().Add(budget)
	var refused *refusal
	var down *unavailable
	n := len(reg.upstreams)
	for i := range n {
		up := reg.upstreams[(start+i)%n]
		if q.avoid != nil {
			if why := q.avoid(up); why != nil {
				down = why
				continue
			}
		}
		left := time.Until(deadline)
		ans, err := a.askOne(ctx, up, q, left/time.Duration(n-i))
		if err == nil {
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
		a.metrics.failures.WithLabelValues(reg.host, down.cause).Inc()
		a.log.Debug("an upstream gave no usable answer", "registry", reg.host, "upstream", up.base.Host,
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

// askOne asks one upstream. Errors: refusal or unavailable.
func (a *asker) askOne(ctx context.Context, up *upstream, q question, budget time.Duration) (*answer, error) {
	if !up.admit(budget) {
		return nil, &unavailable{"timeout", fmt.Errorf("%s %w", up.base.Host, errDown)}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(budget, func() { cancel(errSlowHeaders) })
	resp, err := up.client.Do(up.request(ctx, q))
	if !timer.Stop() && err == nil {
		resp.Body.Close() // the answer came together with the end of its time
		err = errSlowHeaders
	}
	if err != nil {
		err := transportError(ctx, up, err)
		up.observe(err.cause == "timeout", a.timeouts.Retry)
		cancel(nil)
		return nil, err
	}
	up.observe(false, 0)
	if err := judge(up, resp, q); err != nil {
		resp.Body.Close()
		cancel(nil)
		return nil, err
	}
	return &answer{Response: resp, upstream: up, cancel: cancel}, nil
}

// admit reports whether the upstream may be asked. One that did not answer is
// tried again by one request at a time.
func (up *upstream) admit(budget time.Duration) bool {
	until := up.down.Load()
	if until == 0 {
		return true
	}
	now := time.Now()
	return now.UnixNano() >= until && up.down.CompareAndSwap(until, now.Add(budget).UnixNano())
}

func (up *upstream) observe(silent bool, retry time.Duration) {
	if silent {
		up.down.Store(time.Now().Add(retry).UnixNano())
	} else if up.down.Load() != 0 {
		up.down.Store(0)
	}
}

func (up *upstream) request(ctx context.Context, q question) *http.Request {
	u := *up.base
	u.Path = q.path
	query := url.Values{}
	if up.namespace != u.Host {
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

// judge tells a usable response from a refusal and from a failure.
func judge(up *upstream, resp *http.Response, q question) error {
	status := resp.StatusCode
	fail := func(cause, format string, args ...any) error {
		return &unavailable{cause, fmt.Errorf(up.base.Host+" "+format, args...)}
	}
	switch {
	case status == http.StatusOK, status == http.StatusPartialContent && (q.from > 0 || q.ranges != ""):
		if e := resp.Header.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
			return fail("encoding", "encoded the content although asked not to")
		}
		return nil
	case status == http.StatusUnauthorized:
		no := refuse(status, "unauthorized", "the registry asks for credentials")
		no.challenges = resp.Header.Values("WWW-Authenticate")
		no.upstream = true
		return no
	case status == http.StatusForbidden, status == http.StatusUnavailableForLegalReasons:
		no := refuse(http.StatusForbidden, "denied", "the registry denies access")
		no.upstream = true
		return no
	case status == http.StatusNotFound, status == http.StatusGone:
		no := refuse(http.StatusNotFound, "not-found", "the registry does not have it")
		no.upstream = true
		return no
	case status == http.StatusRequestedRangeNotSatisfiable && q.ranges != "":
		no := refuse(status, "range", "the range lies outside of the content")
		no.upstream = true
		return no
	case status == http.StatusRequestedRangeNotSatisfiable && q.from > 0:
		return fail("range", "answered 416: %w", errRange)
	case status == http.StatusTooManyRequests:
		return fail("rate-limited", "answered 429")
	default:
		return fail("status", "answered %d", status)
	}
}

// transportError classifies what kept a response from coming. The URL that the
// http package puts into its errors is left out: after a redirect it may bear
// a signature.
func transportError(ctx context.Context, up *upstream, err error) *unavailable {
	var inURL *url.Error
	if errors.As(err, &inURL) {
		err = inURL.Err
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	cause := "connection"
	var timeout net.Error
	var cert *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	var alert tls.AlertError
	switch {
	case errors.Is(err, errSlowHeaders), errors.As(err, &timeout) && timeout.Timeout():
		cause = "timeout"
	case errors.As(err, &cert), errors.As(err, &record), errors.As(err, &alert), errors.Is(err, errAuthorities):
		cause = "tls"
	}
	return &unavailable{cause, fmt.Errorf("%s: %w", up.base.Host, err)}
}

// errAuthorities reports a CA bundle that was never readable.
var errAuthorities = errors.New("no usable CA bundle")

// body is the body of an answer under watch: whoever waits for it gets at least
// MinRate × Stall bytes in every Stall of waiting, or errStalled. The time
// between the reads does not count.
type body struct {
	*answer
	timer  *time.Timer
	stall  time.Duration
	quota  int64
	waited time.Duration // of the current stretch
	got    int64         // in the current stretch
	count  func(n int)
}

func (a *asker) watch(ans *answer) *body {
	b := &body{answer: ans, stall: a.timeouts.Stall, quota: int64(a.timeouts.Stall.Seconds() * float64(a.timeouts.MinRate))}
	b.timer = time.AfterFunc(time.Hour, func() { ans.cancel(errStalled) })
	b.timer.Stop()
	b.count = func(n int) { a.metrics.fetched.Add(float64(n)) }
	return b
}

func (b *body) Read(p []byte) (int, error) {
	began := time.Now()
	b.timer.Reset(b.stall - b.waited)
	n, err := b.Body.Read(p)
	b.timer.Stop()
	b.count(n)
	b.waited += time.Since(began)
	if b.got += int64(n); b.got >= b.quota {
		b.got, b.waited = 0, 0
	} else if b.waited >= b.stall && err == nil {
		err = errStalled
	}
	if err != nil && !errors.Is(err, io.EOF) {
		if cause := context.Cause(b.Request.Context()); cause != nil {
			err = cause
		}
	}
	return n, err
}
