package registry

import (
	"context"
	"hash"
	"io"
	"net/http"

	"github.com/distribution/distribution/v3"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/connected-registry/connected-registry/storage"
)

// resend is a request that may bring a whole blob to an upload which holds some
// of it already. containerd sends a blob with one PUT, and when the connection
// breaks sends all of it again to the same upload, without a Content-Range; so
// does whoever sends the last chunk. Which of the two it was shows at the end.
type resend struct {
	io.ReadCloser
	hash   hash.Hash
	before int64 // bytes that the upload held
}

// watchResend has r's body hashed by itself, where it may be a whole blob. Else
// it returns nil.
func watchResend(r *http.Request, upload distribution.BlobWriter, d digest.Digest) *resend {
	if r.Method != http.MethodPut || r.ContentLength == 0 || upload.Size() == 0 || r.Header.Get("Content-Range") != "" {
		return nil
	}
	b := &resend{ReadCloser: r.Body, hash: d.Algorithm().Hash(), before: upload.Size()}
	r.Body = b
	return b
}

func (b *resend) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.hash.Write(p[:n])
	return n, err
}

// is reports whether what came is the content of d.
func (b *resend) is(d digest.Digest) bool {
	return b != nil && digest.NewDigest(d.Algorithm(), b.hash) == d
}

// commit stores as d what an upload, whose writer was committed in vain, holds
// beyond what it held before.
func (b *resend) commit(ctx context.Context, s *Server, repo storage.Repository, upload distribution.BlobWriter, d digest.Digest) error {
	content, err := repo.ReadUpload(ctx, upload.ID(), b.before)
	if err != nil {
		return err
	}
	defer content.Close()
	blobs, err := s.blobs(ctx, repo)
	if err != nil {
		return err
	}
	whole, err := blobs.Create(ctx)
	if err != nil {
		return err
	}
	if _, err := whole.ReadFrom(content); err != nil {
		return abandon(ctx, repo, whole, err)
	}
	if _, err := whole.Commit(ctx, v1.Descriptor{Digest: d}); err != nil {
		return abandon(ctx, repo, whole, err)
	}
	return repo.DeleteUpload(ctx, upload.ID())
}
