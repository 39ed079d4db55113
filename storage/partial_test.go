package storage

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
)

func partialContent(size int) ([]byte, digest.Digest) {
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(size)}).Read(content)
	return content, digest.FromBytes(content)
}

func openPartial(t testing.TB, s *Store, d digest.Digest, size, chunk int64) *Partial {
	t.Helper()
	p, err := s.OpenPartial(d, size, chunk)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// fill writes what is missing of a chunk in pieces.
func fill(p *Partial, content []byte, chunk, piece int) error {
	for {
		offset, length := p.Missing(chunk)
		if length == 0 {
			return nil
		}
		if err := p.Write(chunk, content[offset:offset+min(length, int64(piece))]); err != nil {
			return err
		}
	}
}

func readBlob(t testing.TB, s *Store, d digest.Digest) []byte {
	t.Helper()
	f, err := s.OpenBlob(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if !f.sealed {
		t.Error("the blob is not sealed")
	}
	got, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestPartialOutOfOrder(t *testing.T) {
	s := open(t, t.TempDir())
	for _, size := range []int{0, 1, 999, 1000, 1001, 700_001} {
		content, d := partialContent(size)
		p := openPartial(t, s, d, int64(size), 1000)
		var wg sync.WaitGroup
		for _, i := range rand.Perm(p.Chunks()) {
			wg.Go(func() {
				if err := fill(p, content, i, 333); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if err := p.Commit(t.Context()); err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if !bytes.Equal(readBlob(t, s, d), content) {
			t.Errorf("%d bytes: not the content", size)
		}
		if s.Stats().Rehashed != 0 {
			t.Error("a blob was hashed again")
		}
	}
	if left, err := os.ReadDir(filepath.Join(s.root, partialDir)); err != nil || len(left) > 0 {
		t.Errorf("left: %v %v", left, err)
	}
}

// What was written is found by the next, whatever chunk size that would choose,
// and bytes that are not those which were written are not believed.
func TestPartialResumes(t *testing.T) {
	content, d := partialContent(10_000)
	tests := map[string]struct {
		harm func(t *testing.T, file string)
		want int64 // bytes that are still there
	}{
		"nothing": {func(*testing.T, string) {}, 4500},
		"data lost its end": {func(t *testing.T, file string) {
			if err := os.Truncate(file, 6200); err != nil {
				t.Error(err)
			}
		}, 4000},
		"data has other bytes": {func(t *testing.T, file string) { overwrite(t, file, 3001) }, 3500},
		"data is gone": {func(t *testing.T, file string) {
			if err := os.Remove(file); err != nil {
				t.Error(err)
			}
		}, 0},
		"state is gone": {func(t *testing.T, file string) {
			if err := os.Remove(file + stateSuffix); err != nil {
				t.Error(err)
			}
		}, 0},
		"state lost its end": {func(t *testing.T, file string) {
			if err := os.Truncate(file+stateSuffix, headSize+3*recordSize+5); err != nil {
				t.Error(err)
			}
		}, 3000},
		"state has another head": {func(t *testing.T, file string) { overwrite(t, file+stateSuffix, 20) }, 0},
		"a record is torn":       {func(t *testing.T, file string) { overwrite(t, file+stateSuffix, headSize+7) }, 3500},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir())
			first := openPartial(t, s, d, 10_000, 1000)
			for _, i := range []int{0, 1, 2, 3} {
				if err := fill(first, content, i, 400); err != nil {
					t.Fatal(err)
				}
			}
			if err := first.Write(6, content[6000:6500]); err != nil {
				t.Fatal(err)
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			tt.harm(t, s.partialPath(d))
			next := openPartial(t, s, d, 10_000, 4096)
			if got := next.Present(); got != tt.want {
				t.Errorf("%d bytes are there, want %d", got, tt.want)
			}
			for i := range next.Chunks() {
				if err := fill(next, content, i, 700); err != nil {
					t.Fatal(err)
				}
			}
			if err := next.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(readBlob(t, s, d), content) {
				t.Error("not the content")
			}
		})
	}
}

func overwrite(t *testing.T, file string, at int64) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0xff
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

func TestPartialRefuses(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		content, d := partialContent(5000)
		p := openPartial(t, s, d, 5000, 1000)
		if _, err := s.OpenPartial(d, 5000, 1000); !errors.Is(err, ErrBusy) {
			t.Errorf("opened twice: %v", err)
		}
		if err := p.Write(0, content[:1001]); err == nil {
			t.Error("more than a chunk was taken")
		}
		for i := range 4 {
			if err := fill(p, content, i, 1000); err != nil {
				t.Fatal(err)
			}
		}
		if freed, err := s.RemovePartials(); err != nil || freed != 0 {
			t.Errorf("%d bytes of what is open were removed: %v", freed, err)
		}
		if err := p.Commit(t.Context()); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("committed in part: %v", err)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}

		p = openPartial(t, s, d, 5000, 1000)
		if err := p.Write(4, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		if err := p.Commit(t.Context()); !errors.Is(err, ErrCorrupt) {
			t.Errorf("wrong bytes were taken: %v", err)
		}
		if _, err := s.OpenBlob(t.Context(), d); err == nil {
			t.Error("wrong bytes are served")
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		if freed, err := s.RemovePartials(); err != nil || freed != 5000 {
			t.Errorf("%d bytes freed, %v", freed, err)
		}

		p = openPartial(t, s, d, 5000, 1000)
		if p.Present() != 0 {
			t.Error("removed bytes are there")
		}
		if err := p.Discard(); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(filepath.Join(s.root, partialDir)); err != nil || len(left) > 0 {
			t.Errorf("left: %v %v", left, err)
		}
		if _, err := s.OpenPartial("sha256:../../x", 1, 1); err == nil {
			t.Error("a path was taken for a digest")
		}
	})
}

// A manifest can claim any size. That costs nothing until bytes come.
func TestPartialOfAnySize(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		p := openPartial(t, s, digest.FromString("x"), 1<<62, 1)
		if p.Chunks() > maxChunks {
			t.Errorf("%d chunks", p.Chunks())
		}
		if offset, length := p.Missing(p.Chunks() - 1); offset+length != 1<<62 || length <= 0 {
			t.Errorf("the last chunk is %d bytes at %d", length, offset)
		}
	})
}

func FuzzPartialState(f *testing.F) {
	content, d := partialContent(5000)
	f.Add([]byte{}, content)
	f.Add([]byte(stateMagic), content[:100])
	f.Fuzz(func(t *testing.T, state, data []byte) {
		s := open(t, t.TempDir())
		path := s.partialPath(d)
		if err := errors.Join(os.WriteFile(path, data, 0o600), os.WriteFile(path+stateSuffix, state, 0o600)); err != nil {
			t.Fatal(err)
		}
		p := openPartial(t, s, d, 5000, 1000)
		for i := range p.Chunks() {
			if err := fill(p, content, i, 512); err != nil {
				t.Fatal(err)
			}
		}
		// Checksums are no digests: the worst is to begin again.
		if err := p.Commit(t.Context()); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
	})
}
