package storage

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/distribution/distribution/v3"
	"github.com/distribution/distribution/v3/configuration"
	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/factory"
	"github.com/distribution/reference"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func open(t *testing.T, root string) *Store {
	t.Helper()
	return openWith(t, Config{Root: root})
}

// upload pushes a blob the way distribution does.
func upload(ctx context.Context, s *Store, name string, content []byte) (digest.Digest, error) {
	named, err := reference.WithName(name)
	if err != nil {
		return "", err
	}
	repo, err := s.Namespace().Repository(ctx, named)
	if err != nil {
		return "", err
	}
	w, err := repo.Blobs(ctx).Create(ctx)
	if err != nil {
		return "", err
	}
	if _, err := w.ReadFrom(bytes.NewReader(content)); err != nil {
		return "", err
	}
	d := digest.FromBytes(content)
	if _, err = w.Commit(ctx, v1.Descriptor{Digest: d}); err != nil {
		err = errors.Join(err, Repository{store: s, path: repositoriesRoot + name}.DeleteUpload(ctx, w.ID()))
	}
	return d, err
}

func mustUpload(t *testing.T, s *Store, name string, content []byte) digest.Digest {
	t.Helper()
	d, err := upload(t.Context(), s, name, content)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func TestUploadArrivesSealed(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		content := random(1 << 20)
		d := mustUpload(t, s, "a/b", content)
		if !isSealed(t, s, d) {
			t.Fatal("not sealed")
		}
		got, err := s.Driver().GetContent(t.Context(), blobPath(d))
		if err != nil || !bytes.Equal(got, content) {
			t.Fatalf("read back %d bytes, %v", len(got), err)
		}
		if diff := cmp.Diff(Stats{}, s.Stats()); diff != "" {
			t.Errorf("stats (-want +got):\n%s", diff)
		}
	})
}

func TestSmallBlobArrivesSealed(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		content := []byte(`{"schemaVersion":2}`)
		d := digest.FromBytes(content)
		if err := s.Driver().PutContent(t.Context(), blobPath(d), content); err != nil {
			t.Fatal(err)
		}
		if !isSealed(t, s, d) {
			t.Error("not sealed")
		}
		other := digest.FromString("other")
		if err := s.Driver().PutContent(t.Context(), blobPath(other), content); !errors.Is(err, ErrCorrupt) {
			t.Errorf("stored under another digest: %v, want ErrCorrupt", err)
		}
		if _, _, err := s.medium.statBlob(t.Context(), other); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("left something behind: %v", err)
		}
	})
}

func TestEmptyBlob(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		d := mustUpload(t, s, "a", nil)
		if got, err := s.Driver().GetContent(t.Context(), blobPath(d)); err != nil || len(got) != 0 {
			t.Errorf("read %q, %v", got, err)
		}
	})
}

// Only what distribution has verified, the data of an upload, may be sealed by
// being moved.
func TestMoveFromElsewhereIsNotTrusted(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		d := digest.FromString("right")
		if err := s.Driver().PutContent(t.Context(), "/elsewhere/data", []byte("wrong")); err != nil {
			t.Fatal(err)
		}
		if err := s.Driver().Move(t.Context(), "/elsewhere/data", blobPath(d)); err != nil {
			t.Fatal(err)
		}
		var absent storagedriver.PathNotFoundError
		if _, err := s.Driver().GetContent(t.Context(), blobPath(d)); !errors.As(err, &absent) {
			t.Errorf("read: %v, want PathNotFoundError", err)
		}
	})
}

func TestMoveReplacesWhatIsThere(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		ctx := t.Context()
		for _, content := range []string{"one", "two"} {
			if err := s.Driver().PutContent(ctx, "/from", []byte(content)); err != nil {
				t.Fatal(err)
			}
			if err := s.Driver().Move(ctx, "/from", "/to/file"); err != nil {
				t.Fatal(err)
			}
			if got, err := s.Driver().GetContent(ctx, "/to/file"); err != nil || string(got) != content {
				t.Errorf("read %q, %v", got, err)
			}
		}
		var absent storagedriver.PathNotFoundError
		if err := s.Driver().Move(ctx, "/from", "/to/file"); !errors.As(err, &absent) {
			t.Errorf("moving what is gone: %v, want PathNotFoundError", err)
		}
	})
}

