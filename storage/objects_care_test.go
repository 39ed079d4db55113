package storage

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/storage/internal/membucket"
)

// foreign puts a blob and a link to it as distribution's registry does: without a
// seal.
func foreign(t *testing.T, b bucket.Bucket, d digest.Digest, content []byte) {
	t.Helper()
	for key, content := range map[string][]byte{blobKey(d): content, objectKey(linkPath(repositoriesRoot+"app/_layers/", d)): []byte(d)} {
		if _, err := b.Put(t.Context(), key, content, nil, bucket.Conditions{}); err != nil {
			t.Fatal(err)
		}
	}
}

func onBucket(t *testing.T, b bucket.Bucket) (*Store, Repository) {
	t.Helper()
	s, err := Open(t.Context(), Config{Root: t.TempDir(), Bucket: b})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	r, err := s.Repository("app")
	if err != nil {
		t.Fatal(err)
	}
	return s, r
}

// A bucket that distribution's registry has filled is taken over: each blob is
// hashed when it is first asked for, and believed from then on.
func TestObjectsTakeOver(t *testing.T) {
	b := new(membucket.Bucket)
	content := random(100_000)
	d := digest.FromBytes(content)
	foreign(t, b, d, content)
	s, r := onBucket(t, b)
	for range 2 {
		if err := readLayer(t.Context(), r, d); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.Stats(); n.Rehashed != 1 || n.Quarantined != 0 {
		t.Errorf("%+v", n)
	}
	if at, err := b.Stat(t.Context(), blobKey(d)); err != nil || at.Metadata[sealName] != d.String() {
		t.Errorf("not sealed: %v, %v", at.Metadata, err)
	}
}

func TestObjectsCorrupt(t *testing.T) {
	for _, sealed := range []bool{false, true} {
		b := new(membucket.Bucket)
		content := random(1000)
		d := digest.FromBytes(content)
		content[500] ^= 1
		foreign(t, b, d, content)
		s, r := onBucket(t, b)
		if sealed { // it has decayed
			if err := b.Copy(t.Context(), blobKey(d), "", blobKey(d), sealOf(d)); err != nil {
				t.Fatal(err)
			}
			if did, err := s.scrub(t.Context(), 1<<30); err != nil || did.Corrupt != 1 || !did.Finished {
				t.Fatalf("%+v, %v", did, err)
			}
		}
		if err := readLayer(t.Context(), r, d); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("sealed %v: reading it: %v", sealed, err)
		}
		damage, err := s.Damaged(t.Context())
		if err != nil || len(damage) != 1 || damage[0].Digest != d {
			t.Errorf("sealed %v: noted as damaged: %v, %v", sealed, damage, err)
		}
		if aside, _, err := readObject(t.Context(), b, quarantineDir+"/"+entryName(d)); err != nil || !bytes.Equal(aside, content) {
			t.Errorf("sealed %v: it is not to be looked at: %v", sealed, err)
		}
		// It comes again.
		content[500] ^= 1
		if err := s.medium.putBlob(t.Context(), d, content); err != nil {
			t.Fatal(err)
		}
		if err := readLayer(t.Context(), r, d); err != nil {
			t.Error(err)
		}
		if damage, err := s.Damaged(t.Context()); err != nil || len(damage) != 0 {
			t.Errorf("still damaged: %v, %v", damage, err)
		}
	}
}

// What takes the place of a blob that is hashed gets no seal for that.
func TestObjectsReplacedBeforeSeal(t *testing.T) {
	content, other := random(1000), random(1000)
	d := digest.FromBytes(content)
	for _, method := range []string{"Open", "Read", "Copy"} {
		b := new(membucket.Bucket)
		foreign(t, b, d, content)
		var replaced atomic.Bool
		b.Before = func(ctx context.Context, called, key string) error {
			if called != method || key != blobKey(d) || replaced.Swap(true) {
				return nil
			}
			_, err := b.Put(ctx, key, other, nil, bucket.Conditions{})
			return err
		}
		_, r := onBucket(t, b)
		for range 2 {
			if err := readLayer(t.Context(), r, d); err == nil && method != "Read" && method != "Copy" {
				t.Errorf("replaced at %s: it was read", method)
			}
			if at, err := b.Stat(t.Context(), blobKey(d)); err == nil && at.Metadata[sealName] != "" {
				t.Errorf("replaced at %s: it is sealed", method)
			}
		}
		if !replaced.Load() {
			t.Errorf("there was no %s", method)
		}
	}
}

