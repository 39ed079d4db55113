package storage

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

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
// Small ones are remembered, and believed for as long as the file is the one that
// they were read from and bears its seal, which one stat tells. So what another
// replica deletes or finds corrupt is not served from memory.
func (r Repository) Manifest(ctx context.Context, d digest.Digest) ([]byte, error) {
	if !validDigest(d) {
		return nil, fmt.Errorf("digest %q: %w", d, digest.ErrDigestInvalidFormat)
	}
	target, err := r.store.follow(linkPath(r.path+"/_manifests/revisions/", d), d)
	if err != nil {
		return nil, err
	}
	if content, ok := r.store.manifests.get(target, r.store.path(blobPath(target))); ok {
		return content, nil
	}
	f, fi, err := r.store.OpenBlob(ctx, target)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi.Size() > maxManifest {
		return nil, fmt.Errorf("%s is no manifest: it has %d bytes: %w", d, fi.Size(), fs.ErrNotExist)
	}
	content := make([]byte, fi.Size())
	if _, err := io.ReadFull(f, content); err != nil {
		return nil, fmt.Errorf("reading manifest %s: %w", d, err)
	}
	r.store.manifests.put(target, f, content)
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
	file    fileID
	seal    time.Time
}

func newManifestCache() *manifestCache {
	return &manifestCache{entries: make(map[digest.Digest]remembered)}
}

func (c *manifestCache) get(d digest.Digest, path string) ([]byte, bool) {
	c.mu.RLock()
	e, ok := c.entries[d]
	c.mu.RUnlock()
	if !ok {
		return nil, false
	}
	modified, size, file, err := statID(path)
	if err != nil || file != e.file || size != int64(len(e.content)) || !modified.Equal(e.seal) {
		return nil, false
	}
	return e.content, true
}

// put remembers what was read from f, if that is sealed.
func (c *manifestCache) put(d digest.Digest, f *os.File, content []byte) {
	fi, err := f.Stat()
	if err != nil || !Sealed(fi, d) || len(content) > maxRememberedEach {
		return
	}
	e := remembered{content: content, file: idOf(fi), seal: fi.ModTime()}
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
