package syncer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/distribution/distribution/v3/registry/storage/driver"
	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

// syncChild is a process that synchronises once. Its arguments come in the
// environment: the parent's host, the data directory, the repositories, and a
// bound on the size of files, which stands for a full disk.
func syncChild() int {
	ctx := context.Background()
	if limit := os.Getenv("SYNCER_TEST_FILE_SIZE"); limit != "" {
		var n uint64
		if _, err := fmt.Sscan(limit, &n); err != nil {
			panic(err)
		}
		signal.Ignore(syscall.SIGXFSZ) // so that writing fails with EFBIG
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: n, Max: n}); err != nil {
			panic(err)
		}
	}
	store, err := storage.Open(ctx, storage.Config{Root: os.Getenv("SYNCER_TEST_ROOT")})
	if err != nil {
		panic(err)
	}
	s, err := New(Config{
		Store:        store.Namespace(),
		Driver:       store.Driver(),
		Parent:       Parent{Endpoint: os.Getenv("SYNCER_TEST_PARENT"), Insecure: true},
		Repositories: exactly(strings.Fields(os.Getenv("SYNCER_TEST_REPOSITORIES"))...),
		Referrers:    true,
	})
	if err != nil {
		panic(err)
	}
	s.limits.backoff = time.Millisecond
	_, err = s.Sync(ctx, v1alpha1.SyncTriggerInitial)
	if err := errors.Join(err, store.Close()); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func startChild(t *testing.T, p *testParent, root, repositories string, env ...string) (*exec.Cmd, *strings.Builder) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), append([]string{
		childVariable + "=1",
		"SYNCER_TEST_PARENT=" + p.host,
		"SYNCER_TEST_ROOT=" + root,
		"SYNCER_TEST_REPOSITORIES=" + repositories,
	}, env...)...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, &out
}

// A process is killed in the middle, again and again, once so many more bytes
// have been sent to it. What reached the disk is never asked for again, and
// nobody ever sees an image that is not whole.
func TestSyncKilled(t *testing.T) {
	p := newTestParent(t)
	var images []ggcr.Image
	base := testLayer(1, 3_000_000)
	for i := range 6 {
		img := testImage(t, fmt.Sprint(i), base, testLayer(uint64(10+i), 1_000_000), testLayer(uint64(20+i), 200_000))
		images = append(images, img)
		p.pushImage(t, fmt.Sprintf("app%d:1", i%2), img)
		p.pushImage(t, fmt.Sprintf("app%d:v%d", i%2, i), img)
	}
	root := t.TempDir()
	var mu sync.Mutex
	onDisk := make(map[string]int64) // bytes of blobs when the last process died
	var served *ration
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		m := blobPath.FindStringSubmatch(r.URL.Path)
		if m == nil {
			return false
		}
		var offset int64
		_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &offset)
		mu.Lock()
		if offset < onDisk[m[1]] {
			t.Errorf("%s was asked for from %d, and %d bytes of it were here", m[1], offset, onDisk[m[1]])
		}
		ration := served
		mu.Unlock()
		// Bytes come in small pieces, so that a kill meets many blobs in flight.
		paced := &pacedWriter{ResponseWriter: w, piece: 32 << 10, pause: time.Millisecond}
		p.handler.ServeHTTP(&rationedWriter{paced, r.Context(), ration}, r)
		return true
	})
	const kills = 8
	for kill := range kills {
		ration := newRation(1_000_000)
		mu.Lock()
		served = ration
		mu.Unlock()
		cmd, out := startChild(t, p, root, "app0 app1")
		ended := make(chan struct{})
		go func() {
			_ = cmd.Wait()
			close(ended)
		}()
		select {
		case <-ration.spent:
		case <-ended:
			t.Fatalf("child %d ended: %s", kill, out)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		<-ended
		if out.Len() > 0 {
			t.Fatalf("child %d said: %s", kill, out)
		}
		assertWhole(t, root, p, images)
		mu.Lock()
		onDisk = bytesOnDisk(t, root, images)
		mu.Unlock()
	}
	mu.Lock()
	served = newRation(1 << 40)
	mu.Unlock()
	cmd, out := startChild(t, p, root, "app0 app1")
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	f := newFixtureAt(t, root, p, func(c *Config) { c.Repositories = exactly("app0", "app1") })
	for i, img := range images {
		if got := f.tagDigest(t, fmt.Sprintf("app%d", i%2), fmt.Sprintf("v%d", i)); got != digestOf(t, img) {
			t.Errorf("image %d is %q", i, got)
		}
		f.verifyHere(t, fmt.Sprintf("app%d", i%2), digestOf(t, img), nil)
	}
	for _, repository := range []string{"app0", "app1"} {
		if left := f.uploadsLeft(t, repository); len(left) > 0 {
			t.Errorf("uploads left: %s", left)
		}
	}
}

