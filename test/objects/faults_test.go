package objects

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// each runs a test against every object store, with a proxy before it.
func each(t *testing.T, test func(t *testing.T, p *proxy, b bucket.Bucket)) {
	t.Run("S3", func(t *testing.T) {
		t.Parallel()
		p := startProxy(t, startMinIO(t, MinIO{Buckets: []string{"images"}}).URL, true)
		test(t, p, open(t, minioConfig(t, &Server{URL: p.URL})))
	})
	t.Run("Azure", func(t *testing.T) {
		t.Parallel()
		p := startProxy(t, startAzurite(t).URL, true)
		test(t, p, open(t, azureConfig(t, &Server{URL: p.URL})))
	})
	t.Run("GCS", func(t *testing.T) {
		t.Parallel()
		url, _ := tokens(t)
		p := startProxy(t, startFakeGCS(t).URL, false)
		test(t, p, open(t, gcsConfig(t, &Server{URL: p.URL}, url)))
	})
}

// TestFaults goes through what may succeed at another try.
func TestFaults(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p *proxy, b bucket.Bucket) {
		const size = 6 << 20
		content := bytes.Repeat([]byte("precious"), size/8)
		n := 0
		for name, f := range map[string]fault{"reset": refuse, "lost": lose, "overloaded": overloaded, "damaged": damage} {
			n++
			key := fmt.Sprintf("object%d", n)
			do := func(what string, act func() error) {
				t.Helper()
				p.inject(2, f, writes)
				if err := act(); err != nil {
					t.Errorf("%s, %s: %v", name, what, err)
				}
				if p.faults() == 0 {
					t.Errorf("%s, %s: %v", name, what, errUnseen)
				}
			}
			var first bucket.Attributes
			do("put", func() (err error) {
				first, err = b.Put(t.Context(), key, []byte("precious 1"), map[string]string{"a": "b"}, bucket.Conditions{Absent: true})
				return err
			})
			do("replace", func() (err error) {
				_, err = b.Put(t.Context(), key, []byte("precious 2"), map[string]string{"a": "c"}, bucket.Conditions{Version: first.Version})
				return err
			})
			p.inject(0, nil, all)
			if _, err := b.Put(t.Context(), key, []byte("precious 3"), nil, bucket.Conditions{Version: first.Version}); !errors.Is(err, bucket.ErrCondition) {
				t.Errorf("%s: a put on an old version: %v", name, err)
			}
			expectObject(t, b, key, []byte("precious 2"), map[string]string{"a": "c"})

			id, err := b.Begin(t.Context(), key+"-parts", map[string]string{"a": "d"})
			if err != nil {
				t.Fatal(err)
			}
			var parts []bucket.Part
			for number := range 2 {
				do("part", func() error {
					part, err := b.Part(t.Context(), key+"-parts", id, number+1, bytes.NewReader(content), size)
					parts = append(parts, part)
					return err
				})
			}
			do("complete", func() error { return b.Complete(t.Context(), key+"-parts", id, parts, map[string]string{"a": "d"}) })
			expectObject(t, b, key+"-parts", append(bytes.Clone(content), content...), map[string]string{"a": "d"})
			do("copy", func() error { return b.Copy(t.Context(), key, "", key+"-copy", map[string]string{"a": "e"}) })
			expectObject(t, b, key+"-copy", []byte("precious 2"), map[string]string{"a": "e"})
			do("delete", func() error { return b.Delete(t.Context(), key) })
		}
		for name, f := range map[string]fault{"reset": refuse, "overloaded": overloaded, "cut": cut} {
			p.inject(2, f, reads)
			expectObject(t, b, "object1-parts", append(bytes.Clone(content), content...), map[string]string{"a": "d"})
			if p.faults() == 0 {
				t.Errorf("%s: %v", name, errUnseen)
			}
		}
		for at, err := range func() iterator { p.inject(2, overloaded, reads); return b.List(t.Context(), "", "", "") }() {
			if err != nil || at.Key == "" {
				t.Errorf("listing: %v", err)
			}
		}
		cutForGood(t, p, b)
		swallowed(t, p, b)
	})
}

type iterator = func(yield func(bucket.Attributes, error) bool)

// cutForGood reads from what breaks off again and again: no end that is none.
func cutForGood(t *testing.T, p *proxy, b bucket.Bucket) {
	body, at, err := b.Open(t.Context(), "object1-parts", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	// What follows is refused; this answer is on its way, and is broken off below.
	p.inject(1000, refuse, reads)
	if _, err := io.CopyN(io.Discard, body, 10); err != nil {
		t.Fatal(err)
	}
	p.inject(1, cut, reads)
	short, _, err := b.Open(t.Context(), "object1-parts", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer short.Close()
	p.inject(1000, refuse, reads)
	n, err := io.Copy(io.Discard, short)
	if err == nil || n >= at.Size {
		t.Errorf("%d of %d bytes were read, and the error is %v", n, at.Size, err)
	} else {
		t.Log(err)
	}
	p.inject(0, nil, all)
}

// swallowed asks one that never answers.
func swallowed(t *testing.T, p *proxy, b bucket.Bucket) {
	p.inject(1000, swallow, all)
	defer p.inject(0, nil, all)
	start := time.Now()
	_, err := b.Stat(t.Context(), "object1")
	if err == nil || time.Since(start) > patience {
		t.Errorf("after %v: %v", time.Since(start), err)
	} else {
		t.Log(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := b.Put(ctx, "object1", nil, nil, bucket.Conditions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with its context over: %v", err)
	}
}

func expectObject(t *testing.T, b bucket.Bucket, key string, content []byte, metadata map[string]string) {
	t.Helper()
	body, at, err := b.Open(t.Context(), key, 0, -1)
	if err != nil {
		t.Error(err)
		return
	}
	defer body.Close()
	got, err := io.ReadAll(body)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("%s: %d bytes, want %d; they differ: %v; %v", key, len(got), len(content), !bytes.Equal(got, content), err)
	}
	if fmt.Sprint(at.Metadata) != fmt.Sprint(metadata) {
		t.Errorf("%s: metadata %v, want %v", key, at.Metadata, metadata)
	}
}
