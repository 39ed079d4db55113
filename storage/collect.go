package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
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
// Nothing is deleted at once. A pass condemns links that nothing needs, and blobs
// that no link names, which any use brings back. A later pass, when the grace
// time has gone by, looks again at what is still condemned, with new eyes, and
// deletes it. What protects the work of others meanwhile, without a lock:
//
//   - Whoever relies on a link renews it first, and finds out by that whether it
//     is there. A pass that has condemned a link looks at its time after.
//   - Whoever makes a link looks for the blob after. A pass reads the links after
//     it has condemned the blob.
//   - What is deleted is taken by one step of the medium, which fails if it was
//     brought back before.
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

// collect makes passes until nothing is condemned any more, or ctx ends.
func (s *Store) collect(ctx context.Context, minAge, grace time.Duration) (Collected, error) {
	var sum Collected
	// Two waits delete what there is: links, and then blobs. A third is for
	// what was condemned already.
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
	names, err := s.medium.repositories(ctx)
	if err != nil {
		return c.Collected, fmt.Errorf("collecting garbage: %w", err)
	}
	for _, name := range names {
		if !ValidName(name) {
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
	have, err := c.store.contents(ctx, r)
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
	if err := c.restore(ctx, links, keep); err != nil {
		return err
	}
	if err := c.delete(ctx, have, keep); err != nil {
		return err
	}
	if err := c.condemn(ctx, links, keep); err != nil {
		return err
	}
	return c.tidy(ctx, r, have, keep)
}

// link takes note of what a link names.
func (c *collection) link(l link) {
	c.linked[l.target], c.linked[l.name] = true, true
}

// restore brings back what is needed after all.
func (c *collection) restore(ctx context.Context, links []link, keep map[digest.Digest]bool) error {
	for _, l := range links {
		if keep[l.name] && !l.condemned.IsZero() {
			c.link(l)
			c.store.medium.rescue(ctx, l.path)
		}
	}
	return nil
}

// delete deletes the links that have been condemned for long enough: all or none
// of a repository. When one of them turns out to have come back, what hangs on it
// must not go.
func (c *collection) delete(ctx context.Context, have contents, keep map[digest.Digest]bool) error {
	due := func(links []link) (due []link) {
		for _, l := range links {
			switch {
			case keep[l.name] || l.condemned.IsZero():
			case l.condemned.After(c.settled):
				c.link(l)
				c.Waiting++
			default:
				due = append(due, l)
			}
		}
		return due
	}
	manifests, layers := due(have.revisions), due(have.layers)
	if len(manifests)+len(layers) == 0 {
		return nil
	}
	all := slices.Concat(manifests, layers)
	reaped, err := c.store.medium.reap(ctx, all, c.cutoff)
	if !reaped {
		for _, l := range all { // they are there again
			c.link(l)
		}
		c.Waiting++
		return err
	}
	c.Manifests += len(manifests)
	c.Layers += len(layers)
	return err
}

// condemn condemns links that nothing needs. If one of them was used at that very
// moment it comes back, and the rest waits for the next pass, which knows more.
func (c *collection) condemn(ctx context.Context, links []link, keep map[digest.Digest]bool) error {
	used := false
	for _, l := range links {
		if !l.condemned.IsZero() {
			continue
		}
		c.link(l)
		if keep[l.name] || used {
			continue
		}
		at, err := c.store.medium.condemn(ctx, l)
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
		if at.After(c.cutoff) {
			used = true
			c.store.medium.rescue(ctx, l.path)
		}
	}
	return nil
}

// blobs condemns blobs that no link names, and deletes those that have been
// condemned for long enough.
func (c *collection) blobs(ctx context.Context) error {
	for b, err := range c.store.medium.blobs(ctx, false) {
		if err == nil {
			err = c.blob(ctx, b)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// blob decides about a blob. The links were read after it had been condemned, if
// it was.
func (c *collection) blob(ctx context.Context, b blob) error {
	medium, linked := c.store.medium, c.linked[b.digest]
	switch {
	case linked && b.condemned.IsZero():
		c.Kept++
		return nil
	case linked:
		return medium.restoreBlob(ctx, b.digest)
	case b.condemned.IsZero():
		// A young one has just come, and its link is about to.
		condemned, err := medium.condemnBlob(ctx, b.digest, c.settled)
		full := errors.Is(err, syscall.ENOSPC)
		if condemned || full {
			c.Waiting++
		}
		if full {
			return nil
		}
		return err
	case b.condemned.After(c.settled):
		c.Waiting++
		return nil
	}
	size, reaped, err := medium.reapBlob(ctx, b.digest)
	if reaped {
		c.Blobs++
		c.Bytes += size
	}
	return err
}
