package syncer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/storage"
)

// parallelUploads is how many blobs of an image are sent at once.
const parallelUploads = 3

// outboxWriter brings changes of one repository to the parent.
type outboxWriter struct {
	*Outbox
	parent        *parent
	local, remote string
}

// bring carries out one change at the parent.
func (w *outboxWriter) bring(ctx context.Context, c change) (outcome, error) {
	switch e := c.last; {
	case e.Action == storage.ActionPush && e.Tag == "":
		return outcome{}, w.pushDigest(ctx, e.Digest)
	case e.Action == storage.ActionPush:
		return w.pushTag(ctx, c)
	case e.Tag != "":
		return w.deleteTag(ctx, c)
	case e.Digest != "":
		return w.deleteDigest(ctx, e.Digest)
	default:
		return outcome{conflict: fmt.Sprintf("repository %s was deleted here and stays at the parent: delete it there", w.local)}, nil
	}
}

// pushTag makes the parent's tag stand for what was pushed.
func (w *outboxWriter) pushTag(ctx context.Context, c change) (outcome, error) {
	tag, d := c.last.Tag, w.winner(ctx, c)
	there, err := w.parent.resolve(ctx, w.remote, tag, known{})
	if err != nil && !isNotFound(err) {
		return outcome{}, err
	}
	if err == nil && there.digest == d {
		return outcome{}, nil
	}
	moved := err == nil && !slices.Contains(c.known, there.digest)
	if err := w.pushDigest(ctx, d); err != nil {
		return outcome{}, err
	}
	if moved {
		return outcome{conflict: fmt.Sprintf("%s:%s was pushed here and moved at the parent, to %s, which stays; what was pushed is there as %s", w.local, tag, there.digest, d)}, nil
	}
	m, ok, err := w.store.manifest(ctx, w.local, d)
	if err != nil || !ok {
		return outcome{}, err // it was deleted here since: there is an entry for that
	}
	return outcome{}, w.parent.pushManifest(ctx, w.remote, tag, m)
}

// winner is which of several pushes of one tag counts: the one that the tag
// stands for here, or the last, if a synchronisation has moved the tag since.
func (w *outboxWriter) winner(ctx context.Context, c change) digest.Digest {
	if d, err := w.store.tag(ctx, w.local, c.last.Tag); err == nil && slices.Contains(c.pushed, d) {
		return d
	}
	return c.last.Digest
}

// deleteTag takes a tag away at the parent, if it has not been pushed again.
func (w *outboxWriter) deleteTag(ctx context.Context, c change) (outcome, error) {
	tag := c.last.Tag
	if here, err := w.store.tag(ctx, w.local, tag); err != nil || here != "" {
		return outcome{}, err
	}
	there, err := w.parent.resolve(ctx, w.remote, tag, known{})
	if isNotFound(err) {
		return outcome{}, nil
	}
	if err != nil {
		return outcome{}, err
	}
	if !slices.Contains(c.known, there.digest) {
		return outcome{conflict: fmt.Sprintf("%s:%s was deleted here and moved at the parent, to %s, which stays", w.local, tag, there.digest)}, nil
	}
	return w.refusedDeletion(tag, w.parent.deleteManifest(ctx, w.remote, tag))
}

// deleteDigest takes a manifest away at the parent, with the tags that stand for
// it there, if it has not been pushed again.
func (w *outboxWriter) deleteDigest(ctx context.Context, d digest.Digest) (outcome, error) {
	if _, here, err := w.store.manifest(ctx, w.local, d); err != nil || here {
		return outcome{}, err
	}
	return w.refusedDeletion(d.String(), w.parent.deleteManifest(ctx, w.remote, d.String()))
}

// refusedDeletion makes a conflict of a parent's refusal to delete at all.
func (w *outboxWriter) refusedDeletion(what string, err error) (outcome, error) {
	if f, ok := errors.AsType[*fault](err); ok && (f.status == 405 || f.status == 400 || f.status == 501) {
		return outcome{conflict: fmt.Sprintf("%s %s was deleted here and stays at the parent, which does not delete it: %s", w.local, what, f.message)}, nil
	}
	return outcome{}, err
}

// pushDigest brings a manifest and everything that it needs, each after what it
// needs itself. What is no longer here is not needed any more.
func (w *outboxWriter) pushDigest(ctx context.Context, d digest.Digest) error {
	return w.push(ctx, d, 0)
}

func (w *outboxWriter) push(ctx context.Context, d digest.Digest, depth int) error {
	there, err := w.parent.has(ctx, w.remote, "manifests", d)
	if err != nil || there {
		return err
	}
	m, ok, err := w.store.manifest(ctx, w.local, d)
	if err != nil {
		return err
	}
	if !ok || depth > maxNesting {
		if depth == 0 {
			return nil
		}
		return fmt.Errorf("%s@%s is in an index that was pushed, and neither here nor at the parent: push it", w.local, d)
	}
	for _, child := range m.children {
		if isBlobType(child.MediaType) {
			err = w.pushBlob(ctx, child)
		} else {
			err = w.push(ctx, child.Digest, depth+1)
		}
		if err != nil {
			return err
		}
	}
	var g errgroup.Group
	g.SetLimit(parallelUploads)
	for _, blob := range m.blobs {
		g.Go(func() error { return w.pushBlob(ctx, blob) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return w.parent.pushManifest(ctx, w.remote, d.String(), m)
}

func (w *outboxWriter) pushBlob(ctx context.Context, desc v1.Descriptor) error {
	there, err := w.parent.has(ctx, w.remote, "blobs", desc.Digest)
	if err != nil || there {
		return err
	}
	f, err := w.store.content.OpenBlob(ctx, desc.Digest)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s@%s was pushed, and is neither here any more nor at the parent: push the image again", w.local, desc.Digest)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	desc.Size = f.Size
	return w.parent.upload(ctx, w.remote, desc, &readerAt{content: f}, w.config.ChunkSize)
}

// readerAt reads stored content anywhere in it, in one place at a time.
type readerAt struct {
	mu      sync.Mutex // a request that failed may still read its body
	content io.ReadSeeker
}

func (r *readerAt) ReadAt(p []byte, offset int64) (n int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, err := r.content.Seek(offset, io.SeekStart); err != nil {
		return 0, err
	}
	n, err = io.ReadFull(r.content, p)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = io.EOF
	}
	return n, err
}
