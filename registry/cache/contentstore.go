package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// contentStore reads what containerd keeps on this node, over its own content
// service (containerd, api/services/content/v1). It connects when it is asked
// and again when containerd has restarted. A nil contentStore has nothing.
type contentStore struct {
	conn    *grpc.ClientConn
	content contentapi.ContentClient
	retry   time.Duration
	away    recent[struct{}]      // containerd does not answer
	wrong   recent[digest.Digest] // its bytes are not those of the digest
}

const (
	// contentNamespace is where the kubelet's images are.
	contentNamespace = "k8s.io"

	// contentPatience bounds the wait for containerd to say what it has. It is
	// much for a busy node and little beside what a request may take.
	contentPatience = 500 * time.Millisecond

	// contentIdle is how long the connection stays open without use.
	contentIdle = time.Minute
)

// openContentStore returns nil for an empty path.
func openContentStore(socket string, retry time.Duration) (*contentStore, error) {
	if socket == "" {
		return nil, nil
	}
	conn, err := grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithIdleTimeout(contentIdle))
	if err != nil {
		return nil, fmt.Errorf("containerd's socket %s: %w", socket, err)
	}
	return &contentStore{conn: conn, content: contentapi.NewContentClient(conn), retry: retry}, nil
}

func (s *contentStore) close() {
	if s != nil {
		_ = s.conn.Close()
	}
}

// size returns how many bytes containerd has of d, all of them; ok is false
// if it has not got it, or does not say so soon.
func (s *contentStore) size(ctx context.Context, d digest.Digest) (size int64, ok bool) {
	if s == nil || s.away.has(struct{}{}) || s.wrong.has(d) {
		return 0, false
	}
	ctx, cancel := context.WithTimeout(inNamespace(ctx), contentPatience)
	defer cancel()
	info, err := s.content.Info(ctx, &contentapi.InfoRequest{Digest: d.String()})
	switch status.Code(err) {
	case codes.OK:
		return info.GetInfo().GetSize(), true
	case codes.NotFound, codes.Canceled:
	default:
		s.away.add(struct{}{}, s.retry)
	}
	return 0, false
}

// open returns the content of d, which nobody has verified. The caller closes it.
func (s *contentStore) open(ctx context.Context, d digest.Digest) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(inNamespace(ctx))
	stream, err := s.content.Read(ctx, &contentapi.ReadContentRequest{Digest: d.String()})
	if err != nil {
		cancel()
		return nil, err
	}
	return &contentReader{stream: stream, cancel: cancel}, nil
}

// read returns the content of d, which is right. Errors: errBadContent, or what
// kept it from being read.
func (s *contentStore) read(ctx context.Context, d digest.Digest, size int64) ([]byte, error) {
	r, err := s.open(ctx, d)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	body := make([]byte, size)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, err
	}
	if d.Algorithm().FromBytes(body) != d {
		s.wrong.add(d, badContentMemory)
		return nil, errBadContent
	}
	return body, nil
}

func inNamespace(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "containerd-namespace", contentNamespace)
}

// contentReader makes a stream of messages an io.Reader.
type contentReader struct {
	stream grpc.ServerStreamingClient[contentapi.ReadContentResponse]
	cancel context.CancelFunc
	rest   []byte
}

func (r *contentReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		message, err := r.stream.Recv()
		if err != nil {
			return 0, err
		}
		r.rest = message.Data
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *contentReader) Close() error {
	r.cancel()
	return nil
}

// errElsewhere reports that containerd has not got the content in a way that
// can be served.
var errElsewhere = errors.New("not in containerd's content store")

// serveContent answers with a whole blob that containerd has, without keeping
// it a second time. The error is errElsewhere before anything was answered.
//
// What asks for a part has the rest already, or fetches several parts at once:
// it is not containerd's own content that it asks for.
func (c *Cache) serveContent(w http.ResponseWriter, r *http.Request, rq *request) error {
	if rangeOf(r, rq.digest).set {
		return errElsewhere
	}
	ctx, store := r.Context(), rq.disk.content
	size, ok := store.size(ctx, rq.digest)
	if !ok {
		return errElsewhere
	}
	if _, err := c.permit(ctx, rq); err != nil {
		return err
	}
	how := hitContainerd
	if r.Method == http.MethodHead {
		c.blobHeader(w, rq, false, span{0, size}, size, how)
		return nil
	}
	src, err := c.contentSource(ctx, store, rq.digest, size)
	if err != nil {
		c.contentFailed(rq.digest, err)
		return errElsewhere
	}
	defer src.Close()
	c.blobHeader(w, rq, false, span{0, size}, size, how)
	out := &verifiedWriter{w: w, digest: rq.digest, hash: rq.digest.Algorithm().Hash()}
	err = out.copy(src, size)
	c.metrics.sent(how, out.sent)
	if errors.Is(err, errBadContent) {
		store.wrong.add(rq.digest, badContentMemory)
		c.contentFailed(rq.digest, err)
	}
	return nil // a body that stays short makes containerd go on, here or elsewhere
}

// contentSource reads a small body whole, so that a wrong one costs nothing.
func (c *Cache) contentSource(ctx context.Context, store *contentStore, d digest.Digest, size int64) (io.ReadCloser, error) {
	if size > HoldBackWhole {
		return store.open(ctx, d)
	}
	body, err := store.read(ctx, d, size)
	return io.NopCloser(bytes.NewReader(body)), err
}

func (c *Cache) contentFailed(d digest.Digest, err error) {
	if errors.Is(err, errBadContent) {
		c.metrics.corrupt.WithLabelValues(fromContainerd).Inc()
	}
	c.log.Warn("containerd's own content cannot be served; it is fetched", "digest", d, "error", err)
}

// manifestInContent returns a manifest that containerd has, nil if it has none.
func (c *Cache) manifestInContent(ctx context.Context, store *contentStore, d digest.Digest) *manifest {
	size, ok := store.size(ctx, d)
	if !ok || size > maxManifest {
		return nil
	}
	body, err := store.read(ctx, d, size)
	if err != nil {
		c.contentFailed(d, err)
		return nil
	}
	m := newManifest(d, body)
	if m != nil {
		c.manifests.put(m)
	}
	return m
}
