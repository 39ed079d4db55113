package storage

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// writeFile makes a file with the given content and returns it open for
// reading, with the content's digest.
func writeFile(t *testing.T, content string) (*os.File, digest.Digest) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, digest.FromString(content)
}

func sealed(t *testing.T, path string, d digest.Digest) bool {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return Sealed(fi, d)
}

// The seal is part of the layout on disk: a store written by one version is
// read by the next.
func TestSealTimeIsStable(t *testing.T) {
	for d, want := range map[digest.Digest]int64{
		digest.FromString(""):                              1123832452,
		digest.SHA512.FromString(""):                       1_520_602_218,
		"sha256:" + digest.Digest(strings.Repeat("0", 64)): 1_000_000_000,
		"sha256:" + digest.Digest(strings.Repeat("f", 64)): 1_000_000_000 + 1<<29 - 2,
	} {
		if got := SealTime(d).Unix(); got != want {
			t.Errorf("SealTime(%s) = %d, want %d", d, got, want)
		}
	}
	for _, bad := range []digest.Digest{"", "sha256:", "sha256:xyz", "md5:d41d8cd98f00b204e9800998ecf8427e"} {
		if got := SealTime(bad); !got.IsZero() {
			t.Errorf("SealTime(%q) = %v, want none", bad, got)
		}
	}
}

func TestSealTimesAreEvenAndInThePast(t *testing.T) {
	earliest, latest := time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2019, 1, 1, 0, 0, 0, 0, time.UTC)
	for range 10_000 {
		var b [8]byte
		for i := range b {
			b[i] = byte(rand.Uint32())
		}
		got := SealTime(digest.FromBytes(b[:]))
		if got.Unix()%2 != 0 || got.Nanosecond() != 0 || got.Before(earliest) || got.After(latest) {
			t.Fatalf("SealTime = %v", got)
		}
	}
}

func TestSeal(t *testing.T) {
	f, d := writeFile(t, "content")
	before, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if Sealed(before, d) {
		t.Fatal("sealed before it was")
	}
	if err := Seal(f, d); err != nil {
		t.Fatal(err)
	}
	if !sealed(t, f.Name(), d) {
		t.Error("not sealed after Seal")
	}
	if sealed(t, f.Name(), digest.FromString("other")) {
		t.Error("sealed as other content")
	}
	if err := Seal(f, "sha256:nonsense"); err == nil {
		t.Error("sealed as an invalid digest")
	}
}

func TestWhatBreaksTheSeal(t *testing.T) {
	for name, touch := range map[string]func(path string) error{
		"write in place": func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte{'C'}, 0)
			return err
		},
		"append": func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteString("!")
			return err
		},
		"truncate": func(path string) error { return os.Truncate(path, 3) },
		"replace":  func(path string) error { return os.WriteFile(path, []byte("other"), 0o644) },
		"copy without times": func(path string) error {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if err := os.WriteFile(path+".copy", content, 0o644); err != nil {
				return err
			}
			return os.Rename(path+".copy", path)
		},
		"touch": func(path string) error { now := time.Now(); return os.Chtimes(path, now, now) },
	} {
		t.Run(name, func(t *testing.T) {
			f, d := writeFile(t, "content")
			if err := Seal(f, d); err != nil {
				t.Fatal(err)
			}
			if err := touch(f.Name()); err != nil {
				t.Fatal(err)
			}
			if sealed(t, f.Name(), d) {
				t.Error("still sealed")
			}
		})
	}
}

func TestWhatKeepsTheSeal(t *testing.T) {
	f, d := writeFile(t, "content")
	if err := Seal(f, d); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(f); err != nil {
		t.Fatal(err)
	}
	moved := f.Name() + ".moved"
	if err := os.Rename(f.Name(), moved); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(moved, 0o600); err != nil {
		t.Fatal(err)
	}
	if !sealed(t, moved, d) {
		t.Error("reading, renaming or chmod broke the seal")
	}
}

