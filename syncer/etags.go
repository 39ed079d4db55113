package syncer

import (
	"context"
	"sync"

	"github.com/opencontainers/go-digest"
)

// etags remembers, over synchronisations, what a parent's entity tags stand for.
// A parent that does not name the digest of a manifest need then not send the
// manifest again to say that it has not changed. Of others nothing is remembered.
type etags struct {
	mu   sync.Mutex
	tags map[string]known // by parent, repository and tag
}

type known struct {
	etag   string
	digest digest.Digest
}

func newETags() *etags { return &etags{tags: make(map[string]known)} }

func (e *etags) get(key string) known {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.tags[key]
}

// maxETags bounds what is remembered. Whatever is forgotten costs one manifest.
const maxETags = 100_000

func (e *etags) put(key string, k known) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.tags) >= maxETags {
		clear(e.tags)
	}
	e.tags[key] = k
}

// resolve asks what a tag stands for at the parent.
func (r *repository) resolve(ctx context.Context, tag string) (digest.Digest, error) {
	key := r.parent.host + "/" + r.remote + ":" + tag
	before := r.run.etags.get(key)
	now, err := r.parent.resolve(ctx, r.remote, tag, before)
	if err == nil && now != before && now.etag != "" {
		r.run.etags.put(key, now)
	}
	return now.digest, err
}
