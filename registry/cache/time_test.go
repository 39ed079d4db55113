package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// The tests in this file run on synctest's clock over a network in memory: they
// check what is waited for to the millisecond, with the default timeouts, and
// take no time themselves.

// network connects by name. Nobody who dials a name that is not served gets an
// answer, as when packets are lost.
type network struct {
	mu    sync.Mutex
	names map[string]chan net.Conn
}

type memoryAddr string

func (a memoryAddr) Network() string { return "memory" }
func (a memoryAddr) String() string  { return string(a) }

type memoryListener struct {
	addr   memoryAddr
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *memoryListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *memoryListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *memoryListener) Addr() net.Addr { return l.addr }

func (n *network) listen(name string) net.Listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := &memoryListener{addr: memoryAddr(name), conns: make(chan net.Conn), closed: make(chan struct{})}
	n.names[name] = l.conns
	return l
}

func (n *network) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	n.mu.Lock()
	to := n.names[addr]
	n.mu.Unlock()
	ours, theirs := net.Pipe()
	select {
	case to <- theirs:
		return ours, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// serve runs an origin under name until the test ends.
func (n *network) serve(t *testing.T, name string) *origin {
	o := &origin{manifests: map[string][]byte{}, blobs: map[string][]byte{}, tags: map[string]digest.Digest{}}
	srv := &http.Server{Handler: o, ErrorLog: log.New(io.Discard, "", 0)}
	l := n.listen(name)
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return o
}

// run starts a cache whose upstreams are the names, with the default timeouts.
func (n *network) run(t *testing.T, names ...string) *node {
	t.Helper()
	var urls []string
	for _, name := range names {
		urls = append(urls, "http://"+name)
	}
	return n.runWith(t, Config{Registries: upstreams(urls...)})
}

func (n *network) runWith(t *testing.T, cfg Config) *node {
	t.Helper()
	cfg.Dir, cfg.Logger, cfg.Listener = t.TempDir(), quiet(), n.listen("cache:80")
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, up := range slices.Concat((*c.registries.Load())[testHost].upstreams...) {
		up.transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, c.cfg.Timeouts.Dial)
			defer cancel()
			if addr == hostPort(up.base) && up.name != up.base.Host {
				addr = up.name // an endpoint
			}
			return n.dial(ctx, network, addr)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	nd := &node{Cache: c, t: t, cfg: cfg, url: "http://cache:80"}
	transport := &http.Transport{DialContext: n.dial, DisableCompression: true}
	nd.client = &http.Client{Transport: transport}
	nd.stop = sync.OnceFunc(func() {
		transport.CloseIdleConnections()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(nd.stop)
	synctest.Wait()
	return nd
}

// bubble runs f with a network, once for each name.
func bubble(t *testing.T, name string, f func(t *testing.T, n *network)) {
	t.Run(name, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f(t, &network{names: map[string]chan net.Conn{}})
		})
	})
}

// stallAt serves body up to at, and then nothing more.
func stallAt(body []byte, at int) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet {
			return false
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.Write(body[:at])
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
		return true
	}
}

// pause sleeps for d, unless the request ends before.
func pause(r *http.Request, d time.Duration) {
	select {
	case <-r.Context().Done():
	case <-time.After(d):
	}
}

func hang(_ http.ResponseWriter, r *http.Request) bool {
	<-r.Context().Done()
	return true
}

// TestNoWaitOverTwoSeconds checks what the cache adds to a pull when its only
// upstream does not answer, or not fast enough.
func TestNoWaitOverTwoSeconds(t *testing.T) {
	small, large := random(1<<20, 100), random(9<<20, 101)
	for _, tt := range []struct {
		name string
		up   func(t *testing.T, n *network)
		wait time.Duration
	}{
		{"connection not answered", func(*testing.T, *network) {}, time.Second},
		{"connection not accepted from the backlog", func(t *testing.T, n *network) {
			l := n.listen("up:80")
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					t.Cleanup(func() { c.Close() })
				}
			}()
			t.Cleanup(func() { l.Close() })
		}, 1800 * time.Millisecond},
		{"headers not sent", func(t *testing.T, n *network) { n.serve(t, "up:80").setFront(hang) }, 1800 * time.Millisecond},
		{"small body stalls", func(t *testing.T, n *network) { n.serve(t, "up:80").setFront(stallAt(small, 1000)) }, 1500 * time.Millisecond},
		{"large body stalls at once", func(t *testing.T, n *network) { n.serve(t, "up:80").setFront(stallAt(large, 0)) }, 1500 * time.Millisecond},
		{"body trickles", func(t *testing.T, n *network) {
			n.serve(t, "up:80").setFront(func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodGet {
					return false
				}
				w.Header().Set("Content-Length", strconv.Itoa(len(small)))
				for i := range small {
					if _, err := w.Write(small[i : i+1]); err != nil {
						return true
					}
					http.NewResponseController(w).Flush()
					pause(r, 50*time.Millisecond)
				}
				return true
			})
		}, 1500 * time.Millisecond},
	} {
		for _, kind := range []string{"blob", "manifest", "tag"} {
			bubble(t, tt.name+"/"+kind, func(t *testing.T, net *network) {
				tt.up(t, net)
				n := net.run(t, "up:80")
				d := digest.FromBytes(small)
				path := map[string]string{"blob": blobURL("app", d), "manifest": manifestURL("app", d.String()), "tag": manifestURL("app", "v1")}[kind]
				r := n.get(path)
				if r.status == http.StatusNotFound && kind == "tag" {
					return // HEAD is answered by these; there is no such tag
				}
				if r.status != http.StatusBadGateway || r.took != tt.wait {
					t.Errorf("%d after %s, want 502 after %s", r.status, r.took, tt.wait)
				}
			})
		}
	}
}

