package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// sealName is the name of the metadata of a blob that bears its digest: it was
// put there with content that had been verified.
const sealName = "digest"

func sealOf(d digest.Digest) map[string]string { return map[string]string{sealName: d.String()} }

func blobKey(d digest.Digest) string { return objectKey(blobPath(d)) }

// openBlob looks at a blob. Its bytes are fetched as they are read.
func (o *objects) openBlob(ctx context.Context, d digest.Digest) (Content, error) {
	at, err := o.bucket.Stat(ctx, blobKey(d))
	if err != nil {
		return Content{}, err
	}
	content := o.content(ctx, d, at)
	return Content{ReadSeekCloser: content, Size: at.Size, Modified: at.Modified, version: version{tag: at.Version, final: true}, sealed: at.Metadata[sealName] == d.String()}, nil
}

// content reads a blob as it was found: what has taken its place meanwhile is
// read only if that is known to be right.
func (o *objects) content(ctx context.Context, d digest.Digest, found bucket.Attributes) *objectContent {
	sealed := func(now bucket.Attributes) bool { return now.Metadata[sealName] == d.String() }
	return newObjectContent(ctx, o.bucket, d.String(), found, sealed)
}

func (o *objects) statBlob(ctx context.Context, d digest.Digest) (size int64, v version, err error) {
	at, err := o.bucket.Stat(ctx, blobKey(d))
	return at.Size, version{tag: at.Version, final: true}, err
}

func (o *objects) requireBlob(ctx context.Context, d digest.Digest) (size int64, err error) {
	if _, err := o.rely(ctx, blobPath(d)); err != nil {
		return 0, err
	}
	at, err := o.bucket.Stat(ctx, blobKey(d))
	return at.Size, err
}

func (o *objects) putBlob(ctx context.Context, d digest.Digest, content []byte) error {
	if _, err := o.rely(ctx, blobPath(d)); err != nil {
		return err
	}
	_, err := o.bucket.Put(ctx, blobKey(d), content, sealOf(d), bucket.Conditions{})
	return err
}

func (o *objects) peek(ctx context.Context, d digest.Digest) ([]byte, error) {
	body, at, err := o.bucket.Open(ctx, blobKey(d), 0, -1)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	if at.Size > maxManifest {
		return nil, fmt.Errorf("it has %d bytes, more than any manifest", at.Size)
	}
	content, err := io.ReadAll(body)
	if err != nil {
		return nil, err
	}
	if d.Algorithm().FromBytes(content) != d {
		return nil, fmt.Errorf("manifest %s: %w", d, ErrCorrupt)
	}
	return content, nil
}

// takeBlob uploads a file.
func (o *objects) takeBlob(ctx context.Context, d digest.Digest, f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if _, err := o.rely(ctx, blobPath(d)); err != nil {
		return err
	}
	if err := o.uploadFile(ctx, blobKey(d), f, fi.Size(), sealOf(d)); err != nil {
		return err
	}
	return ignoreAbsent(os.Remove(f.Name()))
}

// uploadFile uploads a file in parts, a few at a time, straight from the disk.
func (o *objects) uploadFile(ctx context.Context, key string, f *os.File, size int64, metadata map[string]string) error {
	part := int64(o.files.part)
	if size <= part {
		content := make([]byte, size)
		if _, err := f.ReadAt(content, 0); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		_, err := o.bucket.Put(ctx, key, content, metadata, bucket.Conditions{})
		return err
	}
	part = max(part, (size+maxParts-1)/maxParts)
	upload, err := o.bucket.Begin(ctx, key, metadata)
	if err != nil {
		return err
	}
	parts := make([]bucket.Part, (size+part-1)/part)
	err = inParallelOf(ctx, 4, indices(len(parts)), func(ctx context.Context, i int) error {
		offset := int64(i) * part
		length := min(part, size-offset)
		var err error
		parts[i], err = o.bucket.Part(ctx, key, upload, i+1, io.NewSectionReader(f, offset, length), length)
		return err
	})
	if err == nil {
		err = o.bucket.Complete(ctx, key, upload, parts, metadata)
	}
	if errors.Is(err, fs.ErrNotExist) {
		// Nobody else completes it: it was, and the answer got lost.
		if at, statErr := o.bucket.Stat(ctx, key); statErr == nil && at.Size == size && at.Metadata[sealName] == metadata[sealName] {
			return nil
		}
	}
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.waitTime)
		defer cancel()
		_ = o.bucket.Abort(ctx, key, upload) // or it is swept
	}
	return err
}

func indices(n int) []int {
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	return all
}

// blobs lists the tombstones first, so that what is said to be condemned was so
// before.
func (o *objects) blobs(ctx context.Context, _ bool) iter.Seq2[blob, error] {
	return func(yield func(blob, error) bool) {
		graves, err := o.graves(ctx, strings.TrimSuffix(blobsRoot, "/"))
		if err != nil {
			yield(blob{}, err)
			return
		}
		for at, err := range o.bucket.List(ctx, objectKey(blobsRoot), "", "") {
			if err != nil {
				yield(blob{}, err)
				return
			}
			path := "/" + at.Key
			d, ok := parseBlobPath(path)
			if !ok {
				continue
			}
			b := blob{digest: d, size: at.Size}
			if g, ok := graves[path]; ok && g.State != stateRescued {
				b.condemned = g.since
			}
			if !yield(b, nil) {
				return
			}
		}
	}
}

func (o *objects) condemnBlob(ctx context.Context, d digest.Digest, then time.Time) (bool, error) {
	at, err := o.bucket.Stat(ctx, blobKey(d))
	if err != nil || o.clock.local(at.Modified).After(then) {
		return false, ignoreAbsent(err)
	}
	return o.sentence(ctx, blobPath(d))
}

func (o *objects) restoreBlob(ctx context.Context, d digest.Digest) error {
	_, err := o.spare(ctx, blobPath(d))
	return err
}

func (o *objects) reapBlob(ctx context.Context, d digest.Digest) (size int64, reaped bool, err error) {
	r := o.reaper(ctx)
	defer r.release()
	if ok, err := r.claim([]string{blobPath(d)}); !ok {
		return 0, false, err
	}
	at, err := o.bucket.Stat(r.ctx, blobKey(d))
	if ignoreAbsent(err) != nil {
		return 0, false, err
	}
	return at.Size, err == nil, r.remove([]string{blobPath(d)})
}
