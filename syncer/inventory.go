package syncer

import (
	"context"
	"errors"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// parallelLooks is how many of an image's blobs are looked for at once.
const parallelLooks = 8

// inventory finds out what is here of what is wanted. That a tag stands for the
// right digest does not prove that everything below is here: storage takes away
// what it finds to be corrupt, and other programs collect garbage.
//
// The price of looking is bounded by what is stored, not by tags times layers:
// in one synchronisation a manifest is read once for each repository and set of
// platforms, and a blob is looked up once for each repository (one link read,
// one stat). Nothing is asked of the parent, and no content is read.
func (r *repository) inventory(ctx context.Context, wanted []want) (map[string]have, error) {
	here := make(map[string]have)
	whole := make(map[string]bool)
	for _, w := range wanted {
		if w.err != nil {
			continue
		}
		d, err := r.run.store.tag(ctx, r.name, w.tag)
		if err != nil {
			return nil, err
		}
		key := w.platforms.key(w.digest)
		if _, ok := whole[key]; !ok {
			if whole[key], err = r.whole(ctx, w.digest, w.platforms); err != nil {
				return nil, err
			}
		}
		here[w.tag] = have{digest: d, whole: whole[key]}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	return here, nil
}

// whole reports whether everything that a manifest needs is in the repository.
func (r *repository) whole(ctx context.Context, d digest.Digest, wanted platforms) (bool, error) {
	img, err := walk(ctx, d, wanted, r.stored)
	if errors.Is(err, errNotHere) {
		return false, nil
	}
	if err != nil {
		// An index without the wanted platforms, or with a wrong size: copying
		// it will say so.
		return false, storageError(err)
	}
	g, missing := errgroup.WithContext(context.WithoutCancel(ctx))
	g.SetLimit(parallelLooks)
	for _, blob := range img.blobs {
		if missing.Err() != nil {
			break
		}
		if r.isSeen(blob.Digest) {
			continue
		}
		g.Go(func() error {
			ok, err := r.run.store.hasBlob(ctx, r.name, blob)
			if err == nil && !ok {
				err = errNotHere
			}
			if err == nil {
				r.arrived(blob.Digest)
			}
			return err
		})
	}
	if err := g.Wait(); !errors.Is(err, errNotHere) {
		return err == nil, storageError(err)
	}
	return false, nil
}

// storageError is err if the storage is at fault, nil if the content is.
func storageError(err error) error {
	if _, ok := errors.AsType[errContent](err); ok {
		return nil
	}
	if _, ok := errors.AsType[errSize](err); ok {
		return nil
	}
	return err
}

// stored is the source of manifests that are in the repository.
func (r *repository) stored(ctx context.Context, d digest.Digest) (manifest, bool, error) {
	m, ok, err := r.run.store.manifest(ctx, r.name, d)
	if err == nil && !ok {
		err = errNotHere
	}
	return m, true, err
}

func (r *repository) isSeen(d digest.Digest) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen[d]
}

func (r *repository) arrived(d digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen[d] = true
	delete(r.left, d)
}

// missing are those of an image's blobs that are not known to be here.
func (r *repository) missing(blobs []v1.Descriptor) []Blob {
	r.mu.Lock()
	defer r.mu.Unlock()
	var missing []Blob
	for _, blob := range blobs {
		if !r.seen[blob.Digest] {
			missing = append(missing, Blob{blob.Digest.String(), blob.Size})
		}
	}
	return missing
}

// expect takes note of blobs that are about to be brought.
func (r *repository) expect(blobs []v1.Descriptor) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, blob := range blobs {
		if !r.seen[blob.Digest] {
			r.left[blob.Digest] = blob.Size
		}
	}
}
