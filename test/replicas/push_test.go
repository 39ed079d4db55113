package replicas

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// client is a program, as far as it pushes and pulls.
type client interface {
	push(ctx context.Context, i *image, repository, tag string) error
	// pull reads all of what a tag names, and returns the manifest's digest.
	pull(ctx context.Context, repository, tag string) (digest.Digest, error)
	remove(ctx context.Context, repository, tag string) error
	close()
}

// crane is go-containerregistry, over HTTP/2.
type crane struct {
	host      string
	transport *http.Transport
}

func newCrane(s *site) client { return &crane{s.host, s.transport()} }

func (c *crane) close() { c.transport.CloseIdleConnections() }

func (c *crane) options(ctx context.Context) []remote.Option {
	return []remote.Option{remote.WithContext(ctx), remote.WithTransport(c.transport), remote.WithAuth(&authn.Basic{Username: user, Password: password}), remote.WithJobs(2)}
}

func (c *crane) tag(repository, tag string) (name.Tag, error) {
	return name.NewTag(c.host + "/" + repository + ":" + tag)
}

func (c *crane) push(ctx context.Context, i *image, repository, tag string) error {
	ref, err := c.tag(repository, tag)
	if err != nil {
		return err
	}
	packed, err := partial.CompressedToImage(craneImage{i})
	if err != nil {
		return err
	}
	return remote.Write(ref, packed, c.options(ctx)...)
}

func (c *crane) pull(ctx context.Context, repository, tag string) (digest.Digest, error) {
	ref, err := c.tag(repository, tag)
	if err != nil {
		return "", err
	}
	img, err := remote.Image(ref, c.options(ctx)...)
	if err != nil {
		return "", err
	}
	layers, err := img.Layers()
	if err != nil {
		return "", err
	}
	for _, l := range layers { // which verifies them
		r, err := l.Compressed()
		if err != nil {
			return "", err
		}
		_, err = io.Copy(io.Discard, r)
		if err = errors.Join(err, r.Close()); err != nil {
			return "", err
		}
	}
	if _, err := img.RawConfigFile(); err != nil {
		return "", err
	}
	d, err := img.Digest()
	return digest.Digest(d.String()), err
}

func (c *crane) remove(ctx context.Context, repository, tag string) error {
	ref, err := c.tag(repository, tag)
	if err != nil {
		return err
	}
	// Made again by crane, a deletion whose answer was lost looks like one of
	// what never was. The worker knows which it is.
	once := remote.WithRetryBackoff(remote.Backoff{Steps: 1})
	return remote.Delete(ref, append(c.options(ctx), once)...)
}

// craneImage is an image as go-containerregistry has it.
type craneImage struct{ *image }

func (i craneImage) RawManifest() ([]byte, error)        { return i.manifest.content, nil }
func (i craneImage) RawConfigFile() ([]byte, error)      { return i.config.content, nil }
func (i craneImage) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }
func (i craneImage) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	for _, l := range i.layers {
		if l.Digest.String() == h.String() {
			return craneLayer{l}, nil
		}
	}
	return nil, fmt.Errorf("no layer %s", h)
}

type craneLayer struct{ blob }

func (l craneLayer) Digest() (v1.Hash, error) { return v1.NewHash(l.Descriptor.Digest.String()) }
func (l craneLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.content)), nil
}
func (l craneLayer) Size() (int64, error) { return l.Descriptor.Size, nil }
func (l craneLayer) MediaType() (types.MediaType, error) {
	return types.MediaType(l.Descriptor.MediaType), nil
}

// containerd is containerd's own resolver, pusher and fetcher, over HTTP/1.1.
type containerd struct {
	host      string
	transport *http.Transport
	chunks    *chunks // to delete, which containerd does not
}

func newContainerd(s *site) client {
	t := s.transport()
	t.ForceAttemptHTTP2 = false
	return &containerd{s.host, t, newChunks(s).(*chunks)}
}

func (c *containerd) close() {
	c.transport.CloseIdleConnections()
	c.chunks.close()
}