// TestSilenceCostsOnce checks that whoever pulls waits once for an upstream that
// does not answer, however long that lasts, and that it is noticed when it does.
func TestSilenceCostsOnce(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		n := net.run(t, "up:80")
		var total time.Duration
		asked := 0
		ask := func() reply {
			asked++
			r := n.get(blobURL("app", digest.FromString(strconv.Itoa(asked))))
			total += r.took
			return r
		}
		for range 300 {
			if r := ask(); r.status != http.StatusBadGateway {
				t.Fatalf("status %d", r.status)
			}
			time.Sleep(time.Second)
		}
		if total != time.Second {
			t.Errorf("%d requests waited %s", asked, total)
		}
		body := random(1000, 102)
		d := net.serve(t, "up:80").blob("app", body)
		time.Sleep(mostAgain + time.Second) // the last attempt may have just begun
		n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
	})
}

// TestSilenceIsForgotten checks that an upstream is not asked for ever on behalf
// of nobody, and gets another chance then.
func TestSilenceIsForgotten(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		o := net.serve(t, "up:80")
		o.setFront(hang)
		n := net.run(t, "up:80")
		n.get(blobURL("app", digest.FromString("")))
		time.Sleep(silenceMemory + mostAgain)
		o.forget()
		time.Sleep(time.Hour)
		if got := o.count(""); got != 0 {
			t.Errorf("it was asked %d times", got)
		}
		if !n.Doubts() {
			t.Error("it is trusted without an answer")
		}
		if r := n.get(blobURL("app", digest.FromString(""))); r.took != 1800*time.Millisecond {
			t.Errorf("a request waited %s", r.took)
		}
		o.setFront(nil)
		time.Sleep(mostAgain)
		if n.Doubts() {
			t.Error("it is doubted although it answers")
		}
	})
}

// TestManySilences checks that an upstream which is silent on many matters can
// still be found to be silent on everything.
func TestManySilences(t *testing.T) {
	var s silences
	begun := 0
	for i := range 2 * maxSilences {
		if _, ok := s.begin(matter{digest: digest.FromString(strconv.Itoa(i))}, nil); ok {
			begun++
		}
	}
	if begun != maxSilences {
		t.Errorf("silent on %d matters, want %d", begun, maxSilences)
	}
	if _, ok := s.begin(matter{}, nil); !ok {
		t.Error("it is waited for on everything else")
	}
}

// TestSilenceEndsAllWaits has requests begin one after the other while the
// upstream does not answer: when the first one has waited in vain, none does.
func TestSilenceEndsAllWaits(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		n := net.run(t, "up:80")
		began := time.Now()
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				if r := n.get(blobURL("app", digest.FromString(strconv.Itoa(i)))); r.status != http.StatusBadGateway {
					t.Errorf("status %d", r.status)
				}
			})
			time.Sleep(40 * time.Millisecond)
		}
		wg.Wait()
		if took := time.Since(began); took != time.Second {
			t.Errorf("the last one waited until %s after the first one began", took)
		}
	})
}

