package storage

import (
	"context"
	"path"
	"time"

	"github.com/opencontainers/go-digest"
)

// tidy removes what has lost its meaning: entries in the lists of referrers, the
// memory that a tag has of manifests that it once named, empty directories.
func (c *collection) tidy(ctx context.Context, r Repository, have contents, keep map[digest.Digest]bool) error {
	medium := c.store.medium
	known := make(map[digest.Digest]bool)
	for _, l := range have.revisions {
		known[l.name] = keep[l.name] || l.condemned.IsZero() || l.condemned.After(c.settled)
	}
	err := medium.walk(ctx, r.path+"/_referrers", func(file string, modified func() (time.Time, error)) error {
		if d, ok := parseEntryDigest(path.Base(file)); ok && known[d] || !c.old(modified) {
			return nil
		}
		return ignoreAbsent(medium.remove(ctx, file))
	})
	if err != nil {
		return err
	}
	for tag, current := range have.tags {
		err := medium.walk(ctx, r.path+"/_manifests/tags/"+tag+"/index", func(file string, modified func() (time.Time, error)) error {
			dir := path.Dir(file) // …/<alg>/<hex>
			d := digest.Digest(path.Base(path.Dir(dir)) + ":" + path.Base(dir))
			if d == current || known[d] || !c.old(modified) {
				return nil
			}
			return ignoreAbsent(medium.remove(ctx, dir))
		})
		if err != nil {
			return err
		}
	}
	return medium.prune(ctx, r.path, len(have.tags)+len(have.revisions)+len(have.layers) == 0)
}

func (c *collection) old(modified func() (time.Time, error)) bool {
	at, err := modified()
	return err == nil && !at.After(c.cutoff)
}
