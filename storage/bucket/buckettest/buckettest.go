// Package buckettest holds what says it is a bucket.Bucket to what one promises.
// It is for tests alone and imports storage/bucket and nothing else of this
// module.
package buckettest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// Run tests an empty bucket. except names the tests that an emulator of an object
// store fails where the real one would not; the caller says why.
func Run(t *testing.T, b bucket.Bucket, except ...string) {
	tests := []struct {
		name string
		run  func(*testing.T, bucket.Bucket)
	}{
		{"RoundTrip", roundTrip},
		{"Ranges", ranges},
		{"Absence", absence},
		{"Conditions", conditions},
		{"OneWins", oneWins},
		{"CompareAndSwap", compareAndSwap},
		{"Keys", keys},
		{"List", list},
		{"Pages", pages},
		{"Copy", copies},
		{"CopyOfVersion", copyOfVersion},
		{"Upload", uploads},
		{"UploadsOfOneKey", uploadsOfOneKey},
		{"UnknownUpload", unknownUpload},
		{"Unfinished", unfinished},
		{"Sections", sections},
		{"Cancelled", cancelled},
		{"Check", check},
	}
	for _, test := range tests {
		if !slices.Contains(except, test.name) {
			t.Run(test.name, func(t *testing.T) { test.run(t, b) })
		}
	}
}

// dir is what the keys of a test begin with.
func dir(t *testing.T) string { return strings.ReplaceAll(t.Name(), "/", "-") + "/" }

func put(t *testing.T, b bucket.Bucket, key, content string, metadata map[string]string) bucket.Attributes {
	t.Helper()
	at, err := b.Put(t.Context(), key, []byte(content), metadata, bucket.Conditions{})
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// read reads all of an object, and expects no error.
func read(t *testing.T, b bucket.Bucket, key string) (string, bucket.Attributes) {
	t.Helper()
	return readRange(t, b, key, 0, -1)
}

func readRange(t *testing.T, b bucket.Bucket, key string, offset, length int64) (string, bucket.Attributes) {
	t.Helper()
	body, at, err := b.Open(t.Context(), key, offset, length)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := body.Read(nil); n != 0 || err != nil && !errors.Is(err, io.EOF) {
		t.Fatalf("no room for a byte was filled with %d: %v", n, err)
	}
	content, err := io.ReadAll(body)
	if err := errors.Join(err, body.Close()); err != nil {
		t.Fatal(err)
	}
	return string(content), at
}

func expect(t *testing.T, want, got any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("-want +got:\n%s", diff)
	}
}

// wants expects an error.
func wants(t *testing.T, want, got error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Fatalf("the error is %v, want %v", got, want)
	}
}