// bytesOnDisk is how much of each blob of images is stored, whole or in part.
func bytesOnDisk(t *testing.T, root string, images []ggcr.Image) map[string]int64 {
	t.Helper()
	sizes := make(map[string]int64)
	for _, img := range images {
		m, err := img.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		for _, desc := range append(m.Layers, m.Config) {
			d := digest.Digest(desc.Digest.String())
			for _, path := range []string{
				filepath.Join("docker/registry/v2/blobs/sha256", d.Encoded()[:2], d.Encoded(), "data"),
				filepath.Join(uploads("app0"), uploadID(d), "data"),
				filepath.Join(uploads("app1"), uploadID(d), "data"),
			} {
				if fi, err := os.Stat(filepath.Join(root, path)); err == nil {
					sizes[d.String()] = max(sizes[d.String()], fi.Size())
				}
			}
		}
	}
	return sizes
}

// ration is how many bytes a parent sends to a process before it sends nothing
// more.
type ration struct {
	left  atomic.Int64
	once  sync.Once
	spent chan struct{} // closed when none is left
}

func newRation(bytes int64) *ration {
	r := &ration{spent: make(chan struct{})}
	r.left.Store(bytes)
	return r
}

// rationedWriter waits for the client to go when its ration is spent.
type rationedWriter struct {
	*pacedWriter
	ctx    context.Context // of the request
	ration *ration
}

func (w *rationedWriter) Write(b []byte) (n int, err error) {
	for chunk := range slices.Chunk(b, w.piece) {
		if w.ration.left.Add(-int64(len(chunk))) < 0 {
			w.ration.once.Do(func() { close(w.ration.spent) })
			<-w.ctx.Done()
			return n, context.Cause(w.ctx)
		}
		m, err := w.pacedWriter.Write(chunk)
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// pacedWriter sends in small pieces with pauses between.
type pacedWriter struct {
	http.ResponseWriter
	piece int
	pause time.Duration
}

func (w *pacedWriter) Write(b []byte) (n int, err error) {
	for chunk := range slices.Chunk(b, w.piece) {
		m, err := w.ResponseWriter.Write(chunk)
		n += m
		if err != nil {
			return n, err
		}
		_ = http.NewResponseController(w.ResponseWriter).Flush()
		time.Sleep(w.pause) // the point of this writer
	}
	return n, nil
}

// assertWhole checks that every tag which is there stands for an image that is
// there with all its bytes.
func assertWhole(t *testing.T, root string, p *testParent, images []ggcr.Image) {
	t.Helper()
	f := newFixtureAt(t, root, p, func(*Config) {})
	for i, img := range images {
		repository, tag := fmt.Sprintf("app%d", i%2), fmt.Sprintf("v%d", i)
		if d := f.tagDigest(t, repository, tag); d == digestOf(t, img) {
			f.verifyHere(t, repository, d, nil)
		} else if d != "" {
			t.Errorf("%s:%s is %s", repository, tag, d)
		}
	}
}

// A connection that breaks off again and again costs nothing twice.
func TestSyncOverBrokenConnections(t *testing.T) {
	p := newTestParent(t)
	img := testImage(t, "x", testLayer(1, 5_000_000), testLayer(2, 3_000_000))
	d := p.pushImage(t, "app:1", img)
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			p.abortAfter(700_000)(w, r)
			return true
		}
		return false
	})
	f := newFixture(t, p, exactly("app")...)
	f.limits.attempts = 2
	f.mustSync(t)
	f.verifyHere(t, "app", d, nil)
	if unique := uniqueBytes(t, img); p.bytesSent() > unique*102/100 {
		t.Errorf("%d bytes were sent for %d", p.bytesSent(), unique)
	}
}

