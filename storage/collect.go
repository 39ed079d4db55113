package storage

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
)

// Collected says what a collection did.
type Collected struct {
	Manifests int   // taken out of a repository
	Layers    int   // taken out of a repository
	Blobs     int   // deleted
	Bytes     int64 // freed by that
	Kept      int   // blobs that are linked to
	Waiting   int   // links and blobs condemned, and not deleted yet
	// Skipped are repositories that were left alone, with the reason: what is
	// tagged there and cannot be read may refer to anything.
	Skipped map[string]string
}

// collection is one pass of the collector over everything.
//
// Nothing is deleted at once. A pass condemns: it moves links that nothing needs,
// and blobs that no link names, to limbo, from where any use brings them back. A
// later pass, when the grace time has gone by, looks again at what is still in
// limbo, with new eyes, and deletes it. What protects the work of others
// meanwhile, without a lock:
//
//   - Whoever relies on a link renews it first, and finds out by that whether it
//     is there. A pass that has condemned a link looks at its time after.
//   - Whoever makes a link looks for the blob after. A pass reads the links after
//     it has condemned the blob.
//   - What is deleted leaves limbo by one rename, which fails if it was brought
//     back before.
//
// On a file system that caches names, such as NFS, what others did is seen late.
// The grace time is longer than that, and so covers it.
type collection struct {
	store   *Store
	cutoff  time.Time                  // what was used after is kept
	settled time.Time                  // what was condemned before may be deleted
	queued  map[string][]digest.Digest // in the journal, by repository
	linked  map[digest.Digest]bool
	Collected
}

// collect makes passes until nothing is in limbo any more, or ctx ends.
func (s *Store) collect(ctx context.Context, minAge, grace time.Duration) (Collected, error) {
	var sum Collected
	// Two waits delete what there is: links, and then blobs. A third is for
	// what was in limbo already.
	for round := range 4 {
		if round > 0 && !sleep(ctx, grace+grace/10) {
			return sum, context.Cause(ctx)
		}
		c, err := s.pass(ctx, minAge, grace)
		sum.Manifests += c.Manifests
		sum.Layers += c.Layers
		sum.Blobs += c.Blobs
		sum.Bytes += c.Bytes
		sum.Kept, sum.Waiting, sum.Skipped = c.Kept, c.Waiting, c.Skipped
		if err != nil || c.Waiting == 0 {
			return sum, err
		}
	}
	return sum, nil
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// pass makes one pass.
func (s *Store) pass(ctx context.Context, minAge, grace time.Duration) (Collected, error) {
	now := time.Now()
	c := &collection{
		store:     s,
		cutoff:    now.Add(-minAge - s.renewAfter),
		settled:   now.Add(-grace),
		queued:    make(map[string][]digest.Digest),
		linked:    make(map[digest.Digest]bool),
		Collected: Collected{Skipped: make(map[string]string)},
	}
	queue, err := s.journal.Entries(ctx, 0)
	if err != nil {
		return c.Collected, fmt.Errorf("collecting garbage: %w", err)
	}
	for _, e := range queue {
		if e.Action == ActionPush {
			c.queued[e.Repository] = append(c.queued[e.Repository], e.Digest)
		}
	}
	names, err := s.allRepositories()
	if err != nil {
		return c.Collected, fmt.Errorf("collecting garbage: %w", err)
	}
	for name, valid := range names {
		if !valid {
			continue // not made by us, and not to be reached through us
		}
		if err := c.repository(ctx, Repository{store: s, name: name, path: repositoriesRoot + name}); err != nil {
			return c.Collected, fmt.Errorf("collecting garbage of repository %s: %w", name, err)
		}
	}
	if err := c.blobs(ctx); err != nil {
		return c.Collected, fmt.Errorf("collecting garbage: %w", err)
	}
	return c.Collected, nil
}

// repository condemns and deletes links of one repository, and takes note of the
// blobs that the others name.
func (c *collection) repository(ctx context.Context, r Repository) error {
	have, err := c.store.contents(r)
	if err != nil {
		return err
	}
	have.queued = c.queued[r.name]
	links := slices.Concat(have.revisions, have.layers)
	keep, err := c.store.mark(ctx, have, c.cutoff)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		c.store.log.Warn("garbage of a repository cannot be collected until what is tagged there can be read; push or synchronise it again, or delete the tag", "repository", r.name, "error", err)
		c.Skipped[r.name] = err.Error()
		for _, l := range links {
			c.link(l)
		}
		return nil
	}
	if err := c.restore(links, keep); err != nil {
		return err
	}
	if err := c.delete(have, keep); err != nil {
		return err
	}
	if err := c.condemn(links, keep); err != nil {
		return err
	}
	return c.tidy(r, have, keep)
}

// link takes note of what a link names.
func (c *collection) link(l link) {
	c.linked[l.target], c.linked[l.name] = true, true
}

// restore brings back from limbo what is needed after all.
func (c *collection) restore(links []link, keep map[digest.Digest]bool) error {
	for _, l := range links {
		if keep[l.name] && !l.condemned.IsZero() {
			c.link(l)
			c.store.rescue(l.dir + "/link")
		}
	}
	return nil
}

