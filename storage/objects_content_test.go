package storage

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/storage/internal/membucket"
)

var errFault = errors.New("503: come back later")

// onObjects is a medium on an object store in memory. faults is asked before
// each call, and may be nil.
func onObjects(t *testing.T, b *membucket.Bucket) *objects {
	t.Helper()
	m, err := openObjects(t.Context(), b, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return m.(*objects)
}

// opened has a medium store content, and opens it.
func opened(t *testing.T, o *objects, content []byte) Content {
	t.Helper()
	d := digest.FromBytes(content)
	if err := o.putBlob(t.Context(), d, content); err != nil {
		t.Fatal(err)
	}
	c, err := o.openBlob(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// fetches counts what is fetched of a key.
type fetches struct {
	bucket.Bucket
	opened []int64 // lengths
	bytes  int64
}

func (f *fetches) Open(ctx context.Context, key string, offset, length int64) (io.ReadCloser, bucket.Attributes, error) {
	body, at, err := f.Bucket.Open(ctx, key, offset, length)
	f.opened = append(f.opened, length)
	return &countedBody{body, f}, at, err
}

type countedBody struct {
	io.ReadCloser
	f *fetches
}

func (c *countedBody) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.f.bytes += int64(n)
	return n, err
}

func TestObjectsFetchOnlyWhatIsRead(t *testing.T) {
	o := onObjects(t, new(membucket.Bucket))
	f := &fetches{Bucket: o.bucket}
	o.bucket = f
	content := random(1 << 20)
	c := opened(t, o, content)
	f.opened, f.bytes = nil, 0
	if end, err := c.Seek(0, io.SeekEnd); err != nil || end != 1<<20 {
		t.Fatal(end, err)
	}
	if _, err := c.Seek(1000, io.SeekStart); err != nil || len(f.opened) > 0 {
		t.Fatal("something was fetched before it was read", err)
	}
	c.ReadSeekCloser.(*objectContent).Expect(1500)
	got := make([]byte, 500)
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, content[1000:1500]) {
		t.Fatal("other bytes than there are", err)
	}
	if len(f.opened) != 1 || f.opened[0] != 500 || f.bytes != 500 {
		t.Errorf("fetched %v, %d bytes", f.opened, f.bytes)
	}
	// Beyond what was expected it goes on all the same.
	rest, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(rest, content[1500:]) {
		t.Error("other bytes than there are", err)
	}
}

func TestObjectsBodyThatBreaksOffIsGoneOnWith(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		faulty := 0.0
		b := &membucket.Bucket{Before: func(_ context.Context, method, key string) error {
			if strings.HasPrefix(key, "docker/") && (method == "Read" || method == "Open") && rand.Float64() < faulty {
				return errFault
			}
			return nil
		}}
		content := random(300_000)
		c := opened(t, onObjects(t, b), content)
		faulty = 0.3
		for range 50 {
			at, err := c.Seek(rand.Int64N(300_000), io.SeekStart)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, rand.IntN(300_000-int(at)))
			n, err := io.ReadFull(c, got)
			if !bytes.Equal(got[:n], content[at:at+int64(n)]) {
				t.Fatal("other bytes than there are")
			}
			if err != nil && !errors.Is(err, errFault) {
				t.Fatal(err)
			}
		}
		faulty = 1
		if _, err := c.Seek(0, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 10)); n != 0 || !errors.Is(err, errFault) {
			t.Errorf("of an object store that is gone came %d bytes, %v", n, err)
		}
		faulty = 0
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, content) {
			t.Error("it does not come back by itself:", err)
		}
	})
}

func TestObjectsContentEndsWithItsReader(t *testing.T) {
	o := onObjects(t, &membucket.Bucket{Before: func(_ context.Context, method, key string) error {
		if method == "Read" && key == "x" {
			return errFault
		}
		return nil
	}})
	content := random(100)
	if _, err := o.bucket.Put(t.Context(), "x", content, nil, bucket.Conditions{}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r, err := o.files.Reader(ctx, "/x", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cancel()
	if _, err := r.Read(content); err == nil {
		t.Error("no error")
	}
}

// A blob that was replaced while it was read is read on with only if what is
// there now is known to be the same.
func TestObjectsReplacedWhileRead(t *testing.T) {
	for _, sealed := range []bool{true, false} {
		o := onObjects(t, new(membucket.Bucket))
		content := random(100)
		d := digest.FromBytes(content)
		c := opened(t, o, content)
		other, seal := random(100), map[string]string(nil)
		if sealed {
			other, seal = content, sealOf(d)
		}
		if _, err := o.bucket.Put(t.Context(), blobKey(d), other, seal, bucket.Conditions{}); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); sealed != (err == nil) || sealed && !bytes.Equal(got, content) {
			t.Errorf("sealed %v: %v", sealed, err)
		}
	}
}