// A parent that does not do ranges makes it expensive, not wrong.
func TestSyncWithoutRanges(t *testing.T) {
	for name, status := range map[string]int{"ignored": 0, "refused": http.StatusRequestedRangeNotSatisfiable} {
		t.Run(name, func(t *testing.T) {
			p := newTestParent(t)
			d := p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 300_000)))
			var broken atomic.Bool
			p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/blobs/") {
					return false
				}
				if r.Header.Get("Range") != "" && status != 0 {
					w.WriteHeader(status)
					return true
				}
				r.Header.Del("Range")
				if broken.CompareAndSwap(false, true) {
					p.abortAfter(100_000)(w, r)
					return true
				}
				return false
			})
			f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
				c.Repositories = exactly("app")
				c.Concurrency = 1
			})
			f.mustSync(t)
			f.verifyHere(t, "app", d, nil)
		})
	}
}

// What an earlier process left may be wrong, or too long. It is not believed.
func TestSyncDistrustsWhatItFinds(t *testing.T) {
	p := newTestParent(t)
	size := 200_000
	img := testImage(t, "x", testLayer(1, size))
	d := p.pushImage(t, "app:1", img)
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	id := uploadID(digestOf(t, layers[0]))
	for name, left := range map[string][]byte{
		"wrong":          make([]byte, size/2),
		"complete":       seeded(1, size),
		"full but wrong": append(seeded(1, size-1), 0),
		"too long":       append(seeded(1, size), 0),
		"empty":          {},
		"begun":          seeded(1, size)[:size/2],
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			dir := filepath.Join(root, uploads("other"), id)
			if err := os.MkdirAll(filepath.Join(dir, "hashstates", "sha256"), 0o777); err != nil {
				t.Fatal(err)
			}
			// A saved state of the hash that vouches for the wrong bytes.
			for file, content := range map[string][]byte{
				"data":      left,
				"startedat": []byte("2026-01-31T12:00:00Z"),
				fmt.Sprintf("hashstates/sha256/%d", len(left)): []byte("nonsense"),
			} {
				if err := os.WriteFile(filepath.Join(dir, file), content, 0o666); err != nil {
					t.Fatal(err)
				}
			}
			stale := filepath.Join(root, uploads("app"), uploadID("sha256:"+"00"))
			client := filepath.Join(root, uploads("app"), "0b1c7f3e-5a0a-4b52-9c1d-2f1f6f0c9a11")
			for _, dir := range []string{stale, client} {
				if err := os.MkdirAll(dir, 0o777); err != nil {
					t.Fatal(err)
				}
			}
			p.reset()
			f := newFixtureAt(t, root, p, func(c *Config) { c.Repositories = exactly("app", "other") })
			p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == "/v2/other/tags/list" {
					_ = json.NewEncoder(w).Encode(map[string]any{"tags": []string{}})
					return true
				}
				return false
			})
			f.mustSync(t)
			f.verifyHere(t, "app", d, nil)
			p.mu.Lock()
			sent := p.sent[digestOf(t, layers[0]).String()]
			p.mu.Unlock()
			want := map[string]int64{"complete": 0, "begun": int64(size / 2), "wrong": int64(size/2 + size)}[name]
			if _, ok := map[string]bool{"complete": true, "begun": true, "wrong": true}[name]; !ok {
				want = int64(size)
			}
			if sent != want {
				t.Errorf("%d bytes were sent, want %d", sent, want)
			}
			if left := f.uploadsLeft(t, "app"); len(left) != 1 || filepath.Base(left[0]) != filepath.Base(client) {
				t.Errorf("uploads left: %s; want the client's own alone", left)
			}
			if left := f.uploadsLeft(t, "other"); len(left) != 0 {
				t.Errorf("uploads left: %s", left)
			}
		})
	}
}