// TestStallsCostLittle has all bodies of an upstream stall that begin so well that
// it seems sound whenever it is tried: less and less is waited for it.
func TestStallsCostLittle(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		o := net.serve(t, "up:80")
		o.setFront(stallAt(random(9<<20, 130), 5<<20))
		n := net.run(t, "up:80")
		var waited []time.Duration
		for begun, i := time.Now(), 0; time.Since(begun) < time.Minute; i++ {
			r := n.get(blobURL("app", digest.FromString(strconv.Itoa(i))))
			if r.status == 200 && r.err == nil {
				t.Error("a body was whole")
			}
			if r.took > 0 {
				waited = append(waited, r.took)
			}
			time.Sleep(100 * time.Millisecond)
		}
		const stall = 1500 * time.Millisecond
		if want := []time.Duration{stall, stall, stall}; !slices.Equal(waited, want) {
			t.Errorf("requests waited %v in a minute, want %v", waited, want)
		}
	})
}

// TestOneBlobStalls checks that an upstream which stalls on one blob is soon asked
// for others again, and not for that one.
func TestOneBlobStalls(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		o := net.serve(t, "up:80")
		body, other := random(9<<20, 131), random(9<<20, 132)
		stalled, sound := blobURL("app", o.blob("app", body)), blobURL("app", o.blob("app", other))
		front := stallAt(body, 5<<20)
		o.setFront(func(w http.ResponseWriter, r *http.Request) bool { return r.URL.Path == stalled && front(w, r) })
		n := net.run(t, "up:80")
		if r := n.get(stalled); r.err == nil || r.took != 1500*time.Millisecond {
			t.Errorf("%d after %s: %v", r.status, r.took, r.err)
		}
		n.wantRefused(n.get(sound), 502, "fwd=miss; detail=unreachable")
		time.Sleep(firstAgain + 100*time.Millisecond)
		n.wantBlob(n.get(sound), other, "fwd=miss; stored")
		if r := n.get(stalled); r.status != http.StatusBadGateway || r.took != 0 {
			t.Errorf("%d after %s, want 502 at once", r.status, r.took)
		}
	})
}

// TestNextUpstreamInTime checks the wait when another upstream can help.
func TestNextUpstreamInTime(t *testing.T) {
	body := random(9<<20, 103)
	for _, tt := range []struct {
		name  string
		front func(http.ResponseWriter, *http.Request) bool // nil: the connection is not answered
		wait  time.Duration
	}{
		{"connection not answered", nil, 900 * time.Millisecond},
		{"headers not sent", hang, 900 * time.Millisecond},
		{"stalls at once", stallAt(body, 0), 1500 * time.Millisecond},
		{"stalls in the middle", stallAt(body, 5<<20), 1500 * time.Millisecond},
	} {
		bubble(t, tt.name, func(t *testing.T, net *network) {
			if tt.front != nil {
				net.serve(t, "first:80").setFront(tt.front)
			}
			d := net.serve(t, "second:80").blob("app", body)
			n := net.run(t, "first:80", "second:80")
			r := n.get(blobURL("app", d))
			n.wantBlob(r, body, "fwd=miss; stored")
			if r.took != tt.wait {
				t.Errorf("it took %s, want %s", r.took, tt.wait)
			}
		})
	}
}

// TestStallMidBody checks when a client is let go whose body has stalled.
func TestStallMidBody(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		body := random(9<<20, 104)
		o := net.serve(t, "up:80")
		d := o.blob("app", body)
		o.setFront(stallAt(body, 6<<20))
		n := net.run(t, "up:80")
		r := n.get(blobURL("app", d))
		if r.status != 200 || !errors.Is(r.err, io.ErrUnexpectedEOF) || !bytes.Equal(r.body, body[:6<<20]) {
			t.Errorf("%d, %d bytes, %v", r.status, len(r.body), r.err)
		}
		if r.took != 1500*time.Millisecond {
			t.Errorf("it took %s", r.took)
		}
		// containerd comes back at once for the rest, and is sent on.
		rest := n.get(blobURL("app", d), "Range", "bytes=6291456-")
		n.wantRefused(rest, 502, "fwd=miss; detail=unreachable")
		if rest.took != 0 {
			t.Errorf("the rest was waited for: %s", rest.took)
		}
		o.setFront(nil)
		time.Sleep(2 * time.Second)
		o.forget()
		rest = n.get(blobURL("app", d), "Range", "bytes=6291456-")
		if rest.status != 206 || rest.err != nil || !bytes.Equal(rest.body, body[6<<20:]) {
			t.Errorf("the rest: %d, %d bytes, %v", rest.status, len(rest.body), rest.err)
		}
		if len(o.ranges) != 1 || o.ranges[0] != "bytes=6291456-" {
			t.Errorf("what was on disk was fetched again: %q", o.ranges)
		}
	})
}

