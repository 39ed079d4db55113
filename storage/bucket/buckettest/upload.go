package buckettest

import (
	"bytes"
	"context"
	"io"
	"io/fs"
	"slices"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

const partSize = 5 << 20

func copies(t *testing.T, b bucket.Bucket) {
	from, to := dir(t)+"from", dir(t)+"to"
	put(t, b, from, "content", map[string]string{"old": "1"})
	put(t, b, to, "replaced", map[string]string{"older": "2"})
	wants(t, nil, b.Copy(t.Context(), from, "", to, map[string]string{"new": "3"}))
	got, at := read(t, b, to)
	expect(t, "content", got)
	expect(t, map[string]string{"new": "3"}, at.Metadata)
	got, at = read(t, b, from)
	expect(t, "content", got)
	expect(t, map[string]string{"old": "1"}, at.Metadata)

	wants(t, nil, b.Copy(t.Context(), from, "", from, map[string]string{"digest": "x"}))
	got, at = read(t, b, from)
	expect(t, "content", got)
	expect(t, map[string]string{"digest": "x"}, at.Metadata)

	large := random(2*partSize+12345, 9)
	upload(t, b, dir(t)+"large", large, map[string]string{"old": "1"})
	wants(t, nil, b.Copy(t.Context(), dir(t)+"large", "", dir(t)+"large2", map[string]string{"new": "2"}))
	wants(t, nil, b.Copy(t.Context(), dir(t)+"large", "", dir(t)+"large", map[string]string{"new": "2"}))
	for _, name := range []string{"large", "large2"} {
		got, at := read(t, b, dir(t)+name)
		if got != string(large) {
			t.Errorf("the copy %s of %d bytes differs: %d bytes", name, len(large), len(got))
		}
		expect(t, map[string]string{"new": "2"}, at.Metadata)
	}
	noScratch(t, b)
}

// copyOfVersion copies what was seen, and nothing that has taken its place.
func copyOfVersion(t *testing.T, b bucket.Bucket) {
	for name, store := range map[string]func(key string, seed byte){
		"small": func(key string, seed byte) { put(t, b, key, string(random(100, seed)), nil) },
		"large": func(key string, seed byte) { upload(t, b, key, random(partSize+2<<20, seed), nil) },
	} {
		from, to := dir(t)+name, dir(t)+name+"-copy"
		seal := map[string]string{"digest": name}
		store(from, 1)
		_, first := read(t, b, from)
		store(from, 2)
		content, second := read(t, b, from)
		wants(t, bucket.ErrCondition, b.Copy(t.Context(), from, first.Version, to, seal))
		wants(t, bucket.ErrCondition, b.Copy(t.Context(), from, first.Version, from, seal))
		_, err := b.Stat(t.Context(), to)
		wants(t, fs.ErrNotExist, err)
		got, at := read(t, b, from)
		if got != content || len(at.Metadata) > 0 {
			t.Fatalf("%s: a copy that was refused has changed it: %d bytes, %v", name, len(got), at.Metadata)
		}
		wants(t, nil, b.Copy(t.Context(), from, second.Version, to, seal))
		wants(t, nil, b.Copy(t.Context(), from, second.Version, from, seal))
		for _, key := range []string{from, to} {
			got, at := read(t, b, key)
			if got != content {
				t.Errorf("%s: the copy differs: %d bytes", key, len(got))
			}
			expect(t, seal, at.Metadata)
		}
		wants(t, nil, b.Delete(t.Context(), from))
		wants(t, bucket.ErrCondition, b.Copy(t.Context(), from, second.Version, to+"2", seal))
	}
	noScratch(t, b)
}

// upload uploads content in parts.
func upload(t *testing.T, b bucket.Bucket, key string, content []byte, metadata map[string]string) {
	t.Helper()
	id, err := b.Begin(t.Context(), key, metadata)
	wants(t, nil, err)
	var parts []bucket.Part
	for chunk := range slices.Chunk(content, partSize) {
		parts = append(parts, part(t, b, key, id, len(parts)+1, chunk))
	}
	wants(t, nil, b.Complete(t.Context(), key, id, parts, metadata))
}

func part(t *testing.T, b bucket.Bucket, key, id string, number int, content []byte) bucket.Part {
	t.Helper()
	p, err := b.Part(t.Context(), key, id, number, bytes.NewReader(content), int64(len(content)))
	wants(t, nil, err)
	expect(t, bucket.Part{Number: number, Size: int64(len(content)), Tag: p.Tag}, p)
	return p
}

func uploads(t *testing.T, b bucket.Bucket) {
	key := dir(t) + "object"
	metadata := map[string]string{"digest": "sha256:1234"}
	id, err := b.Begin(t.Context(), key, metadata)
	wants(t, nil, err)
	last := part(t, b, key, id, 3, random(777, 3))
	part(t, b, key, id, 1, random(partSize, 99))
	second := part(t, b, key, id, 2, random(partSize, 2))
	first := part(t, b, key, id, 1, random(partSize, 1)) // anew
	_, err = b.Stat(t.Context(), key)
	wants(t, fs.ErrNotExist, err)
	expect(t, []string(nil), listed(t, b, dir(t), "", ""))
	wants(t, nil, b.Complete(t.Context(), key, id, []bucket.Part{first, second, last}, metadata))
	got, at := read(t, b, key)
	want := slices.Concat(random(partSize, 1), random(partSize, 2), random(777, 3))
	if got != string(want) {
		t.Fatalf("%d bytes differ from the %d that were uploaded", len(got), len(want))
	}
	expect(t, bucket.Attributes{Key: key, Size: int64(len(want)), Modified: at.Modified, Version: at.Version, Metadata: metadata}, at)
	if got, _ := readRange(t, b, key, partSize-2, 4); got != string(want[partSize-2:partSize+2]) {
		t.Errorf("a range over the joint is %x", got)
	}

	// Parts that another replaces do not get into what was meant.
	id, err = b.Begin(t.Context(), key+"2", nil)
	wants(t, nil, err)
	mine := part(t, b, key+"2", id, 1, random(777, 5))
	part(t, b, key+"2", id, 1, random(777, 6))
	if err := b.Complete(t.Context(), key+"2", id, []bucket.Part{mine}, nil); err == nil {
		if got, _ := read(t, b, key+"2"); got != string(random(777, 5)) {
			t.Error("it was put together with another's part")
		}
	}
	wants(t, nil, b.Abort(t.Context(), key+"2", id))

	upload(t, b, key+"1", []byte("short"), nil)
	if got, _ := read(t, b, key+"1"); got != "short" {
		t.Errorf("an upload of one part is %q", got)
	}
	// One that stands is replaced.
	upload(t, b, key+"1", []byte("shorter"), nil)
	if got, _ := read(t, b, key+"1"); got != "shorter" {
		t.Errorf("an upload over an object is %q", got)
	}
	noScratch(t, b)
}

// noScratch expects that nothing is listed but what was put.
func noScratch(t *testing.T, b bucket.Bucket) {
	t.Helper()
	for u, err := range b.Uploads(t.Context(), dir(t)) {
		if err != nil {
			t.Fatal(err)
		}
		t.Errorf("left over: %+v", u)
	}
}

// uploadsOfOneKey lets two be at it, and a Put, as two replicas are.
func uploadsOfOneKey(t *testing.T, b bucket.Bucket) {
	key := dir(t) + "object"
	one, err := b.Begin(t.Context(), key, nil)
	wants(t, nil, err)
	two, err := b.Begin(t.Context(), key, nil)
	wants(t, nil, err)
	if one == two {
		t.Fatalf("both uploads are %q", one)
	}
	a1, b1 := part(t, b, key, one, 1, random(partSize, 1)), part(t, b, key, two, 1, random(partSize, 11))
	a2, b2 := part(t, b, key, one, 2, []byte("end of one")), part(t, b, key, two, 2, []byte("end of two"))
	put(t, b, key, "put", nil)
	wants(t, nil, b.Complete(t.Context(), key, two, []bucket.Part{b1, b2}, nil))
	if got, _ := read(t, b, key); got != string(random(partSize, 11))+"end of two" {
		t.Errorf("the second upload has %d bytes", len(got))
	}
	wants(t, nil, b.Complete(t.Context(), key, one, []bucket.Part{a1, a2}, nil))
	if got, _ := read(t, b, key); got != string(random(partSize, 1))+"end of one" {
		t.Errorf("the first upload has %d bytes", len(got))
	}
}

func unknownUpload(t *testing.T, b bucket.Bucket) {
	key := dir(t) + "object"
	id, err := b.Begin(t.Context(), key, nil)
	wants(t, nil, err)
	p := part(t, b, key, id, 1, []byte("part"))
	for range 2 {
		wants(t, nil, b.Abort(t.Context(), key, id))
	}
	wants(t, fs.ErrNotExist, b.Complete(t.Context(), key, id, []bucket.Part{p}, nil))
	_, err = b.Stat(t.Context(), key)
	wants(t, fs.ErrNotExist, err)
	noScratch(t, b)
}

func unfinished(t *testing.T, b bucket.Bucket) {
	key := dir(t) + "deep/object"
	id, err := b.Begin(t.Context(), key, map[string]string{"a": "b"})
	wants(t, nil, err)
	part(t, b, key, id, 1, []byte("part"))
	list := func(prefix string) (found []bucket.Unfinished) {
		for u, err := range b.Uploads(t.Context(), prefix) {
			if err != nil {
				t.Fatal(err)
			}
			if age := time.Since(u.Begun); age < -time.Hour || age > time.Hour {
				t.Errorf("begun %v ago", age)
			}
			u.Begun = time.Time{}
			found = append(found, u)
		}
		return found
	}
	want := []bucket.Unfinished{{Key: key, Upload: id}}
	expect(t, want, list(key)) // some stores tell only by the whole key
	wants(t, nil, b.Abort(t.Context(), key, id))
	expect(t, []bucket.Unfinished(nil), list(key))
}

// sections uploads from the midst of a reader.
func sections(t *testing.T, b bucket.Bucket) {
	key := dir(t) + "object"
	id, err := b.Begin(t.Context(), key, nil)
	wants(t, nil, err)
	r := bytes.NewReader([]byte("before|wanted|after"))
	if _, err := r.Seek(7, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	p, err := b.Part(t.Context(), key, id, 1, r, 6)
	wants(t, nil, err)
	if _, err := b.Part(t.Context(), key, id, 2, bytes.NewReader([]byte("short")), 6); err == nil {
		t.Error("a part that is shorter than said is no error")
	}
	wants(t, nil, b.Complete(t.Context(), key, id, []bucket.Part{p}, nil))
	got, _ := read(t, b, key)
	expect(t, "wanted", got)
}

func cancelled(t *testing.T, b bucket.Bucket) {
	key := dir(t) + "object"
	content := random(8<<20, 4)
	upload(t, b, key, content, nil)
	ctx, cancel := context.WithCancel(t.Context())
	body, _, err := b.Open(ctx, key, 0, -1)
	wants(t, nil, err)
	if _, err := io.ReadFull(body, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	cancel()
	_, err = io.Copy(io.Discard, body)
	wants(t, context.Canceled, err)
	body.Close()

	_, _, err = b.Open(ctx, key, 0, -1)
	wants(t, context.Canceled, err)
	_, err = b.Stat(ctx, key)
	wants(t, context.Canceled, err)
	_, err = b.Put(ctx, key, nil, nil, bucket.Conditions{})
	wants(t, context.Canceled, err)
	wants(t, context.Canceled, b.Delete(ctx, key))
	wants(t, context.Canceled, b.Copy(ctx, key, "", key+"2", nil))
	_, err = b.Begin(ctx, key, nil)
	wants(t, context.Canceled, err)
	for _, err := range b.List(ctx, "", "", "") {
		wants(t, context.Canceled, err)
	}
	if got, _ := read(t, b, key); got != string(content) {
		t.Error("something was done nevertheless")
	}
}
