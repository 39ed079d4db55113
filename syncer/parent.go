package syncer

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

const userAgent = "connected-registry"

// limits bound what a parent can make a synchronisation wait for, or hold in
// memory.
type limits struct {
	dial   time.Duration // for a connection, and for the TLS handshake on it
	header time.Duration // from a request to the head of its answer
	answer time.Duration // for all of an answer that is not a blob
	// A blob must bring stallBytes more in each time of stall.
	stall      time.Duration
	stallBytes int64

	attempts     int           // at the same thing, without progress
	backoff      time.Duration // after the first failed attempt; it doubles
	maxBackoff   time.Duration
	maxRetryWait time.Duration // the longest Retry-After that is waited for

	manifest int64 // bytes of a manifest
	list     int64 // bytes of a page of a list
	names    int   // tags of a repository, or repositories of the catalogue
	asks     int   // requests other than for blobs at once
}

func defaultLimits() limits {
	return limits{
		dial:         10 * time.Second,
		header:       30 * time.Second,
		answer:       2 * time.Minute,
		stall:        time.Minute,
		stallBytes:   16 << 10,
		attempts:     5,
		backoff:      500 * time.Millisecond,
		maxBackoff:   30 * time.Second,
		maxRetryWait: 2 * time.Minute,
		manifest:     4 << 20, // what the distribution specification asks registries to take
		list:         16 << 20,
		names:        500_000,
		asks:         16,
	}
}

// parent reads a registry over HTTP (OCI distribution specification 1.1) for the
// length of one synchronisation.
//
// It speaks for itself rather than through a library because each of these must
// hold: credentials never leave for another host, whatever redirects say;
// private addresses are spoken to with TLS unless the operator said otherwise;
// every wait and every body is bounded; a broken transfer goes on where it
// stopped; Retry-After holds for all requests at once; and every failure is one
// line that a person can act on.
type parent struct {
	scheme, host string
	client       *http.Client // for questions
	bulk         *http.Client // for blobs
	auth         *authorizer
	limits       limits
	pace         *pace
	bandwidth    *bandwidth
	log          *slog.Logger
	asks         chan struct{}

	received    atomic.Int64 // bytes of bodies
	noReferrers atomic.Bool  // the parent has no referrers API
	noRanges    atomic.Bool  // the parent sends blobs as a whole

	// self is what this registry says of itself, once, to a parent that is a
	// connected registry too, beside its credentials. Empty: nothing.
	self string
	kin  atomic.Bool // it is one
	told atomic.Bool // it was told

	mu       sync.Mutex
	down     error               // why nothing more is asked at all
	refusals map[string]refusals // by scope
}

// refusals are the answers 401 to fresh credentials, one after another.
type refusals struct {
	times int
	last  error
}

// maxRefusals is after how many of them nothing more is asked for in a scope: the
// next would fare the same, and each costs three requests.
const maxRefusals = 3

// dialer opens connections.
type dialer func(ctx context.Context, network, address string) (net.Conn, error)

func newParent(config Parent, limits limits, dial dialer, log *slog.Logger) *parent {
	if dial == nil {
		dial = (&net.Dialer{Timeout: limits.dial}).DialContext
	}
	transport := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           dial,
		TLSClientConfig:       &tls.Config{RootCAs: config.CA, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:   limits.dial,
		ResponseHeaderTimeout: limits.header,
		ForceAttemptHTTP2:     true,
		DisableCompression:    true, // a blob's digest is that of its bytes as they are
		MaxIdleConnsPerHost:   v1alpha1.MaxConcurrency,
		IdleConnTimeout:       90 * time.Second,
	}
	// Chunks that share a connection would share its pace, too.
	bulk := transport.Clone()
	bulk.ForceAttemptHTTP2 = false
	bulk.Protocols = new(http.Protocols)
	bulk.Protocols.SetHTTP1(true)
	bulk.TLSClientConfig.NextProtos = nil // what Clone made of the other's protocols
	bulk.TLSNextProto = nil
	bulk.ReadBufferSize = 64 << 10
	p := &parent{
		scheme: "https",
		host:   config.Endpoint,
		limits: limits,
		pace:   &pace{},
		log:    log,
		asks:   make(chan struct{}, limits.asks),
	}
	if config.Insecure {
		p.scheme = "http"
	}
	if slices.Contains([]string{"docker.io", "index.docker.io"}, p.host) {
		p.host = "registry-1.docker.io" // Docker Hub's registry goes by another name than its images
	}
	p.client = &http.Client{Transport: transport, CheckRedirect: p.redirect}
	p.bulk = &http.Client{Transport: bulk, CheckRedirect: p.redirect}
	p.auth = &authorizer{
		client:   &http.Client{Transport: boundedBodies{transport}, CheckRedirect: p.redirect},
		config:   config,
		host:     p.host,
		insecure: config.Insecure,
		limits:   limits,
		tokens:   make(map[string]*token),
	}
	return p
}

