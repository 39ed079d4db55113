package cache

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// gate lets a body through up to a mark that the test moves.
type gate struct {
	mu   sync.Mutex
	cond *sync.Cond
	mark int
}

func newGate(mark int) *gate {
	g := &gate{mark: mark}
	g.cond = sync.NewCond(&g.mu)
	return g
}

func (g *gate) open(mark int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.mark = mark
	g.cond.Broadcast()
}

// serve sends body up to the mark.
func (g *gate) serve(body []byte) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		for sent := 0; sent < len(body); {
			g.mu.Lock()
			for g.mark <= sent {
				g.cond.Wait()
			}
			next := min(g.mark, len(body))
			g.mu.Unlock()
			if _, err := w.Write(body[sent:next]); err != nil {
				return true
			}
			http.NewResponseController(w).Flush()
			sent = next
		}
		return true
	}
}

// TestOneFetchForAll has many readers at random ranges join one download.
func TestOneFetchForAll(t *testing.T) {
	body := random(12<<20, 20)
	o := newOrigin(t)
	d := o.blob("app", body)
	g := newGate(1 << 20)
	o.setFront(g.serve(body))
	n := start(t, Config{Registries: upstreams(o.URL)})
	path := blobURL("app", d)

	first := make(chan reply)
	go func() { first <- n.get(path) }()
	n.await(func() bool { return o.count("GET") == 1 })
	var wg sync.WaitGroup
	rng := rand.New(rand.NewPCG(1, 2))
	for range 24 {
		from := rng.IntN(len(body))
		to := from + rng.IntN(len(body)-from)
		wg.Go(func() {
			r := n.get(path, "Range", fmt.Sprintf("bytes=%d-%d", from, to))
			if r.status != 206 || r.err != nil || !bytes.Equal(r.body, body[from:to+1]) {
				t.Errorf("range %d-%d: %d, %v", from, to, r.status, r.err)
			}
		})
	}
	for mark := 1 << 20; mark <= len(body); mark += 1 << 20 {
		g.open(mark)
		runtime.Gosched()
	}
	wg.Wait()
	n.wantBlob(<-first, body, "fwd=miss; stored")
	if got := o.count("GET " + path); got != 1 {
		t.Errorf("%d fetches", got)
	}
}

// TestParallelChunks reads as containerd does from 2.1 on: open-ended ranges,
// each closed after its chunk.
func TestParallelChunks(t *testing.T) {
	const chunk, workers = 1 << 20, 6
	body := random(17<<20+123, 21)
	o := newOrigin(t)
	d := o.blob("app", body)
	n := start(t, Config{Registries: upstreams(o.URL)})
	got := make([]byte, len(body))
	fetch := func(at int) {
		req, _ := http.NewRequest(http.MethodGet, n.url+blobURL("app", d)+"?ns="+testHost, nil)
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", at))
		resp, err := n.client.Do(req)
		if err != nil {
			t.Error(err)
			return
		}
		defer resp.Body.Close()
		part := got[at:min(at+chunk, len(got))]
		if _, err := io.ReadFull(resp.Body, part); err != nil || resp.StatusCode != http.StatusPartialContent {
			t.Errorf("at %d: %d, %v", at, resp.StatusCode, err)
		}
	}
	fetch(0)
	queue := make(chan int)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for at := range queue {
				fetch(at)
			}
		})
	}
	for at := chunk; at < len(body); at += chunk {
		queue <- at
	}
	close(queue)
	wg.Wait()
	if !bytes.Equal(got, body) {
		t.Error("wrong bytes")
	}
	n.settled()
	if got := o.count("GET"); got != 1 || !n.stored(d) {
		t.Errorf("%d fetches, stored %v", got, n.stored(d))
	}
}