func roundTrip(t *testing.T, b bucket.Bucket) {
	for content, metadata := range map[string]map[string]string{
		"":      {},
		"hello": {"digest": "sha256:2cf24dba5fb0a30e", "other": "a value, with spaces = and signs"},
	} {
		key := dir(t) + "object" + strconv.Itoa(len(content))
		before := time.Now()
		stored := put(t, b, key, content, metadata)
		got, opened := read(t, b, key)
		expect(t, content, got)
		if len(metadata) > 0 || len(opened.Metadata) > 0 {
			expect(t, metadata, opened.Metadata)
		}
		at, err := b.Stat(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		expect(t, opened, at)
		expect(t, bucket.Attributes{Key: key, Size: int64(len(content)), Version: at.Version}, bucket.Attributes{Key: stored.Key, Size: stored.Size, Version: stored.Version, Metadata: stored.Metadata})
		for _, when := range []time.Time{stored.Modified, at.Modified} {
			if when.Before(before.Add(-time.Hour)) || when.After(time.Now().Add(time.Hour)) {
				t.Errorf("modified at %v, put after %v", when, before)
			}
		}
		if changed := put(t, b, key, content+"!", nil); changed.Version == at.Version || changed.Version == "" {
			t.Errorf("version %q stayed when the contents changed", at.Version)
		}
		if got, at := read(t, b, key); got != content+"!" || len(at.Metadata) != 0 {
			t.Errorf("read %q with %v after it was replaced", got, at.Metadata)
		}
	}
}

func ranges(t *testing.T, b bucket.Bucket) {
	put(t, b, dir(t)+"ten", "0123456789", nil)
	put(t, b, dir(t)+"none", "", nil)
	for _, test := range []struct {
		key            string
		offset, length int64
		want           string
	}{
		{"ten", 0, -1, "0123456789"}, {"ten", 0, 10, "0123456789"}, {"ten", 0, 100, "0123456789"}, {"ten", 0, 1, "0"}, {"ten", 0, 0, ""},
		{"ten", 3, -1, "3456789"}, {"ten", 3, 4, "3456"}, {"ten", 9, 1, "9"}, {"ten", 9, 5, "9"}, {"ten", 5, 0, ""},
		{"ten", 10, -1, ""}, {"ten", 10, 1, ""}, {"ten", 11, -1, ""}, {"ten", 1000, 5, ""},
		{"none", 0, -1, ""}, {"none", 0, 0, ""}, {"none", 0, 5, ""}, {"none", 1, -1, ""},
	} {
		got, at := readRange(t, b, dir(t)+test.key, test.offset, test.length)
		if got != test.want || at.Size != int64(len(map[string]string{"ten": "0123456789"}[test.key])) || at.Version == "" {
			t.Errorf("%s from %d on, %d bytes: %q of %d, want %q", test.key, test.offset, test.length, got, at.Size, test.want)
		}
	}
	if _, _, err := b.Open(t.Context(), dir(t)+"ten", -1, 5); err == nil {
		t.Error("a negative offset is no error")
	}
}

func absence(t *testing.T, b bucket.Bucket) {
	key := dir(t) + "none"
	_, _, err := b.Open(t.Context(), key, 0, -1)
	wants(t, fs.ErrNotExist, err)
	_, _, err = b.Open(t.Context(), key, 5, 0)
	wants(t, fs.ErrNotExist, err)
	_, err = b.Stat(t.Context(), key)
	wants(t, fs.ErrNotExist, err)
	wants(t, fs.ErrNotExist, b.Copy(t.Context(), key, "", key+"2", nil))
	for range 2 {
		wants(t, nil, b.Delete(t.Context(), key))
	}
	put(t, b, key, "there", nil)
	wants(t, nil, b.Delete(t.Context(), key))
	_, err = b.Stat(t.Context(), key)
	wants(t, fs.ErrNotExist, err)
}

func conditions(t *testing.T, b bucket.Bucket) {
	key := dir(t) + "object"
	try := func(content string, when bucket.Conditions) (bucket.Attributes, error) {
		return b.Put(t.Context(), key, []byte(content), map[string]string{"name": content}, when)
	}
	_, err := try("none", bucket.Conditions{Version: `"0123456789abcdef0123456789abcdef"`})
	wants(t, bucket.ErrCondition, err)
	first, err := try("first", bucket.Conditions{Absent: true})
	wants(t, nil, err)
	_, err = try("again", bucket.Conditions{Absent: true})
	wants(t, bucket.ErrCondition, err)
	second, err := try("second", bucket.Conditions{Version: first.Version})
	wants(t, nil, err)
	_, err = try("late", bucket.Conditions{Version: first.Version})
	wants(t, bucket.ErrCondition, err)
	got, at := read(t, b, key)
	expect(t, "second", got)
	expect(t, map[string]string{"name": "second"}, at.Metadata)
	expect(t, second.Version, at.Version)
	wants(t, nil, b.Delete(t.Context(), key))
	_, err = try("gone", bucket.Conditions{Version: second.Version})
	wants(t, bucket.ErrCondition, err)
	_, err = b.Stat(t.Context(), key)
	wants(t, fs.ErrNotExist, err)
}

// oneWins puts one object from many sides at once.
func oneWins(t *testing.T, b bucket.Bucket) {
	for round := range 5 {
		key := dir(t) + strconv.Itoa(round)
		var (
			wg     sync.WaitGroup
			winner atomic.Int64
		)
		for i := range 16 {
			wg.Go(func() {
				_, err := b.Put(t.Context(), key, []byte(strconv.Itoa(i+1)), nil, bucket.Conditions{Absent: true})
				switch {
				case err == nil && !winner.CompareAndSwap(0, int64(i+1)):
					t.Error("two have won")
				case err != nil && !errors.Is(err, bucket.ErrCondition):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		got, _ := read(t, b, key)
		expect(t, strconv.FormatInt(winner.Load(), 10), got)
	}
}

// compareAndSwap counts from many sides at once.
func compareAndSwap(t *testing.T, b bucket.Bucket) {
	const sides, each = 6, 5
	key := dir(t) + "counter"
	put(t, b, key, "0", nil)
	var wg sync.WaitGroup
	for range sides {
		wg.Go(func() {
			for done := 0; done < each && !t.Failed(); {
				body, at, err := b.Open(t.Context(), key, 0, -1)
				if err != nil {
					t.Error(err)
					return
				}
				content, err := io.ReadAll(body)
				body.Close()
				if err != nil {
					t.Error(err)
					return
				}
				n, err := strconv.Atoi(string(content))
				if err == nil {
					_, err = b.Put(t.Context(), key, []byte(strconv.Itoa(n+1)), nil, bucket.Conditions{Version: at.Version})
				}
				switch {
				case err == nil:
					done++
				case !errors.Is(err, bucket.ErrCondition):
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	got, _ := read(t, b, key)
	expect(t, strconv.Itoa(sides*each), got)
}

func keys(t *testing.T, b bucket.Bucket) {
	for _, name := range []string{
		"docker/registry/v2/repositories/a/b/_manifests/revisions/sha256/0f/link", "a+b=c@d", "with space", "dots..and~tilde", "%2F-100%", "größe", "q?x=1&y#z", "it's (here)!*,:;$",
	} {
		key := dir(t) + name
		put(t, b, key, name, map[string]string{"a": "b"})
		got, at := read(t, b, key)
		expect(t, name, got)
		expect(t, key, at.Key)
		wants(t, nil, b.Copy(t.Context(), key, "", key+"-copy", nil))
		got, _ = read(t, b, key+"-copy")
		expect(t, name, got)
		expect(t, []string{key, key + "-copy"}, listed(t, b, key, "", ""))
		wants(t, nil, b.Delete(t.Context(), key+"-copy"))
		expect(t, []string{key}, listed(t, b, key, "", ""))
	}
}

// listed are the keys of a listing, which must be in order.
func listed(t *testing.T, b bucket.Bucket, prefix, after, delimiter string) []string {
	t.Helper()
	var found []string
	for at, err := range b.List(t.Context(), prefix, after, delimiter) {
		if err != nil {
			t.Fatal(err)
		}
		if at.Metadata != nil || (at.Version == "") != strings.HasSuffix(at.Key, "/") {
			t.Errorf("listed %+v", at)
		}
		found = append(found, at.Key)
	}
	if !slices.IsSorted(found) {
		t.Fatalf("not in order: %q", found)
	}
	return found
}

func list(t *testing.T, b bucket.Bucket) {
	d := dir(t)
	want := map[string]bucket.Attributes{}
	for _, name := range []string{"a-b", "a.b", "a/1", "a/2/x", "a0", "b/1", "b/2", "c/d/e/f", "c0", "C"} {
		want[d+name] = put(t, b, d+name, "content of "+name, map[string]string{"name": "value"})
	}
	for _, test := range []struct {
		prefix, after, delimiter string
		want                     []string
	}{
		{"", "", "", []string{"C", "a-b", "a.b", "a/1", "a/2/x", "a0", "b/1", "b/2", "c/d/e/f", "c0"}},
		{"", "", "/", []string{"C", "a-b", "a.b", "a/", "a0", "b/", "c/", "c0"}},
		{"a", "", "", []string{"a-b", "a.b", "a/1", "a/2/x", "a0"}},
		{"a", "", "/", []string{"a-b", "a.b", "a/", "a0"}},
		{"a/", "", "/", []string{"a/1", "a/2/"}},
		{"b/", "", "", []string{"b/1", "b/2"}},
		{"c/d", "", "/", []string{"c/d/"}},
		{"none", "", "", nil},
		{"", "a/1", "", []string{"a/2/x", "a0", "b/1", "b/2", "c/d/e/f", "c0"}},
		{"", "a/15", "", []string{"a/2/x", "a0", "b/1", "b/2", "c/d/e/f", "c0"}},
		{"", "a/2", "", []string{"a/2/x", "a0", "b/1", "b/2", "c/d/e/f", "c0"}},
		{"b/", "b/1", "", []string{"b/2"}},
		{"b/", "a", "", []string{"b/1", "b/2"}},
		{"b/", "b/2", "", nil},
		{"b/", "c", "", nil},
		{"", "a/", "/", []string{"a0", "b/", "c/", "c0"}},
		{"", "a.b", "/", []string{"a/", "a0", "b/", "c/", "c0"}},
		{"", "a/1", "/", []string{"a0", "b/", "c/", "c0"}},
		{"", "c", "/", []string{"c/", "c0"}},
		{"a/", "a/1", "/", []string{"a/2/"}},
	} {
		after := test.after
		if after != "" {
			after = d + after
		}
		var names []string
		for _, key := range listed(t, b, d+test.prefix, after, test.delimiter) {
			names = append(names, strings.TrimPrefix(key, d))
		}
		if diff := cmp.Diff(test.want, names); diff != "" {
			t.Errorf("list %q after %q by %q: -want +got:\n%s", test.prefix, test.after, test.delimiter, diff)
		}
	}
	for at, err := range b.List(t.Context(), d, "", "") {
		if err != nil {
			t.Fatal(err)
		}
		expect(t, want[at.Key].Version, at.Version)
		expect(t, want[at.Key].Size, at.Size)
		if at.Modified.IsZero() {
			t.Errorf("%s has no time in the listing", at.Key)
		}
	}
	for _, err := range b.List(t.Context(), d, "", "") {
		wants(t, nil, err)
		break // and nothing bad comes of it
	}
}

// pages lists more than any object store lists at once.
func pages(t *testing.T, b bucket.Bucket) {
	const each = 401
	d := dir(t)
	group, ctx := errgroup.WithContext(t.Context())
	group.SetLimit(16)
	var want []string
	for i := range 3 * each {
		key := fmt.Sprintf("%s%d/%04d", d, i/each, i)
		want = append(want, key)
		group.Go(func() error {
			_, err := b.Put(ctx, key, []byte("x"), nil, bucket.Conditions{})
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	expect(t, want, listed(t, b, d, "", ""))
	expect(t, want[1100:], listed(t, b, d, want[1099], ""))
	expect(t, []string{d + "0/", d + "1/", d + "2/"}, listed(t, b, d, "", "/"))
}

func check(t *testing.T, b bucket.Bucket) {
	before := listed(t, b, "", "", "")
	wants(t, nil, bucket.Check(t.Context(), b))
	expect(t, before, listed(t, b, "", "", ""))
}

func random(size int, seed byte) []byte {
	return bytes.Repeat([]byte{seed, seed + 1, seed * 7, seed ^ 0x55}, (size+3)/4)[:size]
}