func (p *parent) close() {
	p.client.CloseIdleConnections()
	p.bulk.CloseIdleConnections()
}

func (p *parent) String() string { return "parent " + p.host }

// boundedBodies cuts the answers of a token service, which its client would
// read to the end wherever that is.
type boundedBodies struct{ http.RoundTripper }

func (b boundedBodies) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(req)
	if err == nil {
		resp.Body = http.MaxBytesReader(nil, resp.Body, 1<<20)
	}
	return resp, err
}

// redirect is the client's policy. net/http forwards the Authorization header
// to subdomains and to other ports of the same host; blob storage is often one
// of these, and is never meant to see it.
func (p *parent) redirect(req *http.Request, via []*http.Request) error {
	first := via[0].URL
	if req.URL.Host != first.Host || req.URL.Scheme != first.Scheme {
		req.Header.Del("Authorization")
		req.Header.Del(v1alpha1.HeaderChild)
	}
	switch {
	case len(via) >= 5:
		return errRedirect{"redirects again and again"}
	case first.Scheme == "https" && req.URL.Scheme != "https":
		return errRedirect{"redirects from TLS to plain HTTP at " + req.URL.Host}
	}
	return nil
}

// repositoryScope is the token scope to read a repository.
func repositoryScope(name string) string { return "repository:" + name + ":pull" }

const catalogScope = "registry:catalog:*"

// question is a request whose answer is small.
type question struct {
	method string
	path   string // with its query
	accept string
	scope  string
	what   string // names the thing in errors
	max    int64  // bytes of the body
	// known is the ETag of what is here already. Empty: nothing.
	known string
}

// answer is what came back, with a status of success.
type answer struct {
	header http.Header
	body   []byte
}

// ask sends a question until it is answered or is not worth asking again. A
// status other than success is a *fault.
func (p *parent) ask(ctx context.Context, q question) (answer, error) {
	select {
	case p.asks <- struct{}{}:
		defer func() { <-p.asks }()
	case <-ctx.Done():
		return answer{}, context.Cause(ctx)
	}
	for failures := 1; ; failures++ {
		a, err := p.askOnce(ctx, q)
		if err == nil {
			return a, nil
		}
		if err := p.again(ctx, err, failures); err != nil {
			return answer{}, err
		}
	}
}

func (p *parent) askOnce(ctx context.Context, q question) (answer, error) {
	if err := p.ready(ctx, q.method); err != nil {
		return answer{}, err
	}
	whole := ctx
	ctx, cancel := context.WithTimeout(ctx, p.limits.answer)
	defer cancel()
	header := make(http.Header)
	if q.accept != "" {
		header.Set("Accept", q.accept)
	}
	if q.known != "" {
		header.Set("If-None-Match", q.known)
	}
	resp, err := p.send(ctx, p.client, request{method: q.method, path: q.path, header: header, scope: q.scope, what: q.what})
	if err != nil {
		return answer{}, p.or(whole, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, q.max+1))
	p.received.Add(int64(len(body)))
	if err != nil {
		return answer{}, p.or(whole, interrupted(ctx, p.String(), q.what, p.limits, err))
	}
	if int64(len(body)) > q.max {
		return answer{}, unusable(p.String(), q.what, "it is larger than %d bytes", q.max)
	}
	return answer{resp.Header, body}, nil
}

// or returns why ctx ended if it has, else err.
func (p *parent) or(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// request is one request to the parent.
type request struct {
	method string
	path   string // with its query
	header http.Header
	scope  string // "": without credentials
	what   string // names the thing in errors
	// body opens what is sent, size bytes, anew for each attempt. nil: nothing.
	body func() io.ReadCloser
	size int64
	// also is a further status of success of a question. 0: none.
	also int
}

func (r request) build(ctx context.Context, base string) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, r.method, base+r.path, nil)
	if err != nil {
		return nil, err
	}
	req.Header = r.header.Clone()
	req.Header.Set("User-Agent", userAgent)
	if r.body != nil && r.size > 0 {
		req.Body, req.ContentLength = r.body(), r.size
		req.GetBody = func() (io.ReadCloser, error) { return r.body(), nil }
	}
	return req, nil
}

// done reports whether a status is one of success for the request.
func (r request) done(status int) bool {
	switch r.method {
	case http.MethodGet, http.MethodHead:
		return status == http.StatusOK || status == http.StatusPartialContent || status == r.also
	}
	return status >= 200 && status < 300
}