// TestSlowReader checks that a reader who does not read holds up neither the
// download nor the others.
func TestSlowReader(t *testing.T) {
	body := random(32<<20, 22)
	o := newOrigin(t)
	d := o.blob("app", body)
	n := start(t, Config{Registries: upstreams(o.URL)})
	slow, err := net.Dial("tcp", strings.TrimPrefix(n.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	fmt.Fprintf(slow, "GET %s?ns=%s HTTP/1.1\r\nHost: cache\r\n\r\n", blobURL("app", d), testHost)
	n.await(func() bool { return o.count("GET") == 1 })
	r := n.get(blobURL("app", d))
	if r.err != nil || !bytes.Equal(r.body, body) {
		t.Fatalf("%d, %v", r.status, r.err)
	}
	n.settled()
	if !n.stored(d) {
		t.Error("not stored")
	}
	slow.SetReadDeadline(time.Now().Add(10 * time.Second))
	head := make([]byte, 4096)
	slow.Read(head)
	all := make([]byte, 0, len(body))
	_, rest, _ := bytes.Cut(head, []byte("\r\n\r\n"))
	all = append(all, rest...)
	more := make([]byte, len(body)-len(all))
	if _, err := io.ReadFull(slow, more); err != nil || !bytes.Equal(append(all, more...), body) {
		t.Errorf("the slow reader did not get everything in the end: %v", err)
	}
}

// TestLeavingReader checks that a download goes on without its reader, and ends
// when nobody has come back for long.
func TestLeavingReader(t *testing.T) {
	body := random(8<<20, 23)
	for _, unread := range []time.Duration{time.Minute, time.Millisecond} {
		o := newOrigin(t)
		d := o.blob("app", body)
		g := newGate(6 << 20)
		o.setFront(g.serve(body))
		timeouts := patient
		timeouts.Unread = unread
		n := start(t, Config{Registries: upstreams(o.URL), Timeouts: timeouts})
		req, _ := http.NewRequest(http.MethodGet, n.url+blobURL("app", d)+"?ns="+testHost, nil)
		resp, err := n.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		io.CopyN(io.Discard, resp.Body, 1000)
		resp.Body.Close()
		if unread == time.Millisecond {
			n.settled()
			g.open(len(body))
			if n.stored(d) {
				t.Error("the download went on although nobody reads it")
			}
			continue
		}
		g.open(len(body))
		n.settled()
		if !n.stored(d) {
			t.Error("the download did not go on")
		}
	}
}

// TestFarRangeIsPassedOn checks that a resumed pull does not wait for what it
// has already, and that a near one is served from a download.
func TestFarRangeIsPassedOn(t *testing.T) {
	body := random(farRange+8<<20, 24)
	o := newOrigin(t)
	d := o.blob("app", body)
	n := start(t, Config{Registries: upstreams(o.URL)})
	for _, rng := range []string{fmt.Sprintf("bytes=%d-", farRange+1), "bytes=-100"} {
		r := n.get(blobURL("app", d), "Range", rng)
		s, _ := parseRange(rng).of(int64(len(body)))
		if r.status != 206 || !bytes.Equal(r.body, body[s.start:s.end]) || r.cache() != "fwd=bypass; detail=far-range" {
			t.Errorf("%s: %d, %s", rng, r.status, r.cache())
		}
	}
	n.settled()
	if n.stored(d) {
		t.Error("stored")
	}
	r := n.get(blobURL("app", d), "Range", "bytes=1000-")
	if r.status != 206 || !bytes.Equal(r.body, body[1000:]) || r.cache() != "fwd=miss; stored" {
		t.Errorf("near: %d, %s", r.status, r.cache())
	}
}

// TestRestartContinues stops a cache in the middle of a download, as a crash
// would, and checks what the next one makes of it.
func TestRestartContinues(t *testing.T) {
	body := random(20<<20, 25)
	whole := random(1<<20, 26)
	for _, damage := range []string{"", "flip", "truncate", "no state", "garbage state"} {
		t.Run(damage, func(t *testing.T) {
			o := newOrigin(t)
			d, other := o.blob("app", body), o.blob("app", whole)
			g := newGate(18 << 20)
			n := start(t, Config{Registries: upstreams(o.URL)})
			n.wantBlob(n.get(blobURL("app", other)), whole, "fwd=miss; stored")
			o.setFront(g.serve(body))
			resp, err := n.client.Get(n.url + blobURL("app", d) + "?ns=" + testHost)
			if err != nil {
				t.Fatal(err)
			}
			var f *fill
			n.await(func() bool {
				n.mu.Lock()
				defer n.mu.Unlock()
				if f = n.fills[d]; f == nil {
					return false
				}
				limit, _ := f.readable(0, false)
				return limit >= 17<<20
			})
			// A copy of the directory, taken now, is what a kill leaves.
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(n.cfg.Dir)); err != nil {
				t.Fatal(err)
			}
			g.open(len(body))
			resp.Body.Close()
			n.stop()
			o.setFront(nil)
			o.forget()
			n.cfg.Dir = dir
			if damage != "" {
				damagePartial(t, (&store{dir: dir}).partialPath(d), damage)
			}
			n = n.restart()
			if n.stored(d) {
				t.Error("a part was taken for the whole")
			}
			n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
			from := parseRange(o.ranges[len(o.ranges)-1]).first
			if damage == "" && from < checkpointEvery || damage != "" && from != 0 {
				t.Errorf("continued from %d", from)
			}
			o.forget()
			n.wantBlob(n.get(blobURL("app", other)), whole, "hit")
			if len(o.asked) != 0 {
				t.Errorf("what was complete was asked for again: %q", o.asked)
			}
		})
	}
}

func damagePartial(t *testing.T, path, how string) {
	t.Helper()
	var err error
	switch how {
	case "flip":
		f, e := os.OpenFile(path, os.O_RDWR, 0)
		if e != nil {
			t.Fatal(e)
		}
		_, err = f.WriteAt([]byte{0xff, 0xfe}, 5<<20)
		f.Close()
	case "truncate":
		err = os.Truncate(path, 3<<20)
	case "no state":
		err = os.Remove(path + stateSuffix)
	case "garbage state":
		err = os.WriteFile(path+stateSuffix, []byte(`{"Offset":5,"State":"AAAA"}`), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestCrashBeforeRename finds a file that was complete but not yet in place.
func TestCrashBeforeRename(t *testing.T) {
	body := random(1<<20, 27)
	o := newOrigin(t)
	d := o.blob("app", body)
	n := start(t, Config{Registries: upstreams(o.URL)})
	n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
	n.settled()
	n.stop()
	s := n.disk.Load()
	if s != nil {
		t.Fatal("still open after Run ended")
	}
	st := &store{dir: n.cfg.Dir}
	if err := os.Rename(st.blobPath(d), st.partialPath(d)); err != nil {
		t.Fatal(err)
	}
	h := digest.SHA256.Hash()
	h.Write(body)
	p := &partial{digest: d, offset: int64(len(body)), hash: h}
	p.File, _ = os.Open(st.partialPath(d))
	p.save()
	p.Close()
	o.forget()
	n = n.restart()
	n.wantBlob(n.get(blobURL("app", d)), body, "hit")
	if len(o.asked) != 0 {
		t.Errorf("asked again: %q", o.asked)
	}
}

// TestUpstreamChangesItsMind has a partial file that is longer than what the
// upstream now has.
func TestUpstreamIgnoresRange(t *testing.T) {
	body := random(9<<20, 28)
	first, second := newOrigin(t), newOrigin(t)
	d := first.blob("app", body)
	second.blob("app", body)
	first.setFront(breaking(body, 5<<20, fin))
	second.setFront(func(w http.ResponseWriter, r *http.Request) bool {
		r.Header.Del("Range")
		return false
	})
	n := start(t, Config{Registries: upstreams(first.URL, second.URL)})
	n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
}

// TestUpstreamAnswersOtherRange must not take bytes for others.
func TestUpstreamAnswersOtherRange(t *testing.T) {
	body := random(9<<20, 29)
	for _, header := range []string{"bytes 5-9437183/9437184", "bytes 5242880-9437182/9437184", "bytes 5242880-9437183/*", "nonsense", ""} {
		first, second := newOrigin(t), newOrigin(t)
		d := first.blob("app", body)
		first.setFront(breaking(body, 5<<20, fin))
		second.setFront(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Range", header)
			w.WriteHeader(http.StatusPartialContent)
			w.Write(body[:4<<20])
			return true
		})
		n := start(t, Config{Registries: upstreams(first.URL, second.URL)})
		// The first upstream is asked for the rest again.
		n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
	}
}

// TestNeverFetchedTwice has readers arrive just when downloads end.
func TestNeverFetchedTwice(t *testing.T) {
	o := newOrigin(t)
	n := start(t, Config{Registries: upstreams(o.URL)})
	const blobs = 40
	var wg sync.WaitGroup
	for i := range blobs {
		body := random(10_000+i, byte(i))
		d := o.blob("app", body)
		for range 8 {
			wg.Go(func() {
				if r := n.get(blobURL("app", d)); r.err != nil || !bytes.Equal(r.body, body) {
					t.Errorf("%d, %v", r.status, r.err)
				}
			})
		}
	}
	wg.Wait()
	if got := o.count("GET"); got != blobs {
		t.Errorf("%d fetches of %d blobs", got, blobs)
	}
}
