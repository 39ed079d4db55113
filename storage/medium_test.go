package storage

import (
	"bytes"
	"context"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/storage/internal/membucket"
)

// eachMedium runs a test on a directory and on an object store. What open returns
// are replicas of the same store.
func eachMedium(t *testing.T, test func(t *testing.T, open func() *Store)) {
	t.Run("directory", func(t *testing.T) {
		root := t.TempDir()
		test(t, func() *Store { return open(t, root) })
	})
	t.Run("objects", func(t *testing.T) {
		b := new(membucket.Bucket)
		test(t, func() *Store { return openWith(t, Config{Root: t.TempDir(), Bucket: b}) })
	})
}

// eachMediumInTime is eachMedium for what waits: object stores count time in
// seconds, which pass at once here. The test can have no others inside.
func eachMediumInTime(t *testing.T, test func(t *testing.T, open func() *Store)) {
	t.Run("directory", func(t *testing.T) {
		root := t.TempDir()
		test(t, func() *Store { return open(t, root) })
	})
	t.Run("objects", func(t *testing.T) {
		root := t.TempDir()
		synctest.Test(t, func(t *testing.T) {
			b := new(membucket.Bucket)
			test(t, func() *Store { return openWith(t, Config{Root: root, Bucket: b}) })
		})
	})
}

// graceOf is the shortest time in which something that was condemned comes back.
func graceOf(s *Store) time.Duration {
	if s.inBucket() != nil {
		return time.Minute
	}
	return time.Nanosecond
}

func openWith(t *testing.T, c Config) *Store {
	t.Helper()
	c.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	s, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// asCollector makes a link old as soon as it was not used for the minimum age.
func asCollector(s *Store) *Store {
	s.renewAfter = 0
	return s
}

// onDisk is the medium of a Store on a directory.
func (s *Store) onDisk() *directory { return s.medium.(*directory) }

// path is the path on disk of a driver path.
func (s *Store) path(driverPath string) string { return s.onDisk().path(driverPath) }

// inBucket is the object store that a Store is on; nil for a directory.
func (s *Store) inBucket() *membucket.Bucket {
	if m, ok := s.medium.(*objects); ok {
		return m.bucket.(*membucket.Bucket)
	}
	return nil
}

// age makes everything that is stored old. The seals stay.
func age(t *testing.T, s *Store) {
	t.Helper()
	then := time.Now().Add(-48 * time.Hour)
	if b := s.inBucket(); b != nil {
		for _, key := range keys(t, b, "") {
			b.SetModified(key, then)
		}
		return
	}
	err := filepath.WalkDir(s.root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Name() == "data" && !strings.Contains(path, "/_uploads/") {
			return err
		}
		return os.Chtimes(path, then, then)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func keys(t *testing.T, b bucket.Bucket, prefix string) (keys []string) {
	t.Helper()
	for at, err := range b.List(t.Context(), prefix, "", "") {
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, at.Key)
	}
	return keys
}

// stored are the blobs that there are, condemned or not, and what else there is
// among what is stored that is no link.
func stored(t *testing.T, s *Store) (blobs map[digest.Digest]bool, litter []string) {
	t.Helper()
	var paths []string
	if b := s.inBucket(); b != nil {
		for _, key := range keys(t, b, "") {
			content, _, err := readObject(t.Context(), b, key)
			if err != nil {
				t.Fatal(err)
			}
			rescued := strings.HasPrefix(key, limboDir) && bytes.Contains(content, []byte(`"rescued"`)) // it goes when it is old
			if !rescued && (strings.HasPrefix(key, "docker/") || strings.HasPrefix(key, limboDir)) {
				paths = append(paths, "/"+key)
			}
		}
	} else {
		for _, dir := range []string{"/docker", "/" + limboDir, "/" + trashDir} {
			err := eachFile(s.root+dir, func(file string, _ fs.DirEntry) error {
				paths = append(paths, strings.TrimPrefix(file, s.root))
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	blobs = make(map[digest.Digest]bool)
	for _, path := range paths {
		if d, ok := parseBlobPath(path); ok {
			blobs[d] = true
		} else if !strings.HasPrefix(path, repositoriesRoot) || filepath.Base(path) != "link" && filepath.Base(filepath.Dir(filepath.Dir(filepath.Dir(path)))) != "_referrers" {
			litter = append(litter, path)
		}
	}
	return blobs, litter
}

// spoil has something else put a blob in its place: content, unless it is nil, and
// without a seal.
func spoil(t *testing.T, s *Store, d digest.Digest, change func(content []byte)) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	if b := s.inBucket(); b != nil {
		key := strings.TrimPrefix(blobPath(d), "/")
		content, _, err := readObject(ctx, b, key)
		if err == nil {
			content = bytes.Clone(content)
			change(content)
			_, err = b.Put(ctx, key, content, nil, bucket.Conditions{})
		}
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	content, err := os.ReadFile(s.path(blobPath(d)))
	if err == nil {
		change(content)
		var f *os.File
		if f, err = os.OpenFile(s.path(blobPath(d)), os.O_RDWR, 0); err == nil {
			_, err = f.WriteAt(content, 0)
			f.Close()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// flip changes one byte of a blob, as anything that writes to the medium may.
func flip(t *testing.T, s *Store, d digest.Digest) {
	t.Helper()
	spoil(t, s, d, func(content []byte) { content[7] ^= 0x40 })
}

// unseal puts a blob in its place again, without a seal.
func unseal(t *testing.T, s *Store, d digest.Digest) {
	t.Helper()
	spoil(t, s, d, func([]byte) {})
}

// isSealed reports whether a blob is there and bears its seal.
func isSealed(t *testing.T, s *Store, d digest.Digest) bool {
	t.Helper()
	c, err := s.medium.openBlob(t.Context(), d)
	if err != nil {
		t.Error(err)
		return false
	}
	c.Close()
	return c.sealed
}

// condemnedLayer reports whether the link to a layer is condemned.
func condemnedLayer(t *testing.T, r Repository, d digest.Digest) (condemned bool) {
	t.Helper()
	links, err := r.store.medium.links(t.Context(), r.path+"/_layers")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.name == d && l.condemned.IsZero() {
			return false
		}
		condemned = condemned || l.name == d
	}
	return condemned
}
