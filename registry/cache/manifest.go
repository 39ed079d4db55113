package cache

import (
	"container/list"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// manifest is a verified manifest.
type manifest struct {
	digest digest.Digest
	body   []byte
	header struct{ mediaType, length, digest []string } // as answers bear them
}

// newManifest returns nil if body is no manifest.
func newManifest(d digest.Digest, body []byte) *manifest {
	mediaType := mediaTypeOf(body)
	if mediaType == "" {
		return nil
	}
	m := &manifest{digest: d, body: body}
	m.header.mediaType = []string{mediaType}
	m.header.length = []string{strconv.Itoa(len(body))}
	m.header.digest = []string{d.String()}
	return m
}

// mediaTypeOf returns the media type of a manifest: the one it states, else the
// OCI type of its structure (OCI image spec, "manifest" and "image-index": the
// field is optional there). "" if it is not a manifest.
func mediaTypeOf(body []byte) string {
	var m struct {
		MediaType string           `json:"mediaType"`
		Config    *json.RawMessage `json:"config"`
		Layers    *json.RawMessage `json:"layers"`
		Manifests *json.RawMessage `json:"manifests"`
	}
	if json.Unmarshal(body, &m) != nil {
		return ""
	}
	if m.MediaType != "" {
		if t, _, err := mime.ParseMediaType(m.MediaType); err != nil || !strings.EqualFold(t, m.MediaType) {
			return "" // it has parameters, or is no media type at all
		}
		return m.MediaType
	}
	switch {
	case m.Manifests != nil:
		return ocispec.MediaTypeImageIndex
	case m.Config != nil && m.Layers != nil:
		return ocispec.MediaTypeImageManifest
	default:
		return ""
	}
}

// manifestCache holds the manifests used last in memory.
type manifestCache struct {
	mu    sync.Mutex // guards everything below
	byKey map[digest.Digest]*list.Element
	used  list.List // of *manifest, the latest first
	bytes int
}

func (mc *manifestCache) get(d digest.Digest) *manifest {
	mc.mu.Lock()
	defer mc.mu.Unlock()
	e := mc.byKey[d]
	if e == nil {
		return nil
	}
	mc.used.MoveToFront(e)
	return e.Value.(*manifest)
}

func (mc *manifestCache) put(m *manifest) {
	mc.mu.Lock()
	defer mc.mu.Unlock()
	if mc.byKey == nil {
		mc.byKey = make(map[digest.Digest]*list.Element)
	}
	if mc.byKey[m.digest] != nil {
		return
	}
	mc.byKey[m.digest] = mc.used.PushFront(m)
	mc.bytes += len(m.body)
	for mc.bytes > manifestMemory {
		last := mc.used.Remove(mc.used.Back()).(*manifest)
		delete(mc.byKey, last.digest)
		mc.bytes -= len(last.body)
	}
}

// manifestHere returns the manifest of d from memory, the store or containerd. Errors:
// fs.ErrNotExist, or what the store reported.
func (c *Cache) manifestHere(ctx context.Context, on *disk, d digest.Digest) (*manifest, error) {
	st := on.store
	if m := c.manifests.get(d); m != nil {
		st.touch(d)
		return m, nil
	}
	b, err := st.open(ctx, d, c.cfg.Timeouts.Headers)
	if errors.Is(err, fs.ErrNotExist) {
		if m := c.manifestInContent(ctx, on.content, d); m != nil {
			return m, nil
		}
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = b.Close() }()
	if b.size > maxManifest {
		return nil, fs.ErrNotExist
	}
	body := make([]byte, b.size)
	if _, err := io.ReadFull(b, body); err != nil {
		return nil, fmt.Errorf("reading a stored manifest: %w", err)
	}
	if d.Algorithm().FromBytes(body) != d {
		// The seal holds and the bytes do not: the medium has decayed.
		c.metrics.corrupt.WithLabelValues("store").Inc()
		return nil, st.discard(d, b.Name(), errors.New("content does not match its digest although its seal holds"))
	}
	m := newManifest(d, body)
	if m == nil {
		return nil, fs.ErrNotExist // a blob that someone asks for as a manifest
	}
	c.manifests.put(m)
	return m, nil
}

// fetchManifest gets the manifest that rq names by tag or digest from the
// registry, verifies it, and keeps it. Whoever asks for the same by the same
// right at the same time shares one request.
func (c *Cache) fetchManifest(ctx context.Context, rq *request, budget time.Duration) (*manifest, error) {
	key := "fetch" + string(rq.reader[:]) + rq.path()
	v, err, _ := c.once.Do(key, func() (any, error) {
		return c.fetchManifestOnce(context.WithoutCancel(ctx), rq, budget)
	})
	if err != nil {
		return nil, err
	}
	return v.(*manifest), nil
}

func (c *Cache) fetchManifestOnce(ctx context.Context, rq *request, budget time.Duration) (*manifest, error) {
	deadline := time.Now().Add(budget)
	var err error
	order := rq.registry.order()
	for i := range order {
		var ans *answer
		ans, err = c.asker.ask(ctx, rq.registry.host, rq.question(http.MethodGet), order[i:], time.Until(deadline))
		if err != nil {
			break
		}
		var m *manifest
		if m, err = c.readManifest(rq, ans); err == nil {
			c.keepManifest(rq, m)
			return m, nil
		}
	}
	rq.learn(err)
	return nil, err
}

// readManifest reads and verifies the manifest in ans. The error is
// unavailable: another upstream may do better.
func (c *Cache) readManifest(rq *request, ans *answer) (*manifest, error) {
	defer ans.close()
	host := ans.upstream.name
	body, err := io.ReadAll(io.LimitReader(c.asker.watch(ans, ans.left()), maxManifest+1))
	if err != nil {
		return nil, &unavailable{"broken", fmt.Errorf("%s: reading a manifest: %w", host, err)}
	}
	if len(body) > maxManifest {
		return nil, &unavailable{"too-large", fmt.Errorf("%s: the manifest is larger than %d bytes", host, maxManifest)}
	}
	d := rq.digest
	if d == "" {
		d = digest.FromBytes(body)
	}
	m := newManifest(d, body)
	if m == nil || d.Algorithm().FromBytes(body) != d {
		c.metrics.corrupt.WithLabelValues("upstream").Inc()
		c.faults.distrust(ans.upstream, d)
		c.log.Warn("an upstream served wrong bytes; they were not kept", "registry", rq.registry.host,
			"repository", rq.repo, "digest", d, "upstream", host)
		return nil, &unavailable{"bad-content", fmt.Errorf("%s: %w", host, errBadContent)}
	}
	return m, nil
}

// keepManifest remembers m at once and stores it without keeping the client
// waiting for the disk.
func (c *Cache) keepManifest(rq *request, m *manifest) {
	rq.about(m.digest).confirm()
	c.manifests.put(m)
	c.work.Go(func() {
		if err := rq.disk.store.put(m.digest, m.body); err != nil {
			c.log.Warn("a manifest could not be kept", "digest", m.digest, "error", err)
		}
	})
}

// serveManifest answers a request for a manifest.
func (c *Cache) serveManifest(w http.ResponseWriter, r *http.Request, rq *request) error {
	if rq.tag != "" {
		return c.serveTag(w, r, rq)
	}
	m, err := c.manifestHere(r.Context(), rq.disk, rq.digest)
	if err == nil {
		how, err := c.permit(r.Context(), rq)
		if err != nil {
			return err
		}
		if how.result == hitStored.result {
			rq.remember(r, m)
		}
		c.writeManifest(w, r, m, how)
		return nil
	}
	m, err = c.fetchManifest(r.Context(), rq, c.cfg.Timeouts.Headers)
	if err != nil {
		return rq.offline(err)
	}
	c.writeManifest(w, r, m, missStored)
	return nil
}

// serveTag asks the registry what the tag names now, and falls back on what it
// named last while the registry cannot be reached.
func (c *Cache) serveTag(w http.ResponseWriter, r *http.Request, rq *request) error {
	if rq.registry.cfg.TagsUpstream {
		return refuse(http.StatusNotFound, "tags-upstream", "tags of this registry are resolved by itself")
	}
	began, budget := time.Now(), c.cfg.Timeouts.Headers
	key := rq.tagKey()
	last := rq.disk.notes.tag(key)
	if last != "" && c.allowedOffline(rq.about(last)) {
		budget = c.cfg.Timeouts.Tag
	}
	d, err := c.resolve(r.Context(), rq, budget)
	if err == nil {
		c.noteTag(rq, d)
		m, how, err := c.manifestNow(r.Context(), rq.about(d), c.cfg.Timeouts.Headers-time.Since(began))
		if err == nil {
			c.writeManifest(w, r, m, how)
		}
		return err
	}
	var down *unavailable
	if !errors.As(err, &down) {
		var no *refusal
		if errors.As(err, &no) && no.upstream && no.status == http.StatusNotFound {
			rq.disk.notes.forget(key)
		}
		return err
	}
	if last != "" && c.allowedOffline(rq.about(last)) {
		if m, e := c.manifestHere(r.Context(), rq.disk, last); e == nil {
			c.metrics.staleTags.Inc()
			c.log.Info("a tag was served as last known: the registry is unreachable",
				"registry", rq.registry.host, "repository", rq.repo, "tag", rq.tag, "digest", last, "reason", down)
			c.writeManifest(w, r, m, hitStaleTag)
			return nil
		}
	}
	return rq.offline(err)
}

func (rq *request) tagKey() factKey {
	return rq.disk.key.fact("tag", rq.registry.host, rq.repo, rq.tag)
}

// noteTag remembers what the tag of rq names.
func (c *Cache) noteTag(rq *request, d digest.Digest) {
	if err := rq.disk.notes.put(rq.tagKey(), d.String()); err != nil {
		c.log.Warn("cannot note what a tag names; it cannot be served offline", "error", err)
	}
}

// manifestNow returns the manifest of rq, about which the registry was just
// asked.
func (c *Cache) manifestNow(ctx context.Context, rq *request, budget time.Duration) (*manifest, outcome, error) {
	if m, err := c.manifestHere(ctx, rq.disk, rq.digest); err == nil {
		return m, hitChecked, nil
	}
	m, err := c.fetchManifest(ctx, rq, max(budget, stallMargin))
	return m, missStored, err
}

// resolve asks the registry which manifest a tag names. Where the answer to a
// HEAD does not tell, the manifest itself does.
func (c *Cache) resolve(ctx context.Context, rq *request, budget time.Duration) (digest.Digest, error) {
	deadline := time.Now().Add(budget)
	ans, err := c.asker.ask(ctx, rq.registry.host, rq.question(http.MethodHead), rq.registry.order(), budget)
	if err != nil {
		rq.learn(err)
		return "", err
	}
	d := digest.Digest(ans.Header.Get("Docker-Content-Digest"))
	ans.close()
	if d.Validate() == nil {
		rq.about(d).confirm()
		return d, nil
	}
	m, err := c.fetchManifest(ctx, rq, time.Until(deadline))
	if err != nil {
		return "", err
	}
	return m.digest, nil
}
