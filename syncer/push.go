package syncer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// pushScope is the token scope to write a repository, deleteScope that to take
// something out of it.
func pushScope(name string) string   { return "repository:" + name + ":pull,push" }
func deleteScope(name string) string { return "repository:" + name + ":delete,pull" }

// has reports whether the parent has a manifest or a blob.
func (p *parent) has(ctx context.Context, repository, kind string, d digest.Digest) (bool, error) {
	_, err := p.ask(ctx, question{
		method: http.MethodHead,
		path:   "/v2/" + repository + "/" + kind + "/" + d.String(),
		accept: acceptManifests,
		scope:  pushScope(repository),
		what:   repository + "@" + d.String(),
		max:    p.limits.manifest,
	})
	if isNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// tell makes one small request that changes something, again until it is
// answered or is not worth it.
func (p *parent) tell(ctx context.Context, r request) (http.Header, error) {
	for failures := 1; ; failures++ {
		header, err := p.tellOnce(ctx, r)
		if err == nil {
			return header, nil
		}
		if err := p.again(ctx, err, failures); err != nil {
			return nil, err
		}
	}
}

func (p *parent) tellOnce(ctx context.Context, r request) (http.Header, error) {
	if err := p.ready(ctx, r.method); err != nil {
		return nil, err
	}
	whole := ctx
	ctx, cancel := context.WithTimeout(ctx, p.limits.answer)
	defer cancel()
	resp, err := p.send(ctx, p.client, r)
	if err != nil {
		return nil, p.or(whole, err)
	}
	_ = resp.Body.Close()
	return resp.Header, nil
}

// pushManifest stores a manifest under a tag or its digest. Everything that it
// needs is there already.
func (p *parent) pushManifest(ctx context.Context, repository, reference string, m manifest) error {
	header := make(http.Header)
	header.Set("Content-Type", m.mediaType)
	what := repository + ":" + reference
	if strings.Contains(reference, ":") {
		what = repository + "@" + reference
	}
	answer, err := p.tell(ctx, request{
		method: http.MethodPut,
		path:   "/v2/" + repository + "/manifests/" + reference,
		header: header,
		scope:  pushScope(repository),
		what:   what,
		body:   func() io.ReadCloser { return io.NopCloser(bytes.NewReader(m.body)) },
		size:   int64(len(m.body)),
	})
	if err != nil {
		return err
	}
	if got := answer.Get("Docker-Content-Digest"); got != "" && got != digest.FromBytes(m.body).String() {
		return unusable(p.String(), what, "it stored it as %s", got)
	}
	return nil
}

// deleteManifest takes a tag or a manifest out of a repository. That it is not
// there is no error.
func (p *parent) deleteManifest(ctx context.Context, repository, reference string) error {
	_, err := p.tell(ctx, request{
		method: http.MethodDelete,
		path:   "/v2/" + repository + "/manifests/" + reference,
		header: make(http.Header),
		scope:  deleteScope(repository),
		what:   repository + ":" + reference,
	})
	if isNotFound(err) {
		return nil
	}
	return err
}

// upload sends a blob in chunks (OCI distribution specification, "Pushing a blob
// in chunks"). Where the connection breaks off, it asks how much has arrived and
// goes on from there. content may be read again from anywhere.
func (p *parent) upload(ctx context.Context, repository string, desc v1.Descriptor, content io.ReaderAt, chunk int64) error {
	u := &upload{parent: p, repository: repository, desc: desc, content: content, what: repository + "@" + desc.Digest.String()}
	for failures, before := 0, int64(0); ; {
		err := u.proceed(ctx, chunk)
		if err == nil {
			return nil
		}
		if u.offset-before >= p.limits.stallBytes {
			failures = 0
		}
		before = u.offset
		failures++
		if isNotFound(err) && u.location != "" && failures < p.limits.attempts {
			u.location, u.offset, before = "", 0, 0 // the parent has forgotten it
			continue
		}
		if err := p.again(ctx, err, failures); err != nil {
			return err
		}
		u.ask = true
	}
}

// upload is one blob on its way to the parent.
type upload struct {
	*parent
	repository string
	desc       v1.Descriptor
	content    io.ReaderAt
	what       string

	location string // path and query; empty: not begun
	offset   int64  // what the parent has
	ask      bool   // offset is not known
}

// proceed does what is left.
func (u *upload) proceed(ctx context.Context, chunk int64) error {
	if u.location == "" {
		if err := u.request(ctx, request{method: http.MethodPost, path: "/v2/" + u.repository + "/blobs/uploads/"}); err != nil {
			return err
		}
	} else if u.ask {
		if err := u.request(ctx, request{method: http.MethodGet, path: u.location, also: http.StatusNoContent}); err != nil {
			return err
		}
	}
	u.ask = false
	for u.offset < u.desc.Size {
		size := min(chunk, u.desc.Size-u.offset)
		header := make(http.Header)
		header.Set("Content-Type", "application/octet-stream")
		header.Set("Content-Range", fmt.Sprintf("%d-%d", u.offset, u.offset+size-1))
		from := u.offset
		err := u.request(ctx, request{method: http.MethodPatch, path: u.location, header: header, size: size, body: func() io.ReadCloser {
			return io.NopCloser(io.NewSectionReader(u.content, from, size))
		}})
		if err != nil {
			return err
		}
		if u.offset <= from || u.offset > from+size {
			return unusable(u.String(), u.what, "of %d bytes that were sent from %d on it has those up to %d", size, from, u.offset)
		}
	}
	separator := "?"
	if strings.Contains(u.location, "?") {
		separator = "&"
	}
	header := make(http.Header)
	header.Set("Content-Type", "application/octet-stream")
	header.Set("Content-Length", "0")
	return u.request(ctx, request{method: http.MethodPut, path: u.location + separator + "digest=" + url.QueryEscape(u.desc.Digest.String()), header: header})
}

// request makes one request of the upload and takes note of where it goes on.
func (u *upload) request(ctx context.Context, r request) error {
	if err := u.ready(ctx, r.method); err != nil {
		return err
	}
	r.scope, r.what = pushScope(u.repository), u.what
	if r.header == nil {
		r.header = make(http.Header)
	}
	transfer, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Bytes that leave keep the transfer alive; so does the wait for an answer,
	// which the transport bounds.
	idle := u.limits.stall + u.limits.header
	timer := time.AfterFunc(idle, func() { cancel(errStalled) })
	defer timer.Stop()
	if open := r.body; open != nil {
		r.body = func() io.ReadCloser { return &alive{open(), timer, idle} }
	}
	resp, err := u.send(transfer, u.bulk, r)
	if err != nil {
		if errors.Is(context.Cause(transfer), errStalled) {
			return interrupted(transfer, u.String(), u.what, u.limits, err)
		}
		return u.or(ctx, err)
	}
	_ = resp.Body.Close()
	if r.method == http.MethodPut {
		return nil
	}
	return u.progress(r.method, resp.Header)
}

// progress reads where the upload goes on, and from which byte.
func (u *upload) progress(method string, header http.Header) error {
	if location := header.Get("Location"); location != "" {
		l, err := url.Parse(location)
		if err != nil {
			return unusable(u.String(), u.what, "its Location is not a URL")
		}
		if l.Host != "" && (l.Host != u.host || l.Scheme != u.scheme) {
			return unusable(u.String(), u.what, "it wants the upload to go on at %s, which has not been given the credentials", l.Host)
		}
		if !strings.HasPrefix(l.EscapedPath(), "/") {
			return unusable(u.String(), u.what, "its Location is not a path")
		}
		u.location = l.EscapedPath()
		if l.RawQuery != "" {
			u.location += "?" + l.RawQuery
		}
	} else if u.location == "" {
		return unusable(u.String(), u.what, "it names no Location")
	}
	if method == http.MethodPost {
		u.offset = 0
		return nil
	}
	// "0-0" stands for one byte and, with some registries, for none.
	_, last, found := strings.Cut(strings.TrimPrefix(header.Get("Range"), "bytes="), "-")
	n, err := strconv.ParseInt(last, 10, 64)
	if !found || err != nil || n < 0 || n >= u.desc.Size {
		return unusable(u.String(), u.what, "its Range is %q", header.Get("Range"))
	}
	u.offset = n + 1
	if method == http.MethodGet && n == 0 {
		u.offset = 0
	}
	return nil
}

// alive is a body that resets a timer as it is read.
type alive struct {
	io.ReadCloser
	timer *time.Timer
	idle  time.Duration
}

func (a *alive) Read(b []byte) (int, error) {
	a.timer.Reset(a.idle)
	return a.ReadCloser.Read(b)
}