// doomedPrefix begins the name, in limbo, of what is out of reach there. It is not
// in the trash, which any process empties, for it may have to go back.
const doomedPrefix = "doomed-"

// delete deletes the links that have been in limbo for long enough: all or none
// of a repository. When one of them turns out to have come back, what hangs on it
// must not go.
func (c *collection) delete(have contents, keep map[digest.Digest]bool) error {
	type taking struct{ doomed, from string }
	var taken []taking
	manifests, layers := 0, 0
	for i, l := range slices.Concat(have.revisions, have.layers) {
		if keep[l.name] || l.condemned.IsZero() {
			continue
		}
		if l.condemned.After(c.settled) {
			c.link(l)
			c.Waiting++
			continue
		}
		from := c.store.limboPath(l.dir)
		doomed := c.store.limboPath("/" + doomedPrefix + rand.Text())
		err := os.Rename(from, doomed)
		if err == nil {
			// Its link may have been taken out of it.
			_, err = os.Lstat(doomed + "/link")
			taken = append(taken, taking{doomed, from})
		}
		if err != nil {
			for _, t := range taken {
				err = errors.Join(err, os.Rename(t.doomed, t.from))
			}
			for _, l := range have.layers { // what was counted is there again
				c.link(l)
			}
			for _, l := range have.revisions {
				c.link(l)
			}
			c.Waiting++
			return ignoreAbsent(err)
		}
		if i < len(have.revisions) {
			manifests++
		} else {
			layers++
		}
	}
	c.Manifests += manifests
	c.Layers += layers
	var errs []error
	for _, t := range taken {
		errs = append(errs, os.RemoveAll(t.doomed))
	}
	return errors.Join(errs...)
}

// condemn moves links of the tree that nothing needs to limbo. If one of them was
// used at that very moment it comes back, and the rest waits for the next pass,
// which knows more.
func (c *collection) condemn(links []link, keep map[digest.Digest]bool) error {
	used := false
	for _, l := range links {
		if !l.condemned.IsZero() {
			continue
		}
		c.link(l)
		if keep[l.name] || used {
			continue
		}
		err := c.store.condemn(l.dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted meanwhile
		}
		if errors.Is(err, syscall.ENOSPC) {
			c.Waiting++ // for the space that others free
			continue
		}
		if err != nil {
			return err
		}
		c.Waiting++
		at, _, err := statFile(c.store.limboPath(l.dir) + "/link")
		if err != nil || at.After(c.cutoff) {
			used = true
			c.store.rescue(l.dir + "/link")
		}
	}
	return nil
}

// blobs condemns blobs that no link names, and deletes those that have been in
// limbo for long enough.
func (c *collection) blobs(ctx context.Context) error {
	if err := c.eachBlob(ctx, c.store.limboPath(blobsRoot), c.limboBlob); err != nil {
		return err
	}
	return c.eachBlob(ctx, c.store.path(blobsRoot), c.treeBlob)
}

func (c *collection) eachBlob(ctx context.Context, root string, visit func(d digest.Digest) error) error {
	return eachDir(root, func(alg string) error {
		return eachDir(filepath.Join(root, alg), func(prefix string) error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return eachDir(filepath.Join(root, alg, prefix), func(hex string) error {
				d := digest.Digest(alg + ":" + hex)
				if !validDigest(d) || !strings.HasPrefix(hex, prefix) || len(prefix) != 2 {
					return nil
				}
				return visit(d)
			})
		})
	})
}

// limboBlob decides about a blob in limbo. The links were read after it had been
// condemned.
func (c *collection) limboBlob(d digest.Digest) error {
	data := blobPath(d)
	dir := c.store.limboPath(filepath.Dir(data))
	if c.linked[d] {
		if _, err := os.Lstat(c.store.path(data)); err == nil {
			return ignoreAbsent(c.store.discard(dir)) // it has been stored again
		}
		c.store.rescue(data)
		return nil
	}
	condemned, _, err := statFile(dir)
	if err != nil {
		return ignoreAbsent(err)
	}
	if condemned.After(c.settled) {
		c.Waiting++
		return nil
	}
	_, size, err := statFile(c.store.limboPath(data))
	if errors.Is(err, fs.ErrNotExist) {
		return ignoreAbsent(c.store.discard(dir)) // brought back
	}
	if err == nil {
		err = c.store.discard(dir)
	}
	if err == nil {
		c.Blobs++
		c.Bytes += size
	}
	return ignoreAbsent(err)
}

// treeBlob decides about a blob in the tree.
func (c *collection) treeBlob(d digest.Digest) error {
	if c.linked[d] {
		c.Kept++
		return nil
	}
	data := blobPath(d)
	dir := filepath.Dir(data)
	changed, _, err := statFile(c.store.path(dir))
	if err != nil || changed.After(c.settled) {
		// Young: it has just come, and its link is about to.
		return ignoreAbsent(err)
	}
	if _, err := os.Lstat(c.store.path(data)); err != nil {
		return removeTemporary(c.store.path(dir))
	}
	if err := c.store.condemn(dir); err != nil && !errors.Is(err, syscall.ENOSPC) {
		return ignoreAbsent(err)
	}
	c.Waiting++
	return nil
}
