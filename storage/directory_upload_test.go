package storage

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"testing"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/opencontainers/go-digest"
)

const uploadDir = repositoriesRoot + "app/_uploads/1"

// openWriter opens the data of the upload at uploadDir.
func openWriter(t *testing.T, s *Store, appending bool) *uploadWriter {
	t.Helper()
	w, err := s.Driver().Writer(t.Context(), uploadDir+"/data", appending)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Cancel(context.Background()) })
	return w.(*uploadWriter)
}

func mustWrite(t *testing.T, w storagedriver.FileWriter, p []byte) {
	t.Helper()
	if n, err := w.Write(p); n != len(p) || err != nil {
		t.Fatalf("wrote %d bytes, %v", n, err)
	}
}

func mustCommit(t *testing.T, w storagedriver.FileWriter) {
	t.Helper()
	if err := w.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestUploadIsWrittenByOne has a second writer in the same process, and in another.
func TestUploadIsWrittenByOne(t *testing.T) {
	first := open(t, t.TempDir())
	for _, second := range []*Store{first, open(t, first.Root())} {
		content := random(100_000)
		d := digest.FromBytes(content)
		w := openWriter(t, first, false)
		mustWrite(t, w, content[:50_000])

		other := openWriter(t, second, true)
		if other.Size() != 50_000 {
			t.Errorf("size %d for who looks", other.Size())
		}
		if _, err := other.Write(random(50_000)); !errors.Is(err, ErrBusy) {
			t.Errorf("writing: %v", err)
		}
		if err := other.Commit(t.Context()); !errors.Is(err, ErrBusy) {
			t.Errorf("committing: %v", err)
		}
		mustWrite(t, w, content[50_000:])
		mustCommit(t, w)
		late := openWriter(t, second, true)
		if err := late.Commit(t.Context()); !errors.Is(err, ErrBusy) {
			t.Errorf("committing what is committed: %v", err)
		}
		if err := first.Driver().Move(t.Context(), uploadDir+"/data", blobPath(d)); err != nil {
			t.Fatal(err)
		}
		if !isSealed(t, first, d) {
			t.Error("not sealed")
		}
		// What was opened before can write no more.
		for _, w := range []*uploadWriter{other, late} {
			if _, err := w.Write(content); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("writing to a blob: %v", err)
			}
		}
	}
}

// A writer that was opened at one size does not write at another.
func TestUploadAtAnotherSize(t *testing.T) {
	s := open(t, t.TempDir())
	openWriter(t, s, false).Close()
	a, b := openWriter(t, s, true), openWriter(t, s, true)
	mustWrite(t, a, random(10))
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Write(random(10)); !errors.Is(err, ErrBusy) {
		t.Errorf("%v", err)
	}
	c := openWriter(t, s, true)
	mustWrite(t, c, random(10))
	if c.Size() != 20 {
		t.Errorf("size %d", c.Size())
	}
}

// TestUploadIsHashedWhereInDoubt changes what a digest was computed of, as it can be
// where there are no locks, and leaves it alone.
func TestUploadIsHashedWhereInDoubt(t *testing.T) {
	for name, c := range map[string]struct {
		noLocks, before, after bool
	}{
		"no locks":                  {noLocks: true},
		"no locks, another writer":  {noLocks: true, before: true},
		"touched after the commit":  {after: true},
		"no locks, touched at last": {noLocks: true, after: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir())
			content := random(100_000)
			d := digest.FromBytes(content)
			w := openWriter(t, s, false)
			mustWrite(t, w, content)
			w.locked = !c.noLocks
			touch := func() {
				f, err := os.OpenFile(s.Root()+uploadDir+"/data", os.O_WRONLY, 0)
				if err == nil {
					_, err = f.WriteAt([]byte("other bytes"), 1000)
					f.Close()
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if c.before {
				touch()
			}
			mustCommit(t, w)
			if c.after {
				time.Sleep(50 * time.Millisecond) // a step of the file's times
				touch()
			}
			err := s.Driver().Move(t.Context(), uploadDir+"/data", blobPath(d))
			if bad := c.before || c.after; bad != errors.Is(err, ErrCorrupt) || !bad && err != nil {
				t.Fatal(err)
			} else if !bad && !isSealed(t, s, d) {
				t.Error("not sealed")
			} else if bad {
				if _, err := os.Stat(s.Root() + blobPath(d)); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("in place: %v", err)
				}
			}
			if w := s.medium.(*directory).uploads.get(uploadDir + "/data"); w != nil {
				t.Error("it is held still")
			}
		})
	}
}

// TestHashStatesAreTheHoldersOwn stores states as who holds the upload, as one who
// does not, and when they are not those of what is there.
func TestHashStatesAreTheHoldersOwn(t *testing.T) {
	s := open(t, t.TempDir())
	states := uploadDir + "/hashstates/sha256/"
	kept := func(offset string) bool {
		t.Helper()
		if err := s.Driver().PutContent(t.Context(), states+offset, []byte("state")); err != nil {
			t.Fatal(err)
		}
		_, err := os.Stat(s.Root() + states + offset)
		return err == nil
	}
	w := openWriter(t, s, false)
	if kept("0") {
		t.Error("that of nothing")
	}
	mustWrite(t, w, random(10))
	if kept("9") || kept("11") {
		t.Error("of other bytes")
	}
	if !kept("10") {
		t.Error("not that of the bytes")
	}
	if w.dirty {
		t.Error("it outlives the bytes")
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	w = openWriter(t, s, true)
	mustWrite(t, w, random(10))
	if err := s.medium.removeUpload(t.Context(), uploadDir); err != nil {
		t.Fatal(err)
	}
	if kept("20") {
		t.Error("of an upload that is gone")
	}
	w.Close()
	w = openWriter(t, s, false)
	w.Close()
	if kept("0") || kept("10") {
		t.Error("by nobody")
	}
	w = openWriter(t, s, true)
	mustWrite(t, w, random(10))
	w.locked = false
	if kept("10") {
		t.Error("where there are no locks")
	}
	w.locked = true
	mustCommit(t, w)
	if kept("10") {
		t.Error("of what is committed")
	}
}
