package syncer

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

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
	client       *http.Client
	transport    *http.Transport
	auth         *authorizer
	limits       limits
	log          *slog.Logger
	asks         chan struct{}

	received    atomic.Int64 // bytes of bodies
	noReferrers atomic.Bool  // the parent has no referrers API

	mu     sync.Mutex
	paused time.Time // nothing is asked before
	down   error     // why nothing more is asked at all
}

func newParent(config Parent, limits limits, log *slog.Logger) *parent {
	p := &parent{
		scheme: "https",
		host:   config.Endpoint,
		limits: limits,
		log:    log,
		asks:   make(chan struct{}, limits.asks),
		transport: &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           (&net.Dialer{Timeout: limits.dial}).DialContext,
			TLSClientConfig:       &tls.Config{RootCAs: config.CA, MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout:   limits.dial,
			ResponseHeaderTimeout: limits.header,
			ForceAttemptHTTP2:     true,
			DisableCompression:    true, // a blob's digest is that of its bytes as they are
			MaxIdleConnsPerHost:   v1alpha1.MaxConcurrency,
			IdleConnTimeout:       90 * time.Second,
		},
	}
	if config.Insecure {
		p.scheme = "http"
	}
	if slices.Contains([]string{"docker.io", "index.docker.io"}, p.host) {
		p.host = "registry-1.docker.io" // Docker Hub's registry goes by another name than its images
	}
	p.client = &http.Client{Transport: p.transport, CheckRedirect: p.redirect}
	p.auth = &authorizer{
		client:   &http.Client{Transport: boundedBodies{p.transport}, CheckRedirect: p.redirect},
		username: config.Username,
		password: config.Password,
		host:     p.host,
		insecure: config.Insecure,
		limits:   limits,
		tokens:   make(map[string]*token),
	}
	return p
}

func (p *parent) close() { p.transport.CloseIdleConnections() }

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
	if err := p.ready(ctx); err != nil {
		return answer{}, err
	}
	whole := ctx
	ctx, cancel := context.WithTimeout(ctx, p.limits.answer)
	defer cancel()
	header := make(http.Header)
	if q.accept != "" {
		header.Set("Accept", q.accept)
	}
	resp, err := p.send(ctx, q.method, q.path, header, q.scope, q.what)
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