func TestCorruptBlobIsSetAsideAndCanBePushedAgain(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		content := random(300_000)
		d := mustUpload(t, s, "a", content)
		flip(t, s, d)

		var absent storagedriver.PathNotFoundError
		if _, err := s.Driver().Stat(t.Context(), blobPath(d)); !errors.As(err, &absent) {
			t.Errorf("Stat: %v, want PathNotFoundError", err)
		}
		if _, err := s.Driver().Reader(t.Context(), blobPath(d), 0); !errors.As(err, &absent) {
			t.Errorf("Reader: %v, want PathNotFoundError", err)
		}
		if _, err := s.OpenBlob(t.Context(), d); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("OpenBlob: %v, want ErrNotExist", err)
		}
		aside, err := s.medium.readNote(t.Context(), quarantineDir+"/sha256-"+d.Encoded())
		if err != nil || len(aside) != len(content) {
			t.Errorf("quarantine: %d bytes, %v", len(aside), err)
		}
		if got := s.Stats().Quarantined; got != 1 {
			t.Errorf("quarantined %d, want 1", got)
		}

		mustUpload(t, s, "a", content)
		if got, err := s.Driver().GetContent(t.Context(), blobPath(d)); err != nil || !bytes.Equal(got, content) {
			t.Errorf("after pushing again: %d bytes, %v", len(got), err)
		}
	})
}

// distribution skips storing what a Stat says is there.
func TestPushOverCorruptBlobReplacesIt(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		content := random(100_000)
		d := mustUpload(t, s, "a", content)
		flip(t, s, d)
		mustUpload(t, s, "b", content)
		if got, err := s.Driver().GetContent(t.Context(), blobPath(d)); err != nil || !bytes.Equal(got, content) {
			t.Errorf("read %d bytes, %v", len(got), err)
		}
	})
}

func TestUnsealedBlobIsHashedOnceForAll(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		content := random(4 << 20)
		d := mustUpload(t, s, "a", content)
		unseal(t, s, d)
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				r, err := s.Driver().Reader(t.Context(), blobPath(d), 1)
				if err != nil {
					t.Error(err)
					return
				}
				defer r.Close()
				if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, content[1:]) {
					t.Errorf("read %d bytes, %v", len(got), err)
				}
			})
		}
		wg.Wait()
		if got := s.Stats().Rehashed; got != 1 {
			t.Errorf("hashed %d times, want once", got)
		}
		if !isSealed(t, s, d) {
			t.Error("not sealed again")
		}
	})
}

// A client that gives up must not make the next one begin from nothing.
func TestHashingOutlivesTheOneWhoAsked(t *testing.T) {
	s := open(t, t.TempDir())
	d := mustUpload(t, s, "a", random(8<<20))
	unseal(t, s, d)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.OpenBlob(ctx, d); !errors.Is(err, context.Canceled) {
		t.Errorf("OpenBlob: %v, want Canceled", err)
	}
	s.mu.Lock()
	v := s.pending[d]
	s.mu.Unlock()
	if v != nil {
		<-v.done
	}
	if !isSealed(t, s, d) {
		t.Error("not sealed")
	}
}

func TestCloseEndsHashing(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		d := mustUpload(t, s, "a", random(1<<20))
		unseal(t, s, d)
		for range cap(s.hashing) { // nobody gets to hash
			s.hashing <- struct{}{}
		}
		result := make(chan error)
		go func() {
			_, err := s.OpenBlob(t.Context(), d)
			result <- err
		}()
		for {
			s.mu.Lock()
			n := len(s.pending)
			s.mu.Unlock()
			if n == 1 {
				break
			}
			time.Sleep(time.Millisecond)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-result; !errors.Is(err, errClosed) {
			t.Errorf("waiting reader got %v, want errClosed", err)
		}
		if _, err := s.OpenBlob(t.Context(), d); !errors.Is(err, errClosed) {
			t.Errorf("after Close: %v, want errClosed", err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
	})
}

// A good copy that takes the place of a corrupt one between the hash and the
// move must survive.
func TestQuarantineSparesTheGoodCopy(t *testing.T) {
	s := open(t, t.TempDir())
	content := random(10_000)
	d := mustUpload(t, s, "a", content)
	path := s.path(blobPath(d))
	flip(t, s, d)
	bad, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer bad.Close()
	if err := os.Rename(path, path+".bad"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.onDisk().quarantine(d, path, bad); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("quarantine: %v", err)
	}
	if got, err := s.Driver().GetContent(t.Context(), blobPath(d)); err != nil || !bytes.Equal(got, content) {
		t.Errorf("good copy: %d bytes, %v", len(got), err)
	}
}

func TestDirectoryInPlaceOfBlob(t *testing.T) {
	s := open(t, t.TempDir())
	d := digest.FromString("x")
	if err := os.MkdirAll(s.path(blobPath(d)), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := s.OpenBlob(t.Context(), d); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("OpenBlob: %v, want ErrNotExist", err)
	}
}

func TestReaderOffsets(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		d := mustUpload(t, s, "a", []byte("0123456789"))
		r, err := s.Driver().Reader(t.Context(), blobPath(d), 4)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if got, _ := io.ReadAll(r); string(got) != "456789" {
			t.Errorf("from 4: %q", got)
		}
		var invalid storagedriver.InvalidOffsetError
		if _, err := s.Driver().Reader(t.Context(), blobPath(d), -1); !errors.As(err, &invalid) {
			t.Errorf("from -1: %v", err)
		}
	})
}

func TestOpenRefusesAnUnusableDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, root := range []string{file, filepath.Join(file, "below"), "/proc/self/fdinfo/x"} {
		_, err := Open(t.Context(), Config{Root: root})
		if err == nil {
			t.Errorf("%s: opened", root)
			continue
		}
		if text := err.Error(); !strings.Contains(text, root) || !strings.Contains(text, "make it writable") || strings.Contains(text, "\n") {
			t.Errorf("%s: unhelpful error %q", root, text)
		}
	}
	if _, err := Open(t.Context(), Config{}); err == nil {
		t.Error("opened without a root")
	}
}

func TestOpenLeavesNothingBehind(t *testing.T) {
	root := t.TempDir()
	open(t, root)
	var files []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, path)
		}
		return err
	})
	if err != nil || len(files) != 0 {
		t.Errorf("files %v, %v", files, err)
	}
}

// The factory is how distribution's own application would find the driver.
func TestParameters(t *testing.T) {
	one, two := open(t, t.TempDir()), open(t, t.TempDir())
	for _, s := range []*Store{one, two} {
		cfg := configuration.Storage{DriverName: s.Parameters()}
		d, err := factory.Create(t.Context(), cfg.Type(), cfg.Parameters())
		if err != nil {
			t.Fatal(err)
		}
		if d != s.Driver() {
			t.Error("another store's driver")
		}
	}
	if _, err := factory.Create(t.Context(), DriverName, nil); err == nil {
		t.Error("driver without a store")
	}
}

func TestNamespaceDeletes(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		d := mustUpload(t, s, "a", []byte("blob"))
		named, _ := reference.WithName("a")
		repo, err := s.Namespace().Repository(t.Context(), named)
		if err != nil {
			t.Fatal(err)
		}
		if err := repo.Blobs(t.Context()).Delete(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		if _, err := repo.Blobs(t.Context()).Stat(t.Context(), d); !errors.Is(err, distribution.ErrBlobUnknown) {
			t.Errorf("Stat: %v", err)
		}
	})
}

// Two processes on one volume: neither may remember what the other changed.
func TestStoresShareADirectory(t *testing.T) {
	root := t.TempDir()
	one, two := open(t, root), open(t, root)
	content := random(5000)
	d := mustUpload(t, one, "a", content)
	if got, err := two.Driver().GetContent(t.Context(), blobPath(d)); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("the other reads %d bytes, %v", len(got), err)
	}
	if err := two.Driver().Delete(t.Context(), filepath.Dir(blobPath(d))); err != nil {
		t.Fatal(err)
	}
	if _, err := one.OpenBlob(t.Context(), d); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after the other deleted it: %v", err)
	}
	mustUpload(t, two, "a", content)
	if _, err := one.Driver().Stat(t.Context(), blobPath(d)); err != nil {
		t.Errorf("after the other pushed it again: %v", err)
	}
}

func FuzzParseBlobPath(f *testing.F) {
	f.Add(blobPath(digest.FromString("x")))
	f.Add(blobPath(digest.SHA512.FromString("x")))
	f.Add("/docker/registry/v2/blobs/sha256/aa/../data")
	f.Fuzz(func(t *testing.T, path string) {
		if d, ok := parseBlobPath(path); ok && blobPath(d) != path {
			t.Errorf("%q parsed as %s, whose path is %q", path, d, blobPath(d))
		}
	})
}
