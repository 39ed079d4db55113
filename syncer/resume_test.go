package syncer

import (
	"context"
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

// testChunk makes chunks of the test's small layers.
const testChunk = 300_000

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
		ChunkSize:    testChunk,
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
	var missing map[string][][2]int64 // when the last process died
	var served *ration
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		m := blobPath.FindStringSubmatch(r.URL.Path)
		if m == nil {
			return false
		}
		var first, last int64 // without a header it is one chunk, of which nothing is here
		_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last)
		mu.Lock()
		if parts, known := missing[m[1]]; known && !slices.ContainsFunc(parts, func(p [2]int64) bool { return p[0] <= first && last < p[1] }) {
			t.Errorf("%s was asked for from %d to %d, and %d is what was missing", m[1], first, last, parts)
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
		missing = missingRanges(t, root, images)
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
	if left := f.partialsLeft(t); len(left) > 0 {
		t.Errorf("left: %s", left)
	}
}

// missingRanges are, for each blob of images of which something is stored, the
// parts that are not.
func missingRanges(t *testing.T, root string, images []ggcr.Image) map[string][][2]int64 {
	t.Helper()
	store, err := storage.Open(t.Context(), storage.Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	missing := make(map[string][][2]int64)
	for _, img := range images {
		m, err := img.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		for _, desc := range append(m.Layers, m.Config) {
			d := digest.Digest(desc.Digest.String())
			if f, err := store.OpenBlob(t.Context(), d); err == nil {
				f.Close()
				missing[d.String()] = nil
				continue
			}
			if _, err := os.Stat(filepath.Join(root, "partial", "sha256-"+d.Encoded())); err != nil {
				continue
			}
			p, err := store.OpenPartial(d, desc.Size, testChunk)
			if err != nil {
				t.Fatal(err)
			}
			missing[d.String()] = [][2]int64{}
			for i := range p.Chunks() {
				if offset, length := p.Missing(i); length > 0 {
					missing[d.String()] = append(missing[d.String()], [2]int64{offset, offset + length})
				}
			}
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	return missing
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

// What an earlier process left may be wrong. It is not believed, and what nobody
// wants any more is cleared away.
func TestSyncDistrustsWhatItFinds(t *testing.T) {
	p := newTestParent(t)
	size := 200_000
	img := testImage(t, "x", testLayer(1, size))
	d := p.pushImage(t, "app:1", img)
	layer := digestOf(t, testLayer(1, size))
	content := seeded(1, size)
	for name, tt := range map[string]struct {
		left []byte
		want int // bytes that are sent
	}{
		"wrong":          {make([]byte, size/2), size/2 + size},
		"complete":       {content, 0},
		"full but wrong": {append(content[:size-1:size-1], 0), size},
		"empty":          {nil, size},
		"begun":          {content[:size/2], size / 2},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			p.reset()
			f := newFixtureAt(t, root, p, func(c *Config) { c.Repositories = exactly("app") })
			for _, begun := range []struct {
				digest digest.Digest
				bytes  []byte
			}{{layer, tt.left}, {digest.FromString("unwanted"), make([]byte, 1000)}} {
				partial, err := f.store.OpenPartial(begun.digest, int64(size), 1<<20)
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(partial.Write(0, begun.bytes), partial.Close()); err != nil {
					t.Fatal(err)
				}
			}
			f.mustSync(t)
			f.verifyHere(t, "app", d, nil)
			p.mu.Lock()
			sent := p.sent[layer.String()]
			p.mu.Unlock()
			if sent != int64(tt.want) {
				t.Errorf("%d bytes were sent, want %d", sent, tt.want)
			}
			if left := f.partialsLeft(t); len(left) > 0 {
				t.Errorf("left: %s", left)
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
	if left := f.partialsLeft(t); len(left) != 0 {
		t.Errorf("left: %s", left)
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
	defer r.close()
	desc := v1.Descriptor{Digest: digestOf(t, base), Size: 10_000}
	ensure := func(repository string) error {
		return r.fetcher.ensure(t.Context(), r.newRepository(r.origins[0], repository, repository, nil, nil), desc, priority{repository: repository})
	}
	var wg sync.WaitGroup
	var secretErr error
	wg.Go(func() { secretErr = ensure("secret") })
	for len(p.asked("/v2/secret/blobs/")) == 0 {
		time.Sleep(time.Millisecond) // until the first is in flight
	}
	wg.Go(func() {
		if err := ensure("open"); err != nil {
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

// What an earlier process left is found also when the parent was away at first.
func TestSyncResumesWhenTheParentIsBack(t *testing.T) {
	p := newTestParent(t)
	layer := testLayer(1, 200_000)
	p.pushImage(t, "app:1", testImage(t, "x", layer))
	root := t.TempDir()
	f := newFixtureAt(t, root, p, func(c *Config) { c.Repositories = exactly("app") })
	partial, err := f.store.OpenPartial(digestOf(t, layer), 200_000, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(partial.Write(0, seeded(1, 200_000)[:150_000]), partial.Close()); err != nil {
		t.Fatal(err)
	}
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
