package cache

import (
	"errors"
	"io"
	"io/fs"
	"net/http"
)

// servePeer answers another node with a blob that is here or on its way here.
func (c *Cache) servePeer(w http.ResponseWriter, r *http.Request) {
	if !c.enter() {
		refuse(http.StatusServiceUnavailable, "stopping", "the cache is not running").write(w)
		return
	}
	defer c.requests.Done()
	if err := c.peerBlob(w, r); err != nil {
		toRefusal(err).write(w)
	}
}

func (c *Cache) peerBlob(w http.ResponseWriter, r *http.Request) error {
	rt, err := parseRoute(r.URL)
	if err != nil {
		return err
	}
	asking := r.Header.Get(peerHeader)
	if r.Method != http.MethodGet || rt.kind != kindBlob || c.peers.node(asking) == nil {
		return refuse(http.StatusForbidden, "peer", "only a known node is answered, and only about blobs")
	}
	rq := &request{target: target{route: rt}, disk: c.disk.Load()}
	b, err := rq.disk.store.open(r.Context(), rt.digest, c.cfg.Timeouts.Peer)
	if err == nil {
		return c.peerStored(w, r, rq, b)
	}
	if errors.Is(err, fs.ErrNotExist) {
		patient := r.Header.Get(patientHeader) != ""
		if f := c.joinFillAs(rt.digest, patient); f != nil {
			defer f.leave(c.cfg.Timeouts.Unread)
			if patient {
				defer f.hurry()
			}
			if err = c.peerFill(w, r, rq, f); err == nil {
				return nil
			}
		} else if err = c.peerContent(w, r, rq); err == nil {
			return nil
		}
	}
	w.Header().Set(peerHeader, c.peers.book.enter(rt.digest, asking))
	return refuse(http.StatusNotFound, "not-found", "this node has not got it")
}

func (c *Cache) peerStored(w http.ResponseWriter, r *http.Request, rq *request, b *blob) error {
	defer func() { _ = b.Close() }()
	rng := rangeOf(r, rq.digest)
	s, ok := rng.of(b.size)
	if !ok {
		return outOfRange(w, b.size)
	}
	c.blobHeader(w, rq, rng.set, s, b.size, toPeer)
	n, _ := io.Copy(w, io.NewSectionReader(b.File, s.start, s.len()))
	c.metrics.sent(toPeer, n)
	return nil
}

// peerFill passes a download on as it comes in: the peer verifies for itself.
// An error says that nothing was answered.
func (c *Cache) peerFill(w http.ResponseWriter, r *http.Request, rq *request, f *fill) error {
	size, err := f.awaitSize(r.Context())
	if err != nil {
		return err
	}
	rng := rangeOf(r, rq.digest)
	s, ok := rng.of(size)
	if !ok {
		return outOfRange(w, size)
	}
	file, err := f.open()
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.Seek(s.start, io.SeekStart); err != nil {
		return err
	}
	c.blobHeader(w, rq, rng.set, s, size, toPeer)
	c.follow(r.Context(), w, f, file, s, toPeer)
	return nil
}

// peerContent answers with a whole blob of containerd's.
func (c *Cache) peerContent(w http.ResponseWriter, r *http.Request, rq *request) error {
	size, ok := rq.disk.content.size(r.Context(), rq.digest)
	if !ok || rangeOf(r, rq.digest).set {
		return errElsewhere
	}
	src, err := rq.disk.content.open(r.Context(), rq.digest)
	if err != nil {
		return err
	}
	defer src.Close()
	c.blobHeader(w, rq, false, span{0, size}, size, toPeer)
	n, _ := io.CopyN(w, src, size)
	c.metrics.sent(toPeer, n)
	return nil
}