// resolver is a new one for each attempt: it remembers what it has pushed.
func (c *containerd) resolver() remotes.Resolver {
	authorizer := docker.NewDockerAuthorizer(
		docker.WithAuthClient(&http.Client{Transport: c.transport}),
		docker.WithAuthCreds(func(string) (string, string, error) { return user, password, nil }))
	return docker.NewResolver(docker.ResolverOptions{Hosts: func(string) ([]docker.RegistryHost, error) {
		return []docker.RegistryHost{{
			Client: &http.Client{Transport: c.transport}, Authorizer: authorizer, Host: c.host, Scheme: "https", Path: "/v2",
			Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve | docker.HostCapabilityPush,
		}}, nil
	}})
}

func (c *containerd) push(ctx context.Context, i *image, repository, tag string) error {
	pusher, err := c.resolver().Pusher(ctx, c.host+"/"+repository+":"+tag)
	if err != nil {
		return err
	}
	for _, b := range append(i.blobs(), i.manifest) {
		if err := pushOne(ctx, pusher, b); err != nil {
			return fmt.Errorf("%s: %w", b.Digest, err)
		}
	}
	return nil
}

func pushOne(ctx context.Context, pusher remotes.Pusher, b blob) error {
	w, err := pusher.Push(ctx, b.Descriptor)
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer w.Close()
	return content.Copy(ctx, w, bytes.NewReader(b.content), b.Size, b.Digest)
}

func (c *containerd) pull(ctx context.Context, repository, tag string) (digest.Digest, error) {
	resolver := c.resolver()
	resolved, root, err := resolver.Resolve(ctx, c.host+"/"+repository+":"+tag)
	if err != nil {
		return "", err
	}
	fetcher, err := resolver.Fetcher(ctx, resolved)
	if err != nil {
		return "", err
	}
	manifest, err := fetch(ctx, fetcher, root)
	if err != nil {
		return "", err
	}
	needs, err := references(manifest)
	if err != nil {
		return "", err
	}
	for _, d := range needs {
		if _, err := fetch(ctx, fetcher, d); err != nil {
			return "", err
		}
	}
	return root.Digest, nil
}

func fetch(ctx context.Context, fetcher remotes.Fetcher, d ocispec.Descriptor) ([]byte, error) {
	r, err := fetcher.Fetch(ctx, d)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err == nil && digest.FromBytes(data) != d.Digest {
		err = fmt.Errorf("%d wrong bytes for %s", len(data), d.Digest)
	}
	return data, err
}

func (c *containerd) remove(ctx context.Context, repository, tag string) error {
	return c.chunks.remove(ctx, repository, tag)
}

// chunks uploads in chunks, and goes on where a broken upload has come to, at
// whichever replica.
type chunks struct {
	host   string
	client *http.Client
}

const chunkSize = 192 << 10

func newChunks(s *site) client { return &chunks{s.host, &http.Client{Transport: s.transport()}} }

func (c *chunks) close() { c.client.CloseIdleConnections() }

func (c *chunks) url(repository string, parts ...string) string {
	return "https://" + c.host + "/v2/" + repository + "/" + strings.Join(parts, "/")
}

// statusError is an answer that was not expected.
type statusError struct {
	status int
	text   string
}

func (e *statusError) Error() string { return e.text }

func isStatus(err error, status int) bool {
	var s *statusError
	return errors.As(err, &s) && s.status == status
}

