package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"

	"github.com/opencontainers/go-digest"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/connected-registry/connected-registry/storage"
)

// room is how many bytes may still come into a repository, and why no more may.
// It follows the figures of storage.Store.Used, so that clients who push at the
// same time can go past a bound by what each of them has under way.
type room struct {
	bytes int64
	err   *apiError
}

// room finds out how much a repository may still take.
func (r *Rules) room(ctx context.Context, store *storage.Store, repo storage.Repository) (room, error) {
	left := room{bytes: math.MaxInt64}
	if r.total == 0 && r.perRepository == 0 {
		return left, nil
	}
	used, total, err := store.Used(ctx, repo.Name())
	if err != nil {
		return room{}, err
	}
	for _, bound := range []struct {
		limit, used int64
		what, field string
	}{
		{r.perRepository, used, "repository " + repo.Name(), "spec.quota.perRepository"},
		{r.total, total, "this registry", "spec.quota.total"},
	} {
		if bound.limit > 0 && bound.limit-bound.used < left.bytes {
			left = room{max(0, bound.limit-bound.used), errDenied.
				because("%s holds %s of the %s that %s allows, and this would be more; delete what is not needed, which frees its space at the next garbage collection, or have the quota raised",
					bound.what, quantity(bound.used), quantity(bound.limit), bound.field).
				with(map[string]any{"used": bound.used, "limit": bound.limit})}
		}
	}
	return left, nil
}

// fits refuses bytes that there is no room for.
func (l room) fits(bytes int64) error {
	if bytes > l.bytes {
		return l.err
	}
	return nil
}

func quantity(bytes int64) string { return resource.NewQuantity(bytes, resource.BinarySI).String() }

// mayPush refuses a manifest that there is no room for, or whose tag is to stay
// as it is.
func (r *Rules) mayPush(ctx context.Context, store *storage.Store, repo storage.Repository, d digest.Digest, tags []string, size int64) error {
	for _, tag := range tags {
		if !r.locked(repo.Name(), tag) {
			continue
		}
		now, err := repo.Tag(tag)
		if err == nil && now != d {
			return lockedError(repo, tag)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	left, err := r.room(ctx, store, repo)
	if err != nil {
		return err
	}
	return left.fits(size)
}

// mayMount refuses a blob of another repository that there is no room for. The
// whole registry does not grow by it.
func (r *Rules) mayMount(ctx context.Context, store *storage.Store, repo, from storage.Repository, d digest.Digest) error {
	if r.perRepository == 0 || repo.HasLayer(d) {
		return nil
	}
	f, fi, err := from.OpenLayer(ctx, d)
	if err != nil {
		return fmt.Errorf("looking for %s in %s: %w", d, from.Name(), err)
	}
	f.Close()
	left, err := (&Rules{perRepository: r.perRepository}).room(ctx, store, repo)
	if err != nil {
		return err
	}
	return left.fits(fi.Size())
}