// A good copy that comes while a corrupt one is set aside stays.
func TestObjectsCorruptIsReplacedMeanwhile(t *testing.T) {
	content := random(1000)
	d := digest.FromBytes(content)
	bad := bytes.Clone(content)
	bad[1] ^= 1
	for step := 0; ; step++ {
		calls, came := 0, false
		b := new(membucket.Bucket)
		o := onObjects(t, b)
		if _, err := b.Put(t.Context(), blobKey(d), bad, nil, bucket.Conditions{}); err != nil {
			t.Fatal(err)
		}
		o.waitTime = 0
		var placed error
		verifying := new(process)
		b.Before = func(ctx context.Context, method, _ string) error {
			if p, _ := ctx.Value(processKey{}).(*process); p != verifying || method == "Read" {
				return nil
			}
			if calls++; calls-1 == step {
				came = true
				if placed = o.putBlob(t.Context(), d, content); placed == nil {
					_, placed = o.requireBlob(t.Context(), d)
				}
			}
			return nil
		}
		_, err := o.verifyBlob(verifying.as(t.Context()), d)
		if !came {
			if step < 5 {
				t.Fatalf("only %d steps", step)
			}
			return
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !strings.Contains(err.Error(), "replaced") {
			t.Errorf("step %d: %v", step, err)
		}
		if placed != nil {
			continue // it was told
		}
		if got, _, err := readObject(t.Context(), b, blobKey(d)); err != nil || !bytes.Equal(got, content) {
			t.Errorf("step %d: what came meanwhile is lost: %v", step, err)
		}
	}
}

// An upload, and parts of the object store's that nobody knows of, are swept when
// they are old, and not before.
func TestObjectsSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &membucket.Bucket{MinPart: 100}
		s, _ := onBucket(t, b)
		d := s.medium.(*objects).files
		d.part = 100
		if _, err := goOn(t.Context(), d, false, random(250), false); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Begin(t.Context(), blobKey(digest.FromString("x")), nil); err != nil {
			t.Fatal(err)
		}
		count := func() (n int) {
			for range b.Uploads(t.Context(), "") {
				n++
			}
			return n
		}
		time.Sleep(6 * 24 * time.Hour)
		if _, err := s.Maintain(t.Context(), Maintenance{}); err != nil || count() != 2 {
			t.Fatalf("%d uploads in parts, %v", count(), err)
		}
		time.Sleep(2 * 24 * time.Hour)
		did, err := s.Maintain(t.Context(), Maintenance{})
		if err != nil || did.Swept.Uploads != 1 || count() != 0 {
			t.Errorf("%+v, %d uploads in parts, %v", did.Swept, count(), err)
		}
		if w, err := d.Writer(t.Context(), uploadPath, true); err != nil || w.Size() != 0 {
			t.Errorf("something is left: %v", err)
		}
	})
}

// What is asked for how often: one request for a manifest by digest, two by tag,
// when it is remembered.
func TestObjectsRequestsForAManifest(t *testing.T) {
	var requests atomic.Int64
	b := &membucket.Bucket{Before: func(_ context.Context, method, key string) error {
		if method != "Read" && strings.HasPrefix(key, "docker/") {
			requests.Add(1)
		}
		return nil
	}}
	_, r := onBucket(t, b)
	content := manifestOf("", nil, nil, "")
	d := digest.FromBytes(content)
	if err := r.PutManifest(t.Context(), d, content, "latest"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Manifest(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	requests.Store(0)
	if got, err := r.Manifest(t.Context(), d); err != nil || !bytes.Equal(got, content) || requests.Load() != 1 {
		t.Errorf("%d requests, %v", requests.Load(), err)
	}
	requests.Store(0)
	named, err := r.Tag(t.Context(), "latest")
	if err == nil {
		_, err = r.Manifest(t.Context(), named)
	}
	if err != nil || requests.Load() != 2 {
		t.Errorf("%d requests, %v", requests.Load(), err)
	}
	if err := r.DeleteManifest(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Manifest(t.Context(), d); !errors.Is(err, fs.ErrNotExist) {
		t.Error("what was deleted is served from memory")
	}
}

// What is pushed is at hand, and not read back; what is collected is read with one
// request for each manifest.
func TestObjectsReadsOfAManifest(t *testing.T) {
	var reads, looks atomic.Int64
	b := &membucket.Bucket{Before: func(_ context.Context, method, key string) error {
		if _, ok := parseBlobPath("/" + key); ok && method == "Open" {
			reads.Add(1)
		} else if ok && method == "Stat" {
			looks.Add(1)
		}
		return nil
	}}
	s, r := onBucket(t, b)
	subject := digest.FromString("subject")
	content := manifestOf(subject, nil, nil, "")
	d := digest.FromBytes(content)
	if err := r.PutManifest(t.Context(), d, content, "latest"); err != nil || reads.Load() != 0 {
		t.Errorf("%d reads, %v", reads.Load(), err)
	}
	var referrers []digest.Digest
	for desc, err := range r.Referrers(t.Context(), subject, "") {
		if err != nil {
			t.Error(err)
		}
		referrers = append(referrers, desc.Digest)
	}
	if len(referrers) != 1 || referrers[0] != d {
		t.Errorf("%s refer to the subject", referrers)
	}
	looks.Store(0)
	if _, err := s.medium.peek(t.Context(), d); err != nil || reads.Load() != 1 || looks.Load() != 0 {
		t.Errorf("%d reads and %d looks, %v", reads.Load(), looks.Load(), err)
	}
}

// A file is uploaded in parts that hold all of it, sealed.
func TestObjectsTakeFile(t *testing.T) {
	for _, n := range []int{0, 1, 100, 101, 1000, 1050} {
		b := &membucket.Bucket{MinPart: 100}
		s, r := onBucket(t, b)
		s.medium.(*objects).files.part = 100
		content := random(n)
		d := digest.FromBytes(content)
		p, err := s.OpenPartial(d, int64(n), 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if n > 0 {
			err = p.Write(0, content)
		}
		if err = errors.Join(err, p.Commit(t.Context()), p.Close()); err != nil {
			t.Fatal(err)
		}
		if err := r.LinkLayer(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		c, err := r.OpenLayer(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, content) || s.Stats().Rehashed > 0 {
			t.Errorf("%d bytes became %d, %v", n, len(got), err)
		}
		c.Close()
	}
}
