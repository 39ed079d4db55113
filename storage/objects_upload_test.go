package storage

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"

	"github.com/connected-registry/connected-registry/storage/internal/membucket"
)

const uploadPath = "/docker/registry/v2/repositories/app/_uploads/1/data"

func smallParts(b *membucket.Bucket) *bucketDriver {
	b.MinPart = 100
	return &bucketDriver{bucket: b, part: 100}
}

// goOn appends to an upload, as one request does.
func goOn(ctx context.Context, d *bucketDriver, appending bool, content []byte, commit bool) (int64, error) {
	w, err := d.Writer(ctx, uploadPath, appending)
	if err != nil {
		return 0, err
	}
	_, err = w.Write(content)
	if err == nil && commit {
		err = w.Commit(ctx)
	}
	return w.Size(), errors.Join(err, w.Close())
}

func TestUploadGoesOnAnywhere(t *testing.T) {
	for range 200 {
		b := new(membucket.Bucket)
		content := random(rand.IntN(700))
		for sent := 0; ; {
			n := rand.IntN(len(content) - sent + 1)
			last := rand.IntN(4) == 0
			if last {
				n = len(content) - sent
			}
			// Each request comes to another process.
			size, err := goOn(t.Context(), smallParts(b), sent > 0, content[sent:sent+n], last)
			if sent += n; err != nil || size != int64(sent) {
				t.Fatal(size, err)
			}
			if last {
				break
			}
		}
		got, err := smallParts(b).GetContent(t.Context(), uploadPath)
		if err != nil || !bytes.Equal(got, content) {
			t.Fatalf("%d bytes became %d, %v", len(content), len(got), err)
		}
		for at, err := range b.List(t.Context(), "", "", "") {
			if err != nil || strings.TrimSuffix(at.Key, uploadSuffix) != objectKey(uploadPath) {
				t.Errorf("%s is left, %v", at.Key, err)
			}
		}
	}
}

// Two who go on with the same upload: one is told, and nothing is mixed.
func TestUploadContinuedByAnother(t *testing.T) {
	for _, before := range []int{0, 50, 250} {
		for _, more := range []int{10, 60, 300} {
			for _, commit := range []bool{false, true} {
				b := new(membucket.Bucket)
				d := smallParts(b)
				first := random(before)
				if _, err := goOn(t.Context(), d, false, first, false); err != nil {
					t.Fatal(err)
				}
				one, another := open2(t, d), open2(t, d)
				mine, theirs := random(more), random(more)
				_, err1 := one.Write(mine)
				_, err2 := another.Write(theirs)
				if commit {
					err2 = errors.Join(err2, another.Commit(t.Context()))
				}
				err2 = errors.Join(err2, another.Close())
				err1 = errors.Join(err1, one.Commit(t.Context()), one.Close())
				if err1 == nil && err2 == nil {
					// Then it is told when it goes on.
					if _, err := goOn(t.Context(), d, true, nil, true); !errors.Is(err, errContinued) {
						t.Fatalf("%d+%d bytes: nobody was told: %v", before, more, err)
					}
				}
				got, err := d.GetContent(t.Context(), uploadPath)
				switch {
				case err1 == nil:
					if !bytes.Equal(got, append(first, mine...)) {
						t.Errorf("%d+%d bytes: mixed up, %v", before, more, err)
					}
				case err2 == nil && commit:
					if !bytes.Equal(got, append(first, theirs...)) {
						t.Errorf("%d+%d bytes: mixed up, %v", before, more, err)
					}
				}
			}
		}
	}
}

func open2(t *testing.T, d *bucketDriver) storagedriver.FileWriter {
	t.Helper()
	w, err := d.Writer(t.Context(), uploadPath, true)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// A process dies, or the object store fails, at each call of an upload in turn,
// before it is carried out or after. Whoever goes on where the upload says that it
// is has the right content in the end, and nothing is left of it when it is
// deleted.
func TestUploadDiesAnywhere(t *testing.T) {
	content := random(350)
	for _, lost := range []bool{false, true} {
		for step := 0; ; step++ {
			var calls atomic.Int64
			fail := func(context.Context, string, string) error {
				if calls.Add(1)-1 == int64(step) {
					return errFault
				}
				return nil
			}
			b := new(membucket.Bucket)
			if lost {
				b.After = fail
			} else {
				b.Before = fail
			}
			d := smallParts(b)
			_, err := goOn(t.Context(), d, false, content[:120], false)
			if err == nil {
				_, err = goOn(t.Context(), d, true, content[120:], true)
			}
			if calls.Load() <= int64(step) {
				if err != nil {
					t.Fatal(err)
				}
				if step < 5 {
					t.Fatalf("an upload of %d calls", step)
				}
				break
			}
			if err == nil {
				t.Errorf("step %d: the fault was not told of", step)
			}
			resume(t, b, content)
		}
	}
}

// resume goes on with an upload until it is whole.
func resume(t *testing.T, b *membucket.Bucket, content []byte) {
	t.Helper()
	d := smallParts(b)
	w := open2(t, d)
	at := w.Size()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := goOn(t.Context(), d, true, content[at:], true); err != nil {
		t.Fatalf("going on at %d: %v", at, err)
	}
	if got, err := d.GetContent(t.Context(), uploadPath); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("gone on with at %d it became something else: %v", at, err)
	}
	if err := d.Delete(t.Context(), strings.TrimSuffix(uploadPath, "/data")); err != nil {
		t.Fatal(err)
	}
	for at, err := range b.List(t.Context(), "", "", "") {
		t.Errorf("%s is left, %v", at.Key, err)
	}
}

// A writer that was closed refuses whatever is asked of it, and harms nothing.
func TestUploadClosed(t *testing.T) {
	d := smallParts(new(membucket.Bucket))
	w, err := d.Writer(t.Context(), uploadPath, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("some")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("more")); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("written to: %v", err)
	}
	if err := w.Commit(t.Context()); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("committed: %v", err)
	}
	if n, err := goOn(t.Context(), d, true, []byte(" more"), true); n != 9 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestUploadCancelled(t *testing.T) {
	for _, n := range []int{0, 50, 250} {
		b := new(membucket.Bucket)
		d := smallParts(b)
		if _, err := goOn(t.Context(), d, false, random(n), false); err != nil {
			t.Fatal(err)
		}
		w := open2(t, d)
		if err := errors.Join(w.Cancel(t.Context()), w.Close()); err != nil {
			t.Fatal(err)
		}
		for at, err := range b.List(t.Context(), "", "", "") {
			t.Errorf("%s is left, %v", at.Key, err)
		}
		for u, err := range b.Uploads(t.Context(), "") {
			t.Errorf("%s is left, %v", u.Upload, err)
		}
		if _, err := w.Write([]byte("x")); !errors.Is(err, fs.ErrClosed) {
			t.Error(err)
		}
	}
}
