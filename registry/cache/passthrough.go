package cache

import (
	"errors"
	"fmt"
	"github.com/opencontainers/go-digest"
	"hash"
	"io"
	"net/http"
	"strconv"
)

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
	err = out.copy(c.asker.watch(ans, ans.left()), s.len())
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
	list, err := io.ReadAll(io.LimitReader(c.asker.watch(ans, ans.left()), maxManifest+1))
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