// On a full disk nothing that is stored is lost, what cannot be completed gives
// its space back, and the error says so.
func TestSyncFullDisk(t *testing.T) {
	p := newTestParent(t)
	small := testImage(t, "small", testLayer(1, 50_000))
	large := testImage(t, "large", testLayer(2, 900_000))
	p.pushImage(t, "small:1", small)
	p.pushImage(t, "large:1", large)
	root := t.TempDir()
	cmd, out := startChild(t, p, root, "large small", "SYNCER_TEST_FILE_SIZE=300000")
	layer := digestOf(t, testLayer(2, 900_000))
	want := "large:1: storing large@" + layer.String() + " in " + root + ": file too large: free space on the volume of the data directory, or choose another with --data\n"
	if err := cmd.Wait(); err == nil || out.String() != want {
		t.Errorf("%v: %s\nwant %s", err, out, want)
	}
	f := newFixtureAt(t, root, p, func(c *Config) { c.Repositories = exactly("large", "small") })
	if f.tagDigest(t, "small", "1") != digestOf(t, small) || f.tagDigest(t, "large", "1") != "" {
		t.Error("wrong tags here")
	}
	if left := f.uploadsLeft(t, "large"); len(left) != 0 {
		t.Errorf("uploads left: %s", left)
	}
	p.reset()
	f.mustSync(t)
	f.verifyHere(t, "large", digestOf(t, large), nil)
	if p.bytesSent() >= uniqueBytes(t, large, small) {
		t.Errorf("%d bytes were sent again", p.bytesSent())
	}
}

// However the storage reports a full disk, it is one line with a remedy and
// without the names of files that come and go.
func TestWritingNamesTheRemedy(t *testing.T) {
	file := func(errno syscall.Errno) error {
		return &fs.PathError{Op: "write", Path: "/data/docker/registry/v2/blobs/x.tmp", Err: errno}
	}
	gone := driver.PathNotFoundError{Path: "/docker/registry/v2/blobs/x.tmp", DriverName: "filesystem"}
	remedy := ": free space on the volume of the data directory, or choose another with --data"
	for want, err := range map[string]error{
		"storing a in /data: no space left on device" + remedy: file(syscall.ENOSPC),
		"storing a in /data: disk quota exceeded" + remedy:     errors.Join(file(syscall.EDQUOT), gone),
		"storing a in /data: file too large" + remedy:          fmt.Errorf("wrapped: %w", driver.Error{DriverName: "filesystem", Detail: errors.Join(file(syscall.EFBIG), gone)}),
		"storing a: no space left on device" + remedy:          syscall.ENOSPC,
		"storing a: input/output error":                        syscall.EIO,
	} {
		if got := writing("storing a", err); got.Error() != want {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
}

// Many images that share a layer wait for one transfer of it, and so do
// repositories.
func TestEnsureSharesFlights(t *testing.T) {
	p := newTestParent(t)
	base := testLayer(1, 500_000)
	var names []string
	for i := range 12 {
		name := fmt.Sprintf("app%d", i)
		p.pushImage(t, name+":1", testImage(t, name, base))
		names = append(names, name)
	}
	var inFlight, most atomic.Int64
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		n := inFlight.Add(1)
		defer inFlight.Add(-1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		p.handler.ServeHTTP(&pacedWriter{ResponseWriter: w, piece: 100_000, pause: time.Millisecond}, r)
		return true
	})
	f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Repositories = exactly(names...)
		c.Concurrency = 3
	})
	f.mustSync(t)
	d := digestOf(t, base)
	if got := p.asked("/blobs/" + d.String()); len(got) != 1 {
		t.Errorf("the layer was asked for: %s", got)
	}
	if most.Load() > 3 {
		t.Errorf("%d blobs at once", most.Load())
	}
}