// send makes one request, answering one challenge. The caller closes the body.
// A status other than success is a *fault.
func (p *parent) send(ctx context.Context, client *http.Client, r request) (*http.Response, error) {
	what := r.what
	if err := p.hopeless(r.scope); err != nil {
		return nil, err
	}
	var stale string // credentials that the parent refused
	for challenges := 0; ; challenges++ {
		req, err := r.build(ctx, p.scheme+"://"+p.host)
		if err != nil {
			return nil, unusable(p.String(), what, "%s", oneLine(err.Error()))
		}
		used, err := p.auth.authorize(ctx, req, r.scope, stale)
		if err != nil {
			return nil, err
		}
		if challenges > 0 {
			p.pace.count()
		}
		introduced := p.introduce(req)
		resp, err := client.Do(req)
		if err != nil {
			f := unreachable(p.asked(err), what, p.limits, err)
			f.down = f.unreachable && p.asked(err) == p.String()
			return nil, f
		}
		if resp.Request.URL.Host == p.host {
			p.pace.observe(resp.Header)
			p.meet(resp.Header)
		}
		if r.done(resp.StatusCode) {
			if introduced {
				p.told.Store(true)
			}
			return resp, nil
		}
		again, err := p.refused(ctx, resp, what, used)
		if !again || r.scope == "" || challenges > 0 {
			p.judge(r.scope, err)
			return nil, err
		}
		stale = used
	}
}

// introduce says who asks, if the parent is to know and does not.
func (p *parent) introduce(req *http.Request) bool {
	if p.self == "" || !p.kin.Load() || p.told.Load() || req.Header.Get("Authorization") == "" {
		return false
	}
	req.Header.Set(v1alpha1.HeaderChild, p.self)
	return true
}

// meet takes note of a parent that is a connected registry.
func (p *parent) meet(header http.Header) {
	if header.Get(v1alpha1.HeaderParent) != "" {
		p.kin.Store(true)
	}
}

// judge takes note of how a request in a scope ended.
func (p *parent) judge(scope string, err error) {
	f, _ := errors.AsType[*fault](err)
	p.mu.Lock()
	defer p.mu.Unlock()
	if f == nil || f.status != http.StatusUnauthorized {
		delete(p.refusals, scope)
		return
	}
	if p.refusals == nil {
		p.refusals = make(map[string]refusals)
	}
	p.refusals[scope] = refusals{p.refusals[scope].times + 1, err}
}

// hopeless is why nothing more is asked for in a scope, nil when it is worth
// asking.
func (p *parent) hopeless(scope string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r := p.refusals[scope]; r.times >= maxRefusals {
		return r.last
	}
	return nil
}

// refused reads and closes an answer other than success. It returns the fault
// that this is, and whether other credentials may change that.
func (p *parent) refused(ctx context.Context, resp *http.Response, what, used string) (bool, error) {
	defer resp.Body.Close()
	if host := resp.Request.URL.Host; host != p.host {
		// What a host that was redirected to says about credentials is not
		// about the parent's. Its links expire, so another attempt may do.
		f := refusal(p.String(), what, resp, true)
		f.temporary = f.temporary || f.status == http.StatusForbidden || f.status == http.StatusUnauthorized
		f.message = fmt.Sprintf("%s redirected to %s, which answered %d for %s", p, host, f.status, what)
		f.status = 0
		return false, f
	}
	f := refusal(p.String(), what, resp, p.auth.known())
	if resp.StatusCode != http.StatusUnauthorized {
		return false, f
	}
	again, err := p.auth.challenged(ctx, resp, used)
	if err != nil {
		return false, err
	}
	return again, f
}

// asked names the host that a failed request went to last.
func (p *parent) asked(err error) string {
	if e, ok := errors.AsType[*url.Error](err); ok {
		if u, uerr := url.Parse(e.URL); uerr == nil && u.Host != "" && u.Host != p.host {
			return p.String() + "'s storage " + u.Host
		}
	}
	return p.String()
}

// ready waits until a request may be made, and fails at once when the parent is
// known to be down.
func (p *parent) ready(ctx context.Context, method string) error {
	p.mu.Lock()
	down := p.down
	p.mu.Unlock()
	if down != nil {
		return down
	}
	return p.pace.ready(ctx, method)
}

// again waits until it makes sense to try again after err, the last of so many
// failures in a row, or returns why it does not.
func (p *parent) again(ctx context.Context, err error, failures int) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	f, ok := errors.AsType[*fault](err)
	if ok && f.temporary && f.after > p.limits.maxRetryWait {
		p.pace.refuse(f)
		return err
	}
	if !ok || !f.temporary || failures >= p.limits.attempts {
		if ok && f.down {
			// Whatever else is to be asked would wait as long for as little.
			p.mu.Lock()
			p.down = cmp.Or(p.down, err)
			p.mu.Unlock()
		}
		return err
	}
	wait := min(p.limits.backoff<<(failures-1), p.limits.maxBackoff)
	wait = max(wait/2+rand.N(wait/2+1), f.after)
	p.log.Debug("trying again", "error", f.message, "failures", failures, "wait", wait)
	if f.status == http.StatusTooManyRequests || f.after > 0 {
		p.pace.pause(wait)
	}
	return sleep(ctx, wait)
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
