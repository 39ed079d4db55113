package storage

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"sync"

	"github.com/opencontainers/go-digest"
)

// What is remembered of manifests. Most are a few kilobytes.
const (
	maxRemembered     = 16 << 20 // bytes in all
	maxRememberedEach = 64 << 10 // bytes of one
)

// Manifest returns the content of the manifest d when it belongs to this
// repository. It must not be changed. The error is fs.ErrNotExist when it does
// not, or is larger than any manifest, and otherwise as OpenBlob's.
//
// Small ones are remembered, and believed for as long as what is stored is the
// version that they were read from, with its seal, which one stat tells; at once,
// where nothing can change behind a seal. So what another
// replica deletes or finds corrupt is not served from memory.
func (r Repository) Manifest(ctx context.Context, d digest.Digest) ([]byte, error) {
	if !validDigest(d) {
		return nil, fmt.Errorf("digest %q: %w", d, digest.ErrDigestInvalidFormat)
	}
	target, err := r.store.followToRead(ctx, linkPath(r.path+"/_manifests/revisions/", d), d)
	if err != nil {
		return nil, err
	}
	if content, ok := r.store.manifests.get(ctx, r.store.medium, target); ok {
		return content, nil
	}
	f, err := r.store.OpenBlob(ctx, target)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.Size > maxManifest {
		return nil, fmt.Errorf("%s is no manifest: it has %d bytes: %w", d, f.Size, fs.ErrNotExist)
	}
	content := make([]byte, f.Size)
	if _, err := io.ReadFull(f, content); err != nil {
		return nil, fmt.Errorf("reading manifest %s: %w", d, err)
	}
	if f.sealed {
		r.store.manifests.put(target, f.version, content)
	}
	return content, nil
}

// manifestCache remembers manifests.
type manifestCache struct {
	mu      sync.RWMutex
	entries map[digest.Digest]remembered // guarded by mu
	bytes   int                          // of their contents; guarded by mu
}

type remembered struct {
	content []byte
	version version // sealed
}

func newManifestCache() *manifestCache {
	return &manifestCache{entries: make(map[digest.Digest]remembered)}
}

func (c *manifestCache) get(ctx context.Context, medium blobs, d digest.Digest) ([]byte, bool) {
	c.mu.RLock()
	e, ok := c.entries[d]
	c.mu.RUnlock()
	if !ok {
		return nil, false
	}
	if e.version.final {
		return e.content, true
	}
	size, version, err := medium.statBlob(ctx, d)
	if err != nil || version != e.version || size != int64(len(e.content)) {
		return nil, false
	}
	return e.content, true
}

// put remembers what was read of a sealed version.
func (c *manifestCache) put(d digest.Digest, v version, content []byte) {
	if len(content) > maxRememberedEach {
		return
	}
	e := remembered{content: content, version: v}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bytes += len(content) - len(c.entries[d].content)
	c.entries[d] = e
	for old, e := range c.entries { // whichever: forgetting costs a read
		if c.bytes <= maxRemembered {
			break
		}
		c.bytes -= len(e.content)
		delete(c.entries, old)
	}
}

// validDigest is digest.Digest.Validate for those who ask many times a second.
func validDigest(d digest.Digest) bool {
	const prefix, length = "sha256:", 64
	if len(d) != len(prefix)+length || d[:len(prefix)] != prefix {
		return d.Validate() == nil
	}
	for i := len(prefix); i < len(d); i++ {
		if b := d[i]; (b < '0' || '9' < b) && (b < 'a' || 'f' < b) {
			return false
		}
	}
	return true
}