// A blob that one repository's readers may not have can be had through another.
func TestEnsureTriesOtherRepositories(t *testing.T) {
	p := newTestParent(t)
	base := testLayer(1, 10_000)
	p.pushImage(t, "secret:1", testImage(t, "s", base))
	open := testImage(t, "o", base)
	p.pushImage(t, "open:1", open)
	blocked := make(chan struct{})
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/v2/secret/blobs/") {
			<-blocked
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		return false
	})
	f := newFixture(t, p)
	r := f.newRun()
	defer r.parent.close()
	desc := v1.Descriptor{Digest: digestOf(t, base), Size: 10_000}
	var wg sync.WaitGroup
	var secretErr error
	wg.Go(func() { secretErr = r.fetcher.ensure(t.Context(), "secret", desc) })
	for len(p.asked("/v2/secret/blobs/")) == 0 {
		time.Sleep(time.Millisecond) // until the first is in flight
	}
	wg.Go(func() {
		if err := r.fetcher.ensure(t.Context(), "open", desc); err != nil {
			t.Error(err)
		}
	})
	close(blocked)
	wg.Wait()
	if secretErr == nil {
		t.Error("no error for the repository that may not have it")
	}
	if err := f.read(t.Context(), "open", desc.Digest); err != nil {
		t.Error(err)
	}
}

// A blob with wrong bytes at the parent is not fetched again every minute.
func TestDistrust(t *testing.T) {
	d := newDistrust()
	now := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	err := errors.New("wrong")
	if d.check("sha256:a", now) != nil {
		t.Error("distrusted at first")
	}
	for _, wait := range []time.Duration{time.Minute, 2 * time.Minute, 4 * time.Minute, 8 * time.Minute, 16 * time.Minute, 32 * time.Minute, time.Hour, time.Hour} {
		d.add("sha256:a", err, now)
		if got := d.check("sha256:a", now.Add(wait-time.Second)); !errors.Is(got, err) {
			t.Errorf("after %s: %v", wait, got)
		}
		now = now.Add(wait)
		if d.check("sha256:a", now) != nil {
			t.Errorf("still distrusted after %s", wait)
		}
	}
	d.add("sha256:a", err, now)
	if got := d.check("sha256:a", now); got == nil || !strings.Contains(got.Error(), "wrong; it is asked again at 2026-01-31T1") {
		t.Error(got)
	}
	d.clear()
	if d.check("sha256:a", now) != nil {
		t.Error("still distrusted")
	}
}

func TestSyncWrongBlobIsPutOff(t *testing.T) { synctest.Test(t, testSyncWrongBlobIsPutOff) }

func testSyncWrongBlobIsPutOff(t *testing.T) {
	p := newTimedParent(t)
	p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 100_000)))
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			_, _ = w.Write(make([]byte, 100_000))
			return true
		}
		return false
	})
	f := newFixture(t, p, exactly("app")...)
	for range 3 {
		if _, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule); err == nil {
			t.Fatal("no error")
		}
	}
	layer := digestOf(t, testLayer(1, 100_000))
	if got := p.asked("/blobs/" + layer.String()); len(got) != 1 {
		t.Errorf("asked %d times", len(got))
	}
	p.setFault(nil)
	f.mustSync(t) // by hand: at once
}

func TestUploadID(t *testing.T) {
	id := uploadID("sha256:" + "ab")
	if !isUploadID(id) || id != uploadID("sha256:ab") || id == uploadID("sha256:ac") {
		t.Error(id)
	}
	for _, other := range []string{"", "0b1c7f3e-5a0a-4b52-9c1d-2f1f6f0c9a11", "current"} {
		if isUploadID(other) {
			t.Errorf("%s is taken for ours", other)
		}
	}
}

// What an earlier process left is found also when the parent was away at first.
func TestSyncResumesWhenTheParentIsBack(t *testing.T) {
	p := newTestParent(t)
	layer := testLayer(1, 200_000)
	p.pushImage(t, "app:1", testImage(t, "x", layer))
	root := t.TempDir()
	dir := filepath.Join(root, uploads("app"), uploadID(digestOf(t, layer)))
	if err := os.MkdirAll(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "data"), seeded(1, 200_000)[:150_000], 0o666); err != nil {
		t.Fatal(err)
	}
	f := newFixtureAt(t, root, p, func(c *Config) { c.Repositories = exactly("app") })
	p.setFault(func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) })
	f.limits.attempts = 1
	if _, err := f.Sync(t.Context(), v1alpha1.SyncTriggerInitial); err == nil {
		t.Fatal("no error")
	}
	p.setFault(nil)
	f.mustSync(t)
	if p.bytesSent() > 51_000 {
		t.Errorf("%d bytes were sent", p.bytesSent())
	}
}
