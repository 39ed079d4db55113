package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"github.com/opencontainers/go-digest"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/connected-registry/connected-registry/storage"
)

// claims are what requests that this replica serves now are about to add. They
// count against the quota beside what is stored, so that clients who push at the
// same time do not go past it together.
//
// What other replicas have under way is not known here. It is why an upload is
// held against the quota once more when it is complete: what is stored by then
// may be more by what others have completed in the time for which figures of
// storage.Store.Used are believed, some three seconds on a directory, and by no
// more than that.
type claims struct {
	mu       sync.Mutex
	all      map[*claim]bool // guarded by mu
	released chan struct{}   // closed when one is, and made anew; guarded by mu
}

// claim is one request's. Nil is that of one without a bound.
type claim struct {
	of          *claims
	store       *storage.Store
	rules       *Rules
	repository  string
	used, total int64 // bytes stored when that was last asked
	bytes       int64 // guarded by of.mu
	complete    bool  // and about to be stored; guarded by of.mu
}

// claim asks for room for bytes in a repository, to be released when they are
// stored, or are not going to be.
func (c *claims) claim(ctx context.Context, rules *Rules, store *storage.Store, repository string, bytes int64) (*claim, error) {
	if rules.total == 0 && rules.perRepository == 0 {
		return nil, nil
	}
	m := &claim{of: c, store: store, rules: rules, repository: repository, bytes: bytes}
	all := func(*claim) bool { return true }
	err := m.ask(ctx, all, func() {
		if c.all == nil {
			c.all, c.released = make(map[*claim]bool), make(chan struct{})
		}
		c.all[m] = true
	})
	if err != nil {
		return nil, err
	}
	return m, nil
}

// ask finds out how much is stored, and calls granted if there is room beside the
// other claims that count.
func (m *claim) ask(ctx context.Context, count func(other *claim) bool, granted func()) error {
	for {
		var err error
		if m.used, m.total, err = m.store.Used(ctx, m.repository); err != nil {
			return err
		}
		m.of.mu.Lock()
		err = m.fits(count)
		if err == nil {
			granted()
		}
		storing, released := m.of.storing(m), m.of.released
		m.of.mu.Unlock()
		if err == nil || !storing {
			return err
		}
		// What is being stored may have been counted twice.
		select {
		case <-released:
		case <-ctx.Done():
			return err
		}
	}
}

// storing reports whether a claim other than m is complete, so that what is
// stored may hold its bytes. The lock is held.
func (c *claims) storing(m *claim) bool {
	for other := range c.all {
		if other != m && other.complete {
			return true
		}
	}
	return false
}

// more asks for room for bytes that were not known of.
func (m *claim) more(bytes int64) error {
	if m == nil || bytes == 0 {
		return nil
	}
	m.of.mu.Lock()
	defer m.of.mu.Unlock()
	m.bytes += bytes
	return m.fits(func(*claim) bool { return true })
}

// finish asks once more, when all bytes are here, with what is stored now. Of the
// other claims only those count of which the same is true: who is first to finish
// has the room.
func (m *claim) finish(ctx context.Context) error {
	if m == nil {
		return nil
	}
	complete := func(other *claim) bool { return other.complete }
	return m.ask(ctx, complete, func() { m.complete = true })
}

// release gives room back.
func (m *claim) release() {
	if m == nil {
		return
	}
	m.of.mu.Lock()
	defer m.of.mu.Unlock()
	delete(m.of.all, m)
	close(m.of.released)
	m.of.released = make(chan struct{})
}

// fits refuses a claim for which there is no room beside others. The lock is held.
func (m *claim) fits(count func(other *claim) bool) error {
	var repository, total int64
	for other := range m.of.all {
		if other == m || !count(other) {
			continue
		}
		total += other.bytes
		if other.repository == m.repository {
			repository += other.bytes
		}
	}
	for _, bound := range []struct {
		limit, used, coming int64
		what, field         string
	}{
		{m.rules.perRepository, m.used, repository, "repository " + m.repository, "spec.quota.perRepository"},
		{m.rules.total, m.total, total, "this registry", "spec.quota.total"},
	} {
		if bound.limit == 0 || bound.used+bound.coming+m.bytes <= bound.limit {
			continue
		}
		coming := ""
		if bound.coming > 0 {
			coming = fmt.Sprintf(", %s more are being pushed", quantity(bound.coming))
		}
		return errDenied.
			because("%s holds %s of the %s that %s allows%s, and this would be more; delete what is not needed, which frees its space at the next garbage collection, or have the quota raised",
				bound.what, quantity(bound.used), quantity(bound.limit), bound.field, coming).
			with(map[string]any{"used": bound.used, "limit": bound.limit})
	}
	return nil
}

func quantity(bytes int64) string { return resource.NewQuantity(bytes, resource.BinarySI).String() }

// claim is claims.claim with the rules in force.
func (s *Server) claim(ctx context.Context, repo storage.Repository, bytes int64) (*claim, error) {
	return s.claims.claim(ctx, s.cfg.Rules(), s.cfg.Store, repo.Name(), bytes)
}

// claimMount asks for room for a blob of another repository. The whole registry
// does not grow by it.
func (s *Server) claimMount(ctx context.Context, repo, from storage.Repository, d digest.Digest) (*claim, error) {
	rules := &Rules{perRepository: s.cfg.Rules().perRepository}
	if rules.perRepository == 0 || repo.HasLayer(ctx, d) {
		return nil, nil
	}
	size, err := from.UseLayer(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("looking for %s in %s: %w", d, from.Name(), err)
	}
	return s.claims.claim(ctx, rules, s.cfg.Store, repo.Name(), size)
}

// mayTag refuses to have a tag that is to stay as it is name something else.
func (r *Rules) mayTag(ctx context.Context, repo storage.Repository, d digest.Digest, tags []string) error {
	for _, tag := range tags {
		if !r.locked(repo.Name(), tag) {
			continue
		}
		now, err := repo.Tag(ctx, tag)
		if err == nil && now != d {
			return lockedError(repo, tag)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
