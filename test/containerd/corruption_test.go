package containerd

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// TestCorruptCache flips one byte of every layer in the node's cache: no pull
// sees it.
func TestCorruptCache(t *testing.T) {
	h := startHops(t, systemConfig{})
	onlyCache := []string{h.cacheHost()}
	h.pulls(t, "intact", h.own(), onlyCache, h.cacheHost())
	for _, ref := range []string{h.own(), h.mirrored()} {
		corrupt(t, filepath.Join(h.data, "cache"), h.image.layers)
		h.pulls(t, "corrupt cache", ref, onlyCache, h.cacheHost())
	}
	if again := h.pulls(t, "mended cache", h.own(), onlyCache, h.cacheHost()); again.cacheMissed() {
		t.Errorf("pulling again: Cache-Status %v, want hits", again.cacheStatus())
	}
	if asked := h.parent.seen(); len(asked) > 0 {
		t.Errorf("the parent was asked for what is kept here: %v", asked)
	}
}

// TestCorruptRegistry flips one byte of every layer that the central registry
// keeps, with no cache to hide it: a pull by the parent's name gets the right
// bytes from the parent, and a synchronisation mends the registry.
func TestCorruptRegistry(t *testing.T) {
	h := startHops(t, systemConfig{})
	h.cache.stop(t)
	corrupt(t, filepath.Join(h.data, "registry"), h.image.layers)

	pullAndCheck(t, h.daemon, h.mirrored(), h.image)
	if h.parent.count("GET", "/blobs/") < len(h.image.layers) {
		t.Errorf("the parent was asked for %v, want every layer", h.parent.seen())
	}
	h.daemon.remove(t, h.mirrored())

	if _, err := h.Syncer.Sync(t.Context(), v1alpha1.SyncTriggerManual); err != nil {
		t.Fatalf("synchronising: %v", err)
	}
	h.pulls(t, "mended registry", h.own(), []string{h.cacheHost(), h.LoginServer}, h.LoginServer)
}

// corrupt flips a byte in the middle of the file of each layer below dir, and
// fails the test unless it found one file for each.
func corrupt(t *testing.T, dir string, layers []v1.Layer) {
	t.Helper()
	for _, layer := range layers {
		digest, err := layer.Digest()
		if err != nil {
			t.Fatal(err)
		}
		files := filesOf(t, dir, digest)
		if len(files) != 1 {
			t.Fatalf("files with the content of %s below %s: %v, want one", digest, dir, files)
		}
		flipByte(t, files[0])
	}
}

// filesOf finds the files below dir that have the content of digest, whatever
// their names.
func filesOf(t *testing.T, dir string, digest v1.Hash) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.Close()
		if content, _, err := v1.SHA256(f); err != nil {
			return err
		} else if content == digest {
			found = append(found, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func flipByte(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, size/2); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b, size/2); err != nil {
		t.Fatal(err)
	}
}
