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
	resp, err := p.send(transfer, http.MethodGet, path, header, repositoryScope(repository), what) //nolint:bodyclose // by blobReader
	if f, ok := errors.AsType[*fault](err); ok && f.status == http.StatusRequestedRangeNotSatisfiable && offset > 0 {
		resp, err = p.send(transfer, http.MethodGet, path, make(http.Header), repositoryScope(repository), what) //nolint:bodyclose // by blobReader
	}
	if err != nil {
		cancel(nil)
		return nil, p.or(ctx, err)
	}
	r := &blobReader{parent: p, outer: ctx, ctx: transfer, cancel: cancel, body: resp.Body, what: what, left: desc.Size - offset}
	r.timer = time.AfterFunc(p.limits.stall, func() { cancel(errStalled) })
	if err := r.begin(resp, desc.Size, offset); err != nil {
		_ = r.Close()
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
