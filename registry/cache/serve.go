package cache

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// outcome says where the bytes of an answer come from, for Cache-Status and
// metrics.
type outcome struct {
	header []string // of Cache-Status
	result string
	source string
}

// Where bytes come from.
const (
	fromStore      = "store"
	fromContainerd = "containerd"
	fromUpstream   = "upstream"
)

var (
	hitStored     = outcome{cacheStatus("hit"), "hit", fromStore}
	hitChecked    = outcome{cacheStatus("hit; detail=checked"), "checked", fromStore}
	hitOffline    = outcome{cacheStatus("hit; detail=offline"), "offline", fromStore}
	hitStaleTag   = outcome{cacheStatus("hit; detail=stale-tag"), "stale-tag", fromStore}
	hitContainerd = outcome{cacheStatus("hit; detail=containerd"), "containerd", fromContainerd}
	missStored    = outcome{cacheStatus("fwd=miss; stored"), "miss", fromUpstream}
	missJoined    = outcome{cacheStatus("fwd=miss; collapsed; stored"), "joined", fromUpstream}
	missHead      = outcome{cacheStatus("fwd=miss"), "miss", fromUpstream}
)

// toPeer is any answer to another node.
var toPeer = outcome{cacheStatus("hit; detail=peer"), "peer", "peer"}

func bypass(why string) outcome {
	return outcome{cacheStatus("fwd=bypass; detail=" + why), "bypass", fromUpstream}
}

func cacheStatus(of string) []string { return []string{"connected-registry; " + of} }

// cacheStatus is the Cache-Status item of a refusal.
func (e *refusal) cacheStatus() string {
	if e.upstream {
		return "fwd=miss; fwd-status=" + strconv.Itoa(e.status)
	}
	detail := e.cause
	switch detail {
	case "bad-content", "tags-upstream", "loop", "verifying", "stopping":
	default:
		detail = "unreachable"
	}
	return "fwd=miss; detail=" + detail
}

// ServeHTTP implements http.Handler.
func (c *Cache) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !c.enter() {
		refuse(http.StatusServiceUnavailable, "stopping", "the cache is not running").write(w)
		return
	}
	defer c.requests.Done()
	if err := c.serve(w, r); err != nil {
		no := toRefusal(err)
		c.metrics.refusals.WithLabelValues(no.cause).Inc()
		c.log.Debug("refused", "method", r.Method, "path", r.URL.Path, "ns", r.URL.Query().Get("ns"),
			"status", no.status, "cause", no.cause, "reason", no.message)
		no.write(w)
	}
}

// enter counts a request in, unless the cache is not running.
func (c *Cache) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopping || c.disk.Load() == nil {
		return false
	}
	c.requests.Add(1)
	return true
}

// serve answers r, or returns what to refuse it with; then nothing has been
// written to w but headers.
func (c *Cache) serve(w http.ResponseWriter, r *http.Request) error {
	if r.URL.Path == tokenPath {
		return c.serveToken(w, r)
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		return refuse(http.StatusMethodNotAllowed, "method", "the cache only reads")
	}
	d := c.disk.Load()
	t, reg, err := c.target(d, r.URL)
	if err != nil {
		return err
	}
	if t.kind == kindPing {
		servePing(w)
		return nil
	}
	rq := c.newRequest(d, t, reg, r)
	if err = c.content(w, r, rq); err == nil {
		return nil
	}
	no := *toRefusal(err) // others may share it
	no.challenges = slices.Clone(no.challenges)
	reg.leadHere(&no, r.Host)
	w.Header()["Cache-Status"] = cacheStatus(no.cacheStatus())
	return &no
}

func (c *Cache) content(w http.ResponseWriter, r *http.Request, rq *request) error {
	if strings.Contains(strings.Join(r.Header["Via"], ","), c.pseudonym) {
		return refuse(http.StatusLoopDetected, "loop", "this request has been here before: an upstream of this cache leads back to it")
	}
	switch rq.kind {
	case kindManifest:
		return c.serveManifest(w, r, rq)
	case kindBlob:
		return c.serveBlob(w, r, rq)
	default:
		return c.serveReferrers(w, r, rq)
	}
}

