package cache

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

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