// send makes one request, answering one challenge. The caller closes the body.
// A status other than success is a *fault.
func (p *parent) send(ctx context.Context, method, path string, header http.Header, scope, what string) (*http.Response, error) {
	var stale string // credentials that the parent refused
	for challenges := 0; ; challenges++ {
		req, err := http.NewRequestWithContext(ctx, method, p.scheme+"://"+p.host+path, nil)
		if err != nil {
			return nil, unusable(p.String(), what, "%s", oneLine(err.Error()))
		}
		req.Header = header.Clone()
		req.Header.Set("User-Agent", userAgent)
		used, err := p.auth.authorize(ctx, req, scope, stale)
		if err != nil {
			return nil, err
		}
		resp, err := p.client.Do(req)
		if err != nil {
			f := unreachable(p.asked(err), what, p.limits, err)
			f.down = f.unreachable && p.asked(err) == p.String()
			return nil, f
		}
		if resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusPartialContent {
			return resp, nil
		}
		again, err := p.refused(ctx, resp, what, used)
		if !again || scope == "" || challenges > 0 {
			return nil, err
		}
		stale = used
	}
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

// ready waits out a pause that the parent asked for, and fails at once when the
// parent is known to be down.
func (p *parent) ready(ctx context.Context) error {
	p.mu.Lock()
	wait, down := time.Until(p.paused), p.down
	p.mu.Unlock()
	if down != nil {
		return down
	}
	return sleep(ctx, wait)
}

// again waits until it makes sense to try again after err, the last of so many
// failures in a row, or returns why it does not.
func (p *parent) again(ctx context.Context, err error, failures int) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	f, ok := errors.AsType[*fault](err)
	if !ok || !f.temporary || failures >= p.limits.attempts || f.after > p.limits.maxRetryWait {
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
		p.mu.Lock()
		if until := time.Now().Add(wait); until.After(p.paused) {
			p.paused = until
		}
		p.mu.Unlock()
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

// ping asks for nothing but an answer, so that a parent that is not there, or
// not trusted, is found out once and at once. What it answers does not matter:
// registries differ here, and the questions that follow will tell.
func (p *parent) ping(ctx context.Context) error {
	_, err := p.ask(ctx, question{method: http.MethodGet, path: "/v2/", what: "/v2/", max: 1 << 20})
	if f, ok := errors.AsType[*fault](err); ok && f.status != 0 && !f.temporary {
		return nil
	}
	return err
}

// resolve asks what a tag stands for, with a HEAD and, of a parent whose answer
// to that names no digest, with a GET.
func (p *parent) resolve(ctx context.Context, repository, tag string) (digest.Digest, error) {
	what := repository + ":" + tag
	q := question{
		method: http.MethodHead,
		path:   "/v2/" + repository + "/manifests/" + tag,
		accept: acceptManifests,
		scope:  repositoryScope(repository),
		what:   what,
		max:    p.limits.manifest,
	}
	a, err := p.ask(ctx, q)
	if f, ok := errors.AsType[*fault](err); err != nil && !(ok && f.status == http.StatusMethodNotAllowed) {
		return "", err
	}
	if err == nil {
		if d, err := digest.Parse(a.header.Get("Docker-Content-Digest")); err == nil {
			return p.supported(d, what)
		}
	}
	q.method = http.MethodGet
	if a, err = p.ask(ctx, q); err != nil {
		return "", err
	}
	if _, err := p.manifestOf(a, what); err != nil {
		return "", err
	}
	return digest.FromBytes(a.body), nil
}

func (p *parent) supported(d digest.Digest, what string) (digest.Digest, error) {
	if d.Algorithm() != digest.SHA256 {
		return "", unusable(p.String(), what, "its digest is %s, and only sha256 can be stored", d.Algorithm())
	}
	return d, nil
}

// manifest fetches a manifest by its digest, and checks that it is what it is
// called.
func (p *parent) manifest(ctx context.Context, repository string, d digest.Digest) (manifest, error) {
	what := repository + "@" + d.String()
	a, err := p.ask(ctx, question{
		method: http.MethodGet,
		path:   "/v2/" + repository + "/manifests/" + d.String(),
		accept: acceptManifests,
		scope:  repositoryScope(repository),
		what:   what,
		max:    p.limits.manifest,
	})
	if err != nil {
		return manifest{}, err
	}
	if actual := d.Algorithm().FromBytes(a.body); actual != d {
		if isHTML(a.header) {
			return manifest{}, unusable(p.String(), what, "it is a web page: is something between here and the parent that wants a login?")
		}
		return manifest{}, unusable(p.String(), what, "its digest is %s", actual)
	}
	return p.manifestOf(a, what)
}

func (p *parent) manifestOf(a answer, what string) (manifest, error) {
	if isHTML(a.header) {
		return manifest{}, unusable(p.String(), what, "it is a web page: is something between here and the parent that wants a login?")
	}
	m, err := parseManifest(a.header.Get("Content-Type"), a.body)
	if err != nil {
		return manifest{}, unusable(p.String(), what, "%s", oneLine(err.Error()))
	}
	return m, nil
}

// tags lists a repository's tags, those that are none left out.
func (p *parent) tags(ctx context.Context, repository string) ([]string, error) {
	names, err := p.names(ctx, question{
		path:  "/v2/" + repository + "/tags/list?n=1000",
		scope: repositoryScope(repository),
		what:  "the tags of " + repository,
	}, "tags", v1alpha1.ValidTag)
	if f, ok := errors.AsType[*fault](err); ok && f.status == http.StatusNotFound {
		f.message = fmt.Sprintf("%s has no repository %s (404)", p, repository)
	}
	return names, err
}

// catalog lists the parent's repositories.
func (p *parent) catalog(ctx context.Context) ([]string, error) {
	names, err := p.names(ctx, question{
		path:  "/v2/_catalog?n=1000",
		scope: catalogScope,
		what:  "the list of its repositories",
	}, "repositories", v1alpha1.ValidRepositoryName)
	if f, ok := errors.AsType[*fault](err); ok && f.status >= 400 && f.status < 500 && f.status != http.StatusTooManyRequests {
		f.message = fmt.Sprintf("%s does not list its repositories (%d): name them in spec.repositories without wildcards", p, f.status)
	}
	return names, err
}

// names reads a list page by page (distribution specification, "Listing Tags"),
// which a parent might do without end: over pages that bring nothing, that came
// before, or that are simply too many.
func (p *parent) names(ctx context.Context, q question, key string, valid func(string) bool) ([]string, error) {
	q.method, q.accept, q.max = http.MethodGet, "application/json", p.limits.list
	seen := make(map[string]bool)
	var names []string
	for {
		a, err := p.ask(ctx, q)
		if err != nil {
			return nil, err
		}
		page, err := listed(a, key)
		if err != nil {
			return nil, unusable(p.String(), q.what, "%s", oneLine(err.Error()))
		}
		before := len(seen)
		for _, name := range page {
			if !seen[name] && valid(name) {
				names = append(names, name)
			}
			seen[name] = true
		}
		next := nextPage(a.header, q.path)
		if next == "" {
			slices.Sort(names)
			return names, nil
		}
		if len(seen) == before {
			return nil, unusable(p.String(), q.what, "its pages have no end")
		}
		if len(seen) > p.limits.names {
			return nil, unusable(p.String(), q.what, "there are more than %d", p.limits.names)
		}
		q.path = next
	}
}

// listed is the list of strings under key of a JSON object.
func listed(a answer, key string) ([]string, error) {
	if isHTML(a.header) {
		return nil, errors.New("it is a web page: is spec.parent.endpoint a registry?")
	}
	var page map[string]json.RawMessage
	if err := json.Unmarshal(a.body, &page); err != nil {
		return nil, errors.New("it is not JSON")
	}
	var names []string
	if raw, ok := page[key]; ok {
		if err := json.Unmarshal(raw, &names); err != nil {
			return nil, fmt.Errorf("its %s are not a list of names", key)
		}
	}
	return names, nil
}

// nextPage is the path and query of the page that follows the one at path, or ""
// (RFC 8288). The host that the link names is not followed: it is this one, if
// under another name, or none of our business.
func nextPage(h http.Header, path string) string {
	for _, link := range h.Values("Link") {
		target, params, ok := strings.Cut(link, ">")
		target, found := strings.CutPrefix(strings.TrimSpace(target), "<")
		if !ok || !found || !strings.Contains(strings.ToLower(strings.ReplaceAll(params, `"`, "")), "rel=next") {
			continue
		}
		base, err := url.Parse(path)
		if err != nil {
			return ""
		}
		u, err := base.Parse(target)
		if err != nil || !strings.HasPrefix(u.Path, "/v2/") {
			return ""
		}
		return u.RequestURI()
	}
	return ""
}

// referrers asks the parent's referrers API (distribution specification,
// "Listing Referrers") for what refers to a manifest. ok is false when the
// parent has none.
func (p *parent) referrers(ctx context.Context, repository string, d digest.Digest) (found []v1.Descriptor, ok bool, err error) {
	q := question{
		method: http.MethodGet,
		path:   "/v2/" + repository + "/referrers/" + d.String(),
		accept: v1.MediaTypeImageIndex,
		scope:  repositoryScope(repository),
		what:   "the referrers of " + repository + "@" + d.String(),
		max:    p.limits.manifest,
	}
	seen := make(map[digest.Digest]bool)
	for !p.noReferrers.Load() {
		a, err := p.ask(ctx, q)
		if f, is := errors.AsType[*fault](err); is && slices.Contains([]int{400, 404, 405, 406, 501}, f.status) {
			break
		} else if err != nil {
			return nil, false, err
		}
		if mediaType, _, _ := mime.ParseMediaType(a.header.Get("Content-Type")); mediaType != v1.MediaTypeImageIndex {
			break
		}
		page, err := parseManifest(v1.MediaTypeImageIndex, a.body)
		if err != nil {
			return nil, false, unusable(p.String(), q.what, "%s", oneLine(err.Error()))
		}
		before := len(seen)
		for _, desc := range page.children {
			if !seen[desc.Digest] {
				found = append(found, desc)
			}
			seen[desc.Digest] = true
		}
		if q.path = nextPage(a.header, q.path); q.path == "" {
			return found, true, nil
		}
		if len(seen) == before || len(seen) > p.limits.names {
			return nil, false, unusable(p.String(), q.what, "its pages have no end")
		}
	}
	p.noReferrers.Store(true)
	return nil, false, nil
}

// blob opens a blob's bytes from offset on, up to the descriptor's size. The
// reader fails with a *fault when they break off or come too slowly. It must be
// closed.
func (p *parent) blob(ctx context.Context, repository string, desc v1.Descriptor, offset int64) (io.ReadCloser, error) {
	if err := p.ready(ctx); err != nil {
		return nil, err
	}
	what := repository + "@" + desc.Digest.String()
	path := "/v2/" + repository + "/blobs/" + desc.Digest.String()
	header := make(http.Header)
	if offset > 0 {
		header.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, desc.Size-1))
	}
	transfer, cancel := context.WithCancelCause(ctx)
	resp, err := p.send(transfer, http.MethodGet, path, header, repositoryScope(repository), what)
	if f, ok := errors.AsType[*fault](err); ok && f.status == http.StatusRequestedRangeNotSatisfiable && offset > 0 {
		resp, err = p.send(transfer, http.MethodGet, path, make(http.Header), repositoryScope(repository), what)
	}
	if err != nil {
		cancel(nil)
		return nil, p.or(ctx, err)
	}
	r := &blobReader{parent: p, outer: ctx, ctx: transfer, cancel: cancel, body: resp.Body, what: what, left: desc.Size - offset}
	r.timer = time.AfterFunc(p.limits.stall, func() { cancel(errStalled) })
	if err := r.begin(resp, desc.Size, offset); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// blobReader reads the rest of a blob.
type blobReader struct {
	parent *parent
	outer  context.Context
	ctx    context.Context // of this transfer alone
	cancel context.CancelCauseFunc
	body   io.ReadCloser
	what   string
	left   int64
	timer  *time.Timer
	since  int64 // bytes since the timer was set
}

// begin checks that the answer holds the bytes from offset on, and reads what
// comes before them if the parent does not do ranges.
func (r *blobReader) begin(resp *http.Response, size, offset int64) error {
	who := r.parent.String()
	length := size
	if resp.StatusCode == http.StatusPartialContent {
		var first, last int64
		if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/", &first, &last); err != nil || first != offset {
			return unusable(who, r.what, "it sent another part of it than was asked for")
		}
		length = size - offset
	}
	if resp.ContentLength >= 0 && resp.ContentLength != length {
		if isHTML(resp.Header) {
			return unusable(who, r.what, "it is a web page: is something between here and the parent that wants a login?")
		}
		return unusable(who, r.what, "it has %d bytes where its manifest says %d", resp.ContentLength+size-length, size)
	}
	if resp.StatusCode == http.StatusOK && offset > 0 {
		r.left = size
		if _, err := io.CopyN(io.Discard, r, offset); err != nil {
			return err
		}
	}
	return nil
}

func (r *blobReader) Read(b []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF // whatever else there may be; the digest decides
	}
	n, err := r.body.Read(b[:min(int64(len(b)), r.left)])
	r.left -= int64(n)
	r.parent.received.Add(int64(n))
	if r.since += int64(n); r.since >= r.parent.limits.stallBytes {
		r.since = 0
		r.timer.Reset(r.parent.limits.stall)
	}
	if err == nil || r.left == 0 {
		return n, nil
	}
	if r.outer.Err() != nil {
		return n, context.Cause(r.outer)
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, interrupted(r.ctx, r.parent.String(), r.what, r.parent.limits, err)
}

func (r *blobReader) Close() error {
	r.timer.Stop()
	r.cancel(nil)
	return r.body.Close()
}