func TestVerify(t *testing.T) {
	f, d := writeFile(t, strings.Repeat("content", 100_000))
	if _, err := f.Seek(5, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if err := Verify(t.Context(), f, d); err != nil {
		t.Fatal(err)
	}
	if !sealed(t, f.Name(), d) {
		t.Error("right but not sealed")
	}
	if at, _ := f.Seek(0, io.SeekCurrent); at != 5 {
		t.Errorf("offset moved to %d", at)
	}
	wrong := digest.FromString("other")
	if err := Verify(t.Context(), f, wrong); !errors.Is(err, ErrCorrupt) {
		t.Errorf("Verify as other content: %v, want ErrCorrupt", err)
	}
	if !sealed(t, f.Name(), d) {
		t.Error("a failed Verify changed the seal")
	}
	for _, alg := range []digest.Algorithm{digest.SHA384, digest.SHA512} {
		other := alg.FromString(strings.Repeat("content", 100_000))
		if err := Verify(t.Context(), f, other); err != nil {
			t.Errorf("%s: %v", alg, err)
		}
	}
}

func TestVerifyLooksBehindTheSeal(t *testing.T) {
	f, d := writeFile(t, "content")
	if err := os.WriteFile(f.Name(), []byte("CONTENT"), 0o644); err != nil {
		t.Fatal(err)
	}
	// As a decaying disk leaves it: other bytes, same times.
	if err := Seal(f, d); err != nil {
		t.Fatal(err)
	}
	if err := Verify(t.Context(), f, d); !errors.Is(err, ErrCorrupt) {
		t.Errorf("Verify: %v, want ErrCorrupt", err)
	}
}

// hookContext calls a function each time it is asked whether it has ended,
// which a hash does before every read.
type hookContext struct {
	context.Context
	hook func()
}

func (c hookContext) Err() error { c.hook(); return c.Context.Err() }

func TestVerifyDoesNotSealWhatIsBeingWritten(t *testing.T) {
	f, d := writeFile(t, strings.Repeat("a", 1<<20))
	calls := 0
	ctx := hookContext{t.Context(), func() {
		if calls++; calls == 3 { // behind the hash
			w, err := os.OpenFile(f.Name(), os.O_WRONLY, 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer w.Close()
			if _, err := w.WriteAt([]byte("b"), 0); err != nil {
				t.Error(err)
			}
		}
	}}
	// Let the write that made the file and the one behind the hash differ in
	// time on file systems with coarse time stamps.
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(f.Name(), old, old); err != nil {
		t.Fatal(err)
	}
	if err := Verify(ctx, f, d); !errors.Is(err, errUnstable) {
		t.Errorf("Verify: %v, want errUnstable", err)
	}
	if sealed(t, f.Name(), d) {
		t.Error("sealed with content that was not hashed")
	}
}

func TestVerifyEndsWithItsContext(t *testing.T) {
	f, d := writeFile(t, strings.Repeat("a", 1<<20))
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if err := Verify(ctx, f, d); !errors.Is(err, cause) {
		t.Errorf("Verify: %v, want the cause", err)
	}
}

func TestVerifyRefusesWhatIsNoFile(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := Verify(t.Context(), dir, digest.FromString("")); err == nil {
		t.Error("verified a directory")
	}
}

func TestOpenVerified(t *testing.T) {
	f, d := writeFile(t, "content")
	for range 2 { // hashed, then by its seal
		got, fi, err := OpenVerified(t.Context(), f.Name(), d)
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(got)
		got.Close()
		if err != nil || string(content) != "content" || !Sealed(fi, d) {
			t.Errorf("read %q, sealed %v, %v", content, Sealed(fi, d), err)
		}
	}
	if _, _, err := OpenVerified(t.Context(), f.Name(), digest.FromString("other")); !errors.Is(err, ErrCorrupt) {
		t.Errorf("as other content: %v, want ErrCorrupt", err)
	}
	if _, _, err := OpenVerified(t.Context(), f.Name()+".none", d); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v, want ErrNotExist", err)
	}
}
