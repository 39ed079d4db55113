package cache

import (
	"bytes"
	"errors"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/storage"
	"github.com/opencontainers/go-digest"
)

func testStore(t testing.TB, maxSize, minFree int64) *store {
	t.Helper()
	m, err := newMetrics(nil, func() (int64, int) { return 0, 0 })
	if err != nil {
		t.Fatal(err)
	}
	s, err := newStore(t.TempDir(), maxSize, minFree, quiet(), m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	return s
}

func putBlob(t testing.TB, s *store, body []byte) digest.Digest {
	t.Helper()
	d := digest.FromBytes(body)
	if err := s.put(d, body); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestEvictsLeastRecentlyUsed(t *testing.T) {
	s := testStore(t, 1000, 0)
	var ds []digest.Digest
	for i := range 10 {
		ds = append(ds, putBlob(t, s, random(100, byte(i))))
	}
	b, err := s.open(t.Context(), ds[0], time.Second)
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	putBlob(t, s, random(150, 99)) // takes 1 and 2, as 0 was just used
	for i, d := range ds {
		if got, want := s.has(d), i != 1 && i != 2; got != want {
			t.Errorf("blob %d there: %v, want %v", i, got, want)
		}
	}
	if bytes, blobs := s.usage(); bytes != 950 || blobs != 9 {
		t.Errorf("usage %d bytes, %d blobs", bytes, blobs)
	}
	if s.reserved != 0 || s.pending.Load() != 0 {
		t.Errorf("reserved %d, pending %d", s.reserved, s.pending.Load())
	}
}

func TestNeverEvictsWhatIsRead(t *testing.T) {
	s := testStore(t, 1000, 0)
	old := putBlob(t, s, random(600, 1))
	b, err := s.open(t.Context(), old, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	err = s.put(digest.FromBytes(random(500, 2)), random(500, 2))
	if !errors.Is(err, errNoSpace) || !s.has(old) {
		t.Errorf("while it is read: %v, there %v", err, s.has(old))
	}
	b.Close()
	putBlob(t, s, random(500, 2))
	if s.has(old) {
		t.Error("still there")
	}
}

func TestTooLargeEvictsNothing(t *testing.T) {
	s := testStore(t, 1000, 0)
	d := putBlob(t, s, random(600, 1))
	if err := s.put(digest.FromString("x"), make([]byte, 1001)); !errors.Is(err, errNoSpace) {
		t.Errorf("error %v", err)
	}
	if !s.has(d) {
		t.Error("evicted in vain")
	}
}

func TestKeepsDiskFree(t *testing.T) {
	s := testStore(t, 0, 1000)
	free := int64(math.MaxInt64)
	s.free = func() (int64, error) { return free, nil }
	a, b := putBlob(t, s, random(300, 1)), putBlob(t, s, random(300, 2))
	free = 1100
	c := putBlob(t, s, random(200, 3)) // 100 short: the oldest goes
	if s.has(a) || !s.has(b) || !s.has(c) {
		t.Errorf("there: %v %v %v", s.has(a), s.has(b), s.has(c))
	}
	free = 900 // somebody else fills the disk
	s.trim()
	if s.has(b) || !s.has(c) {
		t.Errorf("there: %v %v", s.has(b), s.has(c))
	}
}

// TestOrderOfUseSurvives checks recency across a restart.
func TestOrderOfUseSurvives(t *testing.T) {
	s := testStore(t, 0, 0)
	a, b, c := putBlob(t, s, random(10, 1)), putBlob(t, s, random(10, 2)), putBlob(t, s, random(10, 3))
	now := time.Now()
	for d, age := range map[digest.Digest]time.Duration{a: 3 * time.Hour, b: 2 * time.Hour, c: 4 * time.Hour} {
		if err := os.Chtimes(s.blobPath(d), now.Add(-age), time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	load := func() *store {
		s2, err := newStore(s.dir, 0, 0, quiet(), s.metrics)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s2.close)
		if err := s2.scan(t.Context()); err != nil {
			t.Fatal(err)
		}
		return s2
	}
	order := func(s *store) (ds []digest.Digest) {
		for e := s.oldest.next; e != &s.oldest; e = e.next {
			ds = append(ds, e.digest)
		}
		return ds
	}
	s2 := load()
	if got := order(s2); len(got) != 3 || got[0] != c || got[1] != a || got[2] != b {
		t.Errorf("order %v, want %v", got, []digest.Digest{c, a, b})
	}
	blob, err := s2.open(t.Context(), c, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	blob.Close()
	if got := order(load()); got[2] != c {
		t.Errorf("a use was not remembered: %v", got)
	}
	fi, _ := os.Stat(s2.blobPath(c))
	if !storage.Sealed(fi, c) {
		t.Error("recording the use broke the seal")
	}
}

// TestForeignFiles checks that what is not the cache's is neither used nor
// removed nor counted.
func TestForeignFiles(t *testing.T) {
	s := testStore(t, 0, 0)
	d := putBlob(t, s, random(10, 1))
	hex := digest.FromString("x").Encoded()
	for _, path := range []string{
		"blobs/README", "blobs/sha256/note", "blobs/sha256/ab/short", "blobs/md5/ab/abcd",
		"blobs/sha256/zz/" + hex, "partial/note", "other/file",
	} {
		path = filepath.Join(s.dir, path)
		os.MkdirAll(filepath.Dir(path), 0o700)
		if err := os.WriteFile(path, []byte("foreign"), 0o600); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if _, err := os.Stat(path); err != nil {
				t.Errorf("%s is gone", path)
			}
		}()
	}
	if err := os.MkdirAll(s.blobPath(digest.FromString("directory")), 0o700); err != nil {
		t.Fatal(err)
	}
	s2, err := newStore(s.dir, 1, 0, quiet(), s.metrics)
	if err != nil {
		t.Fatal(err)
	}
	defer s2.close()
	if err := errors.Join(s2.recover(t.Context()), s2.scan(t.Context())); err != nil {
		t.Fatal(err)
	}
	if bytes, blobs := s2.usage(); bytes != 10 || blobs != 1 {
		t.Errorf("usage %d bytes, %d blobs", bytes, blobs)
	}
	s2.trim()
	if s2.has(d) {
		t.Error("not trimmed")
	}
}

// TestFlippedByte changes one stored byte behind the cache's back.
func TestFlippedByte(t *testing.T) {
	for _, size := range []int{1, 5000, 9 << 20} {
		for _, kind := range []string{"blob", "manifest"} {
			t.Run(kind+"/"+strconv.Itoa(size), func(t *testing.T) {
				o := newOrigin(t)
				body := random(size, 40)
				path := blobURL("app", o.blob("app", body))
				if kind == "manifest" {
					body = []byte(testManifest(digest.FromBytes(body)))
					path = manifestURL("app", o.manifest("app", "", string(body)).String())
				}
				d := digest.FromBytes(body)
				n := start(t, Config{Registries: upstreams(o.URL)})
				n.get(path)
				n.settled()
				n = n.restart() // or a manifest would come from memory
				o.forget()
				flip(t, n.disk.Load().store.blobPath(d), len(body)/2)
				r := n.get(path)
				if r.status != 200 || !bytes.Equal(r.body, body) || r.cache() != "fwd=miss; stored" {
					t.Errorf("%d, right %v, %s", r.status, bytes.Equal(r.body, body), r.cache())
				}
				n.settled()
				if got := o.count("GET"); got != 1 {
					t.Errorf("fetched %d times", got)
				}
				if r := n.get(path); r.cache() != "hit" || !bytes.Equal(r.body, body) {
					t.Errorf("afterwards: %s", r.cache())
				}
			})
		}
	}
}

func flip(t *testing.T, path string, at int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], int64(at)); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b[:], int64(at)); err != nil {
		t.Fatal(err)
	}
}

// TestFlippedByteWhileOffline must rather serve nothing.
func TestFlippedByteWhileOffline(t *testing.T) {
	o := newOrigin(t)
	body := random(5000, 41)
	path := blobURL("app", o.blob("app", body))
	n := start(t, Config{Registries: upstreams(o.URL)})
	n.wantBlob(n.get(path), body, "fwd=miss; stored")
	n.settled()
	o.Close()
	flip(t, n.disk.Load().store.blobPath(digest.FromBytes(body)), 77)
	n.wantRefused(n.get(path), 502, "fwd=miss; detail=unreachable")
}

// TestUnsealedIsVerified checks that right content without a seal, as after a
// restored backup, is hashed once and then trusted.
func TestUnsealedIsVerified(t *testing.T) {
	o := newOrigin(t)
	body := random(5000, 42)
	d := o.blob("app", body)
	n := start(t, Config{Registries: upstreams(o.URL)})
	n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
	n.settled()
	file := n.disk.Load().store.blobPath(d)
	if err := os.Chtimes(file, time.Now(), time.Now()); err != nil {
		t.Fatal(err)
	}
	n.wantBlob(n.get(blobURL("app", d)), body, "hit")
	if fi, err := os.Stat(file); err != nil || !storage.Sealed(fi, d) {
		t.Errorf("not sealed again: %v", err)
	}
}

// TestDecay changes a stored byte without a trace, as a medium does. The first
// reader cannot be saved; when it asks again, it must be.
func TestDecay(t *testing.T) {
	o := newOrigin(t)
	body := random(9<<20, 47)
	d := o.blob("app", body)
	n := start(t, Config{Registries: upstreams(o.URL)})
	n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
	n.settled()
	n = n.restart()
	path := n.disk.Load().store.blobPath(d)
	flip(t, path, 12345)
	if err := os.Chtimes(path, time.Time{}, storage.SealTime(d)); err != nil {
		t.Fatal(err)
	}
	if r := n.get(blobURL("app", d)); bytes.Equal(r.body, body) {
		t.Fatal("the byte was not flipped")
	}
	n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
	n.settled()
	o.forget()
	for range 3 {
		n.wantBlob(n.get(blobURL("app", d)), body, "hit")
	}
	if len(o.asked) != 0 {
		t.Errorf("asked %q", o.asked)
	}
}

// TestLongVerificationIsNotWaitedFor checks that a blob that takes long to hash
// is refused meanwhile, and there in the end.
func TestLongVerificationIsNotWaitedFor(t *testing.T) {
	s := testStore(t, 0, 0)
	d := putBlob(t, s, random(32<<20, 50))
	if err := os.Chtimes(s.blobPath(d), time.Now(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.open(t.Context(), d, 0); !errors.Is(err, errBusy) {
		t.Errorf("error %v", err)
	}
	b, err := s.open(t.Context(), d, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
}

// TestOneWriter has a manifest and a download of the same content, which must
// not write to one file.
func TestOneWriter(t *testing.T) {
	s := testStore(t, 0, 0)
	body := random(fillChunk, 48)
	d := digest.FromBytes(body)
	p, err := s.create(d, int64(len(body)), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.create(d, int64(len(body)), 0); !errors.Is(err, errWriting) {
		t.Errorf("a second writer: %v", err)
	}
	if err := s.put(d, body); err != nil {
		t.Errorf("put: %v", err)
	}
	p.Write(body)
	if err := p.commit(func(rename func() error) error { return rename() }); err != nil {
		t.Error(err)
	}
	b, err := s.open(t.Context(), d, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	if len(s.writing) != 0 || s.reserved != 0 || s.pending.Load() != 0 {
		t.Errorf("left: %d writers, %d reserved, %d pending", len(s.writing), s.reserved, s.pending.Load())
	}
}

// TestRunErrors checks that what is wrong with the directory is named.
func TestRunErrors(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n := start(t, Config{Dir: filepath.Join(dir, "taken"), Registries: upstreams("http://127.0.0.1:1")})
	for want, dir := range map[string]string{
		"not a directory":             file,
		"another process is using it": n.cfg.Dir,
	} {
		c, err := New(Config{Dir: dir, Registries: upstreams("http://127.0.0.1:1"), Logger: quiet()})
		if err != nil {
			t.Fatal(err)
		}
		err = c.Run(t.Context())
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) || strings.Contains(err.Error(), "\n") {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

// TestRemovedBehindOurBack fetches again what somebody deleted.
func TestRemovedBehindOurBack(t *testing.T) {
	o := newOrigin(t)
	body := random(5000, 43)
	d := o.blob("app", body)
	n := start(t, Config{Registries: upstreams(o.URL)})
	n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
	n.settled()
	if err := os.RemoveAll(filepath.Join(n.cfg.Dir, "blobs")); err != nil {
		t.Fatal(err)
	}
	n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
	n.settled()
	if bytes, blobs := n.disk.Load().store.usage(); bytes != 5000 || blobs != 1 {
		t.Errorf("usage %d bytes, %d blobs", bytes, blobs)
	}
}

// TestDiskFull checks that a store without room becomes a pass-through, which
// still verifies.
func TestDiskFull(t *testing.T) {
	for _, size := range []int{0, 1000, 9 << 20} {
		o := newOrigin(t)
		body := random(size, 44)
		d := o.blob("app", body)
		n := start(t, Config{Registries: upstreams(o.URL), MinFreeDisk: 1 << 60})
		for range 2 {
			n.wantBlob(n.get(blobURL("app", d)), body, "fwd=bypass; detail=no-space")
		}
		if size > 0 {
			if r := n.get(blobURL("app", d), "Range", "bytes=7-"); r.status != 206 || !bytes.Equal(r.body, body[7:]) {
				t.Errorf("range: %d", r.status)
			}
			if r := n.get(blobURL("app", d), "Range", "bytes="+strconv.Itoa(size)+"-"); r.status != 416 {
				t.Errorf("range: %d", r.status)
			}
			wrong := bytes.Clone(body)
			wrong[size-1]++
			o.mu.Lock()
			o.blobs["app/"+d.String()] = wrong
			o.mu.Unlock()
			if r := n.get(blobURL("app", d)); r.err == nil {
				t.Error("wrong bytes ended well")
			}
			n.wantRefused(n.get(blobURL("app", d)), 502, "fwd=miss; detail=bad-content")
		}
		m := testManifest(d)
		md := o.manifest("app", "v1", m)
		if r := n.get(manifestURL("app", "v1")); r.status != 200 || string(r.body) != m {
			t.Errorf("manifest: %d", r.status)
		}
		n.settled()
		if n.stored(d) || n.stored(md) {
			t.Error("stored")
		}
	}
}

func TestStoreReportsMissing(t *testing.T) {
	s := testStore(t, 0, 0)
	if _, err := s.open(t.Context(), digest.FromString("x"), time.Second); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}