// TestBothStall has one upstream stall after the other: whoever waits is sent on
// in time, and at once when it comes back, as containerd does.
func TestBothStall(t *testing.T) {
	for _, at := range []int{0, 5 << 20} {
		bubble(t, strconv.Itoa(at), func(t *testing.T, net *network) {
			body := random(9<<20, 108)
			d := digest.FromBytes(body)
			net.serve(t, "first:80").setFront(stallAt(body, at))
			net.serve(t, "second:80").setFront(hang)
			n := net.run(t, "first:80", "second:80")
			r := n.get(blobURL("app", d))
			if r.status == 200 && r.err == nil || len(r.body) > 5<<20 && r.status == 200 || r.took > 1900*time.Millisecond {
				t.Errorf("%d, %d bytes after %s", r.status, len(r.body), r.took)
			}
			for range 10 {
				r = n.get(blobURL("app", d), "Range", "bytes="+strconv.Itoa(at)+"-")
				n.wantRefused(r, 502, "fwd=miss; detail=unreachable")
				if r.took != 0 {
					t.Errorf("it took %s", r.took)
				}
				time.Sleep(300 * time.Millisecond)
			}
		})
	}
}

// TestSlowIsNotStalled checks that a slow link is given all the time it needs.
func TestSlowIsNotStalled(t *testing.T) {
	for _, size := range []int{1 << 20, 5 << 20} {
		bubble(t, strconv.Itoa(size), func(t *testing.T, net *network) {
			body := random(size, 105)
			o := net.serve(t, "up:80")
			d := o.blob("app", body)
			o.setFront(func(w http.ResponseWriter, r *http.Request) bool {
				w.Header().Set("Content-Length", strconv.Itoa(len(body)))
				for at := 0; at < len(body); at += 10_000 {
					w.Write(body[at:min(at+10_000, len(body))])
					http.NewResponseController(w).Flush()
					pause(r, time.Second)
				}
				return true
			})
			n := net.run(t, "up:80")
			r := n.get(blobURL("app", d))
			n.wantBlob(r, body, "fwd=miss; stored")
			if want := time.Duration(size/10_000) * time.Second; r.took < want || r.took > want+5*time.Second {
				t.Errorf("it took %s", r.took)
			}
		})
	}
}

// TestTagDeadline checks that a registry that hangs costs a tag known from
// before one second, and the next ones nothing.
func TestTagDeadline(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		o := net.serve(t, "up:80")
		o.manifest("app", "v1", testManifest())
		n := net.run(t, "up:80")
		n.get(manifestURL("app", "v1"))
		o.setFront(hang)
		for i := range 5 {
			r := n.get(manifestURL("app", "v1"))
			want := time.Duration(0)
			if i == 0 {
				want = time.Second
			}
			if r.status != 200 || r.cache() != "hit; detail=stale-tag" || r.took != want {
				t.Errorf("%d %s after %s", r.status, r.cache(), r.took)
			}
		}
	})
}

// TestUnreadDownloadEnds checks for how long a download goes on for nobody.
func TestUnreadDownloadEnds(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		body := random(9<<20, 106)
		o := net.serve(t, "up:80")
		d := o.blob("app", body)
		o.setFront(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
			for at := 0; r.Context().Err() == nil; at += 8192 { // fast enough, and for long
				w.Write(body[at : at+8192])
				http.NewResponseController(w).Flush()
				pause(r, time.Second)
			}
			return true
		})
		n := net.run(t, "up:80")
		resp, err := n.client.Do(newGet(t.Context(), n.url+blobURL("app", d)+"?ns="+testHost))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		under := func() bool {
			n.mu.Lock()
			defer n.mu.Unlock()
			return n.fills[d] != nil
		}
		time.Sleep(4*time.Minute + 50*time.Second)
		if !under() {
			t.Error("it ended early")
		}
		time.Sleep(20 * time.Second)
		if under() {
			t.Error("it still goes on")
		}
	})
}

// TestStopsSoon checks that a cache with transfers under way ends in time.
func TestStopsSoon(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		body := random(9<<20, 107)
		o := net.serve(t, "up:80")
		d := o.blob("app", body)
		o.setFront(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
			w.Write(body[:5<<20])
			http.NewResponseController(w).Flush()
			for r.Context().Err() == nil {
				w.Write(make([]byte, 8192))
				http.NewResponseController(w).Flush()
				pause(r, time.Second)
			}
			return true
		})
		n := net.run(t, "up:80")
		done := make(chan reply)
		go func() { done <- n.get(blobURL("app", d)) }()
		time.Sleep(3 * time.Second)
		began := time.Now()
		n.stop()
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("it took %s", took)
		}
		if r := <-done; r.err == nil {
			t.Error("the body ended well")
		}
	})
}
