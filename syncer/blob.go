package syncer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// errNoRanges reports a parent that sends all of a blob when it is asked for a
// part.
var errNoRanges = errors.New("no ranges")

// blob opens length bytes of a blob from offset on, of which the parent may send
// fewer. The reader fails with a *fault when they break off or come too slowly.
// It must be closed.
func (p *parent) blob(ctx context.Context, repository string, desc v1.Descriptor, offset, length int64) (*blobReader, error) {
	if err := p.ready(ctx, http.MethodGet); err != nil {
		return nil, err
	}
	what := repository + "@" + desc.Digest.String()
	header := make(http.Header)
	if length < desc.Size {
		header.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	}
	transfer, cancel := context.WithCancelCause(ctx)
	resp, err := p.send(transfer, p.bulk, request{method: http.MethodGet, path: "/v2/" + repository + "/blobs/" + desc.Digest.String(), header: header, scope: repositoryScope(repository), what: what}) //nolint:bodyclose // by blobReader
	if err != nil {
		cancel(nil)
		if f, ok := errors.AsType[*fault](err); ok && f.status == http.StatusRequestedRangeNotSatisfiable && length < desc.Size {
			return nil, errNoRanges
		}
		return nil, p.or(ctx, err)
	}
	r := &blobReader{parent: p, outer: ctx, ctx: transfer, cancel: cancel, body: resp.Body, what: what, deadline: time.Now().Add(p.limits.stall)}
	r.timer = time.AfterFunc(p.limits.stall, func() { cancel(errStalled) })
	if r.left, err = r.check(resp, desc.Size, offset, length); err != nil {
		_ = r.Close()
		return nil, err
	}
	return r, nil
}

// blobReader reads a part of a blob.
type blobReader struct {
	parent   *parent
	outer    context.Context
	ctx      context.Context // of this transfer alone
	cancel   context.CancelCauseFunc
	body     io.ReadCloser
	what     string
	left     int64
	timer    *time.Timer
	deadline time.Time // when timer fires
	since    int64     // bytes since the timer was set
}

// check returns how many bytes from offset on the answer holds.
func (r *blobReader) check(resp *http.Response, size, offset, length int64) (int64, error) {
	who := r.parent.String()
	if resp.StatusCode == http.StatusOK && length < size {
		return 0, errNoRanges
	}
	whole, sent := size, length
	if resp.StatusCode == http.StatusPartialContent {
		var first, last int64
		n, _ := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/%d", &first, &last, &whole)
		if n < 2 || first != offset || last < first || last-first >= length {
			return 0, unusable(who, r.what, "it sent another part of it than was asked for")
		}
		sent = last - first + 1
	}
	if resp.ContentLength >= 0 && resp.ContentLength != sent {
		whole = resp.ContentLength + size - sent
	}
	switch {
	case whole == size:
		return sent, nil
	case isHTML(resp.Header):
		return 0, unusable(who, r.what, "it is a web page: is something between here and the parent that wants a login?")
	}
	return 0, unusable(who, r.what, "it has %d bytes where its manifest says %d", whole, size)
}

func (r *blobReader) Read(b []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF // whatever else there may be; the digest decides
	}
	n, err := r.body.Read(b[:min(int64(len(b)), r.left, r.parent.bandwidth.most())])
	r.left -= int64(n)
	r.parent.received.Add(int64(n))
	if r.since += int64(n); r.since >= r.parent.limits.stallBytes {
		r.since = 0
		r.extend(r.parent.limits.stall - time.Until(r.deadline))
	}
	if wait := r.parent.bandwidth.take(n); wait > 0 {
		r.timer.Stop() // the parent is not to blame
		_ = sleep(r.ctx, wait)
		r.extend(wait)
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

// extend puts off the end of a transfer that makes no progress.
func (r *blobReader) extend(by time.Duration) {
	r.deadline = r.deadline.Add(by)
	r.timer.Reset(time.Until(r.deadline))
}

func (r *blobReader) Close() error {
	r.timer.Stop()
	r.cancel(nil)
	return r.body.Close()
}