func (c *chunks) do(ctx context.Context, method, where string, body []byte, header http.Header, want ...int) (http.Header, []byte, error) {
	r, err := http.NewRequestWithContext(ctx, method, where, bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	if header != nil {
		r.Header = header
	}
	r.SetBasicAuth(user, password)
	answer, err := c.client.Do(r)
	if err != nil {
		return nil, nil, err
	}
	defer answer.Body.Close()
	said, err := io.ReadAll(answer.Body)
	if err != nil {
		return nil, nil, err
	}
	for _, status := range want {
		if answer.StatusCode == status {
			return answer.Header, said, nil
		}
	}
	return nil, nil, &statusError{answer.StatusCode, fmt.Sprintf("%s %s: %s: %s", method, r.URL.Path, answer.Status, bytes.TrimSpace(said))}
}

func (c *chunks) push(ctx context.Context, i *image, repository, tag string) error {
	for _, b := range i.blobs() {
		if err := c.upload(ctx, repository, b); err != nil {
			return fmt.Errorf("uploading %s: %w", b.Digest, err)
		}
	}
	_, _, err := c.do(ctx, http.MethodPut, c.url(repository, "manifests", tag), i.manifest.content,
		http.Header{"Content-Type": {i.manifest.MediaType}}, http.StatusCreated)
	return err
}

// upload makes one upload, whatever happens to the replicas meanwhile: only one
// that has gone is begun again.
func (c *chunks) upload(ctx context.Context, repository string, b blob) error {
	_, _, err := c.do(ctx, http.MethodHead, c.url(repository, "blobs", b.Digest.String()), nil, nil, http.StatusOK)
	if err == nil || !isStatus(err, http.StatusNotFound) {
		return err
	}
	begun, _, err := c.do(ctx, http.MethodPost, c.url(repository, "blobs/uploads/"), nil, nil, http.StatusAccepted)
	if err != nil {
		return err
	}
	location, err := url.Parse("https://" + c.host + begun.Get("Location"))
	if err != nil {
		return err
	}
	var p patience
	return p.try(ctx, "going on", func() error { return c.goOn(ctx, repository, location, b) })
}

// goOn asks how far the upload has come, and sends the rest.
func (c *chunks) goOn(ctx context.Context, repository string, location *url.URL, b blob) error {
	status, _, err := c.do(ctx, http.MethodGet, location.String(), nil, nil, http.StatusNoContent)
	if isStatus(err, http.StatusNotFound) {
		// The answer that said it was complete may be what got lost.
		_, _, err = c.do(ctx, http.MethodHead, c.url(repository, "blobs", b.Digest.String()), nil, nil, http.StatusOK)
		if isStatus(err, http.StatusNotFound) {
			return fmt.Errorf("the upload is gone and so is the blob: %w", io.ErrUnexpectedEOF) // to be begun again
		}
		return err
	}
	if err != nil {
		return err
	}
	_, last, _ := strings.Cut(status.Get("Range"), "-")
	at, err := strconv.ParseInt(last, 10, 64)
	if err != nil {
		return fmt.Errorf("Range %q: %w", status.Get("Range"), err)
	}
	if at > 0 {
		at++ // one byte and none look alike, but no chunk is of one byte
	}
	for at < b.Size {
		end := min(at+chunkSize, b.Size)
		_, _, err := c.do(ctx, http.MethodPatch, location.String(), b.content[at:end],
			http.Header{"Content-Range": {fmt.Sprintf("%d-%d", at, end-1)}, "Content-Type": {"application/octet-stream"}}, http.StatusAccepted)
		if err != nil {
			return err
		}
		at = end
	}
	commit := *location
	commit.RawQuery = url.Values{"digest": {b.Digest.String()}}.Encode()
	_, _, err = c.do(ctx, http.MethodPut, commit.String(), nil, nil, http.StatusCreated)
	return err
}

func (c *chunks) pull(ctx context.Context, repository, tag string) (digest.Digest, error) {
	manifest, d, err := get(ctx, c.client, c.url(repository, "manifests", tag))
	if err != nil {
		return "", err
	}
	needs, err := references(manifest)
	if err != nil {
		return "", err
	}
	for _, need := range needs {
		data, _, err := get(ctx, c.client, c.url(repository, "blobs", need.Digest.String()))
		if err == nil && digest.FromBytes(data) != need.Digest {
			err = fmt.Errorf("%d wrong bytes for %s", len(data), need.Digest)
		}
		if err != nil {
			return "", err
		}
	}
	return cmp.Or(d, digest.FromBytes(manifest)), nil
}

func (c *chunks) remove(ctx context.Context, repository, tag string) error {
	_, _, err := c.do(ctx, http.MethodDelete, c.url(repository, "manifests", tag), nil, nil, http.StatusAccepted)
	return err
}

// isNotFound reports whether an error is the answer 404.
func isNotFound(err error) bool {
	var t *transport.Error
	return isStatus(err, http.StatusNotFound) || errors.As(err, &t) && t.StatusCode == http.StatusNotFound
}