func (c *Cache) registryFor(ns string) (*registry, error) {
	all := *c.registries.Load()
	if ns == "" && len(all) == 1 {
		for _, reg := range all {
			return reg, nil
		}
	}
	if reg := all[ns]; reg != nil {
		return reg, nil
	}
	return nil, refuse(http.StatusNotFound, "namespace", "the cache does not answer for this registry")
}

func (c *Cache) newRequest(d *disk, t *target, reg *registry, r *http.Request) *request {
	rq := &request{
		target: *t, registry: reg, disk: d, faults: &c.faults, header: r.Header, pseudonym: c.pseudonym,
	}
	rq.setAuth(r.Header.Get("Authorization"))
	return rq
}

func servePing(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Docker-Distribution-Api-Version", "registry/2.0")
	_, _ = io.WriteString(w, "{}\n")
}

func (c *Cache) writeManifest(w http.ResponseWriter, r *http.Request, m *manifest, how outcome) {
	h := w.Header()
	h["Content-Type"] = m.header.mediaType
	h["Content-Length"] = m.header.length
	h["Docker-Content-Digest"] = m.header.digest
	h["Cache-Status"] = how.header
	c.metrics.answered(kindManifest, how)
	if r.Method == http.MethodHead {
		return
	}
	n, _ := w.Write(m.body) // the client's connection is the client's affair
	c.metrics.sent(how, int64(n))
}

// blobHeader begins the answer with s of a blob of size bytes.
func (c *Cache) blobHeader(w http.ResponseWriter, rq *request, ranged bool, s span, size int64, how outcome) {
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Length", strconv.FormatInt(s.len(), 10))
	h.Set("Docker-Content-Digest", rq.digest.String())
	h.Set("Accept-Ranges", "bytes")
	h.Set("Etag", etag(rq.digest))
	h["Cache-Status"] = how.header
	c.metrics.answered(kindBlob, how)
	if !ranged {
		w.WriteHeader(http.StatusOK)
		return
	}
	h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", s.start, s.end-1, size))
	w.WriteHeader(http.StatusPartialContent)
}

func etag(d digest.Digest) string { return `"` + d.String() + `"` }

// rangeOf returns the range that r asks for. Other conditions are ignored: a
// 304 would make containerd's pull fail.
func rangeOf(r *http.Request, d digest.Digest) byteRange {
	if cond := r.Header.Get("If-Range"); cond != "" && cond != etag(d) {
		return byteRange{}
	}
	if r.Method != http.MethodGet {
		return byteRange{}
	}
	return parseRange(r.Header.Get("Range"))
}

func outOfRange(w http.ResponseWriter, size int64) error {
	w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
	return refuse(http.StatusRequestedRangeNotSatisfiable, "range", "the range lies outside of the content")
}

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
	began, how := time.Now(), missStored
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
	// come back here until it gives up: so wait until a stall would have shown.
	patience := max(c.cfg.Timeouts.Headers-time.Since(began), c.cfg.Timeouts.Stall+stallMargin)
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

// passThrough gives the client the upstream's answer without keeping it. A
// whole body is hashed on its way, and its end held back until it is verified.
func (c *Cache) passThrough(w http.ResponseWriter, r *http.Request, rq *request, why string) error {
	rng := rangeOf(r, rq.digest)
	q := rq.question(r.Method)
	if rng.set {
		q.ranges = r.Header.Get("Range")
	}
	ans, err := c.asker.ask(r.Context(), rq.registry.host, q, rq.registry.order(), c.cfg.Timeouts.Headers)
	if err != nil {
		rq.learn(err)
		return rq.offline(err)
	}
	defer ans.close()
	s, size, err := spanOf(ans, rng)
	if err != nil {
		return err
	}
	rq.confirm()
	how := bypass(why)
	ranged := ans.StatusCode == http.StatusPartialContent
	c.blobHeader(w, rq, ranged, s, size, how)
	if r.Method == http.MethodHead {
		return nil
	}
	out := &verifiedWriter{w: w}
	if !ranged {
		out.digest, out.hash = rq.digest, rq.digest.Algorithm().Hash()
	}
	err = out.copy(c.asker.watch(ans), s.len())
	c.metrics.sent(how, out.sent)
	if errors.Is(err, errBadContent) {
		c.metrics.corrupt.WithLabelValues("upstream").Inc()
		c.faults.distrust(ans.upstream, rq.digest)
		c.log.Warn("an upstream served wrong bytes", "registry", rq.registry.host,
			"repository", rq.repo, "digest", rq.digest, "upstream", ans.upstream.name)
	}
	return nil
}

// spanOf returns which bytes of how many an upstream's answer to rng has.
func spanOf(ans *answer, rng byteRange) (span, int64, error) {
	host := ans.upstream.name
	if ans.ContentLength < 0 {
		return span{}, 0, &unavailable{"length", fmt.Errorf("%s gives no length for the content", host)}
	}
	if ans.StatusCode == http.StatusOK {
		return span{0, ans.ContentLength}, ans.ContentLength, nil
	}
	got, total, ok := parseContentRange(ans.Header.Get("Content-Range"))
	want, satisfiable := rng.of(total)
	if !ok || !satisfiable || got != want || got.len() != ans.ContentLength {
		return span{}, 0, &unavailable{"range", fmt.Errorf("%s answered with another range than asked for", host)}
	}
	return got, total, nil
}

// verifiedWriter copies a body and keeps back its last chunk until the digest
// of the whole is known to be right.
type verifiedWriter struct {
	w      io.Writer
	digest digest.Digest // "": a part, which cannot be verified
	hash   hash.Hash
	sent   int64
}

func (v *verifiedWriter) copy(src io.Reader, size int64) error {
	buf := make([]byte, holdBackTail)
	for left := size; left > 0; {
		chunk := buf[:min(left, int64(len(buf)))]
		if _, err := io.ReadFull(src, chunk); err != nil {
			return err
		}
		left -= int64(len(chunk))
		if v.digest != "" {
			v.hash.Write(chunk)
			if left == 0 && !v.right() {
				return errBadContent
			}
		}
		n, err := v.w.Write(chunk)
		v.sent += int64(n)
		if err != nil {
			return err
		}
	}
	return nil
}

func (v *verifiedWriter) right() bool {
	return digest.NewDigest(v.digest.Algorithm(), v.hash) == v.digest
}

// serveReferrers passes a list of referrers through (OCI distribution spec 1.1,
// "Listing Referrers").
func (c *Cache) serveReferrers(w http.ResponseWriter, r *http.Request, rq *request) error {
	q := rq.question(r.Method)
	q.avoid = nil
	ans, err := c.asker.ask(r.Context(), rq.registry.host, q, rq.registry.order(), c.cfg.Timeouts.Headers)
	if err != nil {
		return err
	}
	defer ans.close()
	list, err := io.ReadAll(io.LimitReader(c.asker.watch(ans), maxManifest+1))
	if err != nil || len(list) > maxManifest {
		return &unavailable{"broken", fmt.Errorf("%s: the list of referrers broke off or is too large", ans.upstream.name)}
	}
	h := w.Header()
	for _, name := range []string{"Content-Type", "OCI-Filters-Applied", "Link"} {
		if v := ans.Header.Get(name); v != "" {
			h.Set(name, v)
		}
	}
	how := bypass("referrers")
	h["Cache-Status"] = how.header
	c.metrics.answered(kindReferrers, how)
	if r.Method == http.MethodGet {
		h.Set("Content-Length", strconv.Itoa(len(list)))
		_, _ = w.Write(list)
	}
	return nil
}
