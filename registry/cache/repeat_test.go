package cache

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

var _ io.ReaderFrom = (*repeatConn)(nil) // which package http needs for sendfile

const (
	long  = time.Minute
	short = 30 * time.Millisecond
)

// fronts serve one cache twice: by package http alone, and as Run does.
type fronts struct {
	plain, repeating string       // addresses
	seen             atomic.Int64 // requests that package http was told of at repeating

	mu     sync.Mutex // guards active
	active map[net.Conn]bool
}

func (f *fronts) note(conn net.Conn, state http.ConnState) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.active, conn)
	if state == http.StateActive {
		f.active[conn] = true
	}
}

// settle waits until package http awaits requests again. Until it does, it reads
// ahead, and has to be told of what it reads.
func (f *fronts) settle(t testing.TB) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Microsecond) {
		f.mu.Lock()
		active := len(f.active)
		f.mu.Unlock()
		if active == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("package http does not come to rest")
		}
	}
}

func newFronts(t testing.TB, c *Cache) *fronts {
	f := &fronts{active: map[net.Conn]bool{}}
	serve := func(seen *atomic.Int64, wrap func(net.Listener) net.Listener) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				seen.Add(1)
				// That the client has sent all it wants to send is no reason to hurry.
				c.ServeHTTP(w, r.WithContext(context.WithoutCancel(r.Context())))
			}),
			ErrorLog: log.New(io.Discard, "", 0),
		}
		serveRepeats(srv)
		tell := srv.ConnState
		srv.ConnState = func(conn net.Conn, state http.ConnState) {
			tell(conn, state)
			f.note(conn, state)
		}
		ended := make(chan error, 1)
		go func() { ended <- srv.Serve(wrap(l)) }()
		t.Cleanup(func() {
			srv.Close()
			<-ended
		})
		return l.Addr().String()
	}
	f.plain = serve(new(atomic.Int64), func(l net.Listener) net.Listener { return l })
	f.repeating = serve(&f.seen, func(l net.Listener) net.Listener { return repeatListener{l, c} })
	return f
}

var dates = regexp.MustCompile(`\r\nDate: [^\r]*`)

// unanswered begins a chunk that the server does not answer.
const unanswered = "~"

// converse sends each chunk after the first of the answer to the one before, for
// which it waits for so long, and returns everything that was answered, without
// dates.
func (f *fronts) converse(t testing.TB, addr string, patience time.Duration, chunks ...string) string {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var got bytes.Buffer
	buf := make([]byte, 64<<10)
	for _, chunk := range chunks {
		wait := patience
		chunk, silent := strings.CutPrefix(chunk, unanswered)
		if silent {
			wait = short
		}
		if _, err := io.WriteString(conn, chunk); err != nil {
			break // the server has hung up
		}
		conn.SetReadDeadline(time.Now().Add(wait))
		n, _ := conn.Read(buf) // of what is left, the copy below will tell
		got.Write(buf[:n])
		if n > 0 {
			f.settle(t)
		}
	}
	conn.(*net.TCPConn).CloseWrite()
	conn.SetReadDeadline(time.Now().Add(long))
	if _, err := io.Copy(&got, conn); os.IsTimeout(err) {
		t.Fatalf("the server neither answers nor hangs up: %q", chunks)
	}
	return dates.ReplaceAllString(got.String(), "")
}

// head is the head of a request for the manifest of d, with more header lines.
func head(method string, d digest.Digest, lines ...string) string {
	h := method + " " + manifestURL("app", d.String()) + "?ns=" + testHost + " HTTP/1.1\r\nHost: a\r\n"
	for _, l := range lines {
		h += l + "\r\n"
	}
	return h + "\r\n"
}

// repeatNode is a cache that holds a manifest that anybody may have.
func repeatNode(t testing.TB, cfg Config) (*node, *origin, digest.Digest) {
	o := newOrigin(t)
	d := o.manifest("app", "v1", testManifest(digest.FromString("a")))
	cfg.Registries = upstreams(o.URL)
	n := start(t, cfg)
	n.get(manifestURL("app", d.String()))
	n.settled()
	return n, o, d
}

// TestRepeats checks which requests get past package http, and that the client
// cannot tell.
func TestRepeats(t *testing.T) {
	n, o, d := repeatNode(t, Config{})
	large := o.manifest("app", "", testManifest(make([]digest.Digest, maxRepeatBody/50)...))
	n.get(manifestURL("app", large.String()))
	n.settled()
	get, hd := head("GET", d), head("HEAD", d)
	tag := strings.Replace(get, d.String(), "v1", 1)
	for _, tt := range []struct {
		name   string
		chunks []string
		told   int // requests that package http hears of
	}{
		{"the first of a connection", []string{get}, 1},
		{"GET", []string{get, get, get, get}, 1},
		{"HEAD", []string{hd, hd, hd, hd}, 1},
		{"each in turn", []string{get, hd, get, hd, get, hd}, 2},
		{"after something else", []string{tag, get, tag, get, get}, 3},
		{"a tag", []string{tag, tag, tag}, 3},
		{"a large one", []string{head("GET", large), head("GET", large), head("GET", large)}, 3},
		{"the last of its connection", []string{get, head("GET", d, "Connection: close")}, 2},
		{"two at once", []string{get, get + get, get, get}, 5},
		{"two at once from the start", []string{get + get, get, get}, 4},
		{"in parts", []string{get, get + get[:20], get[20:], get}, 4},
		{"a body", []string{get, unanswered + head("GET", d, "Content-Length: 2"), "ab", get}, 3},
		{"a body at once", []string{get, head("GET", d, "Content-Length: 2") + "ab", get, get}, 4},
		{"an empty body", []string{get, head("GET", d, "Content-Length: 0"), head("GET", d, "Content-Length: 0")}, 2},
		{"in chunks", []string{get, unanswered + head("GET", d, "Transfer-Encoding: chunked"), "0\r\n\r\n", get}, 3},
		{"lines without a carriage return", []string{get, strings.ReplaceAll(get, "\r", ""), get}, 3},
		{"HTTP/1.0", []string{get, strings.Replace(get, "1.1", "1.0", 1)}, 2},
		{"HTTP/1.0, kept", []string{get, strings.Replace(head("GET", d, "Connection: keep-alive"), "1.1", "1.0", 1), strings.Replace(head("GET", d, "Connection: keep-alive"), "1.1", "1.0", 1)}, 3},
		{"no request", []string{get, "\r\n\r\n", get}, 1},
		{"two hosts", []string{get, head("GET", d, "Host: b"), get}, 1},
		{"a long head", []string{get, head("GET", d, "X: "+strings.Repeat("x", 4096)), get, get}, 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n.disk.Load().repeats = repeats{}
			f := newFronts(t, n.Cache)
			want := f.converse(t, f.plain, long, tt.chunks...)
			got := f.converse(t, f.repeating, long, tt.chunks...)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-package http alone +repeats\n%s", diff)
			}
			if seen := int(f.seen.Load()); seen != tt.told {
				t.Errorf("package http was told of %d requests, want %d", seen, tt.told)
			}
		})
	}
}

// TestRepeatsEnd checks that a request which is repeated asks whoever has to be
// asked meanwhile.
func TestRepeatsEnd(t *testing.T) {
	clk := &clock{}
	n, o, d := repeatNode(t, Config{Now: clk.now})
	expectOf := func(what, request string, status int, cacheStatus string, told int64) {
		t.Helper()
		f := newFronts(t, n.Cache)
		got := f.converse(t, f.repeating, long, request, request)
		// One answer for the connection's first request, one for the repetition.
		_, second, _ := strings.Cut(got[1:], "HTTP/1.1 ")
		if !strings.HasPrefix(second, fmt.Sprint(status)) || !strings.Contains(second+"\r\n", "\r\n"+cacheStatus) {
			t.Errorf("%s: want %d, %s; got %q", what, status, cacheStatus, second)
		}
		if seen := f.seen.Load(); seen != told {
			t.Errorf("%s: package http was told of %d requests, want %d", what, seen, told)
		}
	}
	expect := func(what, header string, status int, cacheStatus string, told int64) {
		t.Helper()
		expectOf(what, head("GET", d, header), status, "Cache-Status: connected-registry; "+cacheStatus+"\r\n", told)
	}
	const alice, mallory, token = "Authorization: Basic alice", "Authorization: Basic mallory", "Authorization: Bearer t"
	expect("alice", alice, 200, "hit", 2)
	expect("alice", alice, 200, "hit", 1)
	o.setFront(answering(401))
	expect("mallory", mallory, 401, "fwd=miss; fwd-status=401", 2)
	expect("alice, allowed before", alice, 200, "hit", 1)
	clk.advance(6 * time.Minute)
	expect("alice, who may no longer", alice, 401, "fwd=miss; fwd-status=401", 2)

	o.setFront(nil)
	dk := n.disk.Load()
	key := dk.key.fact("token", testHost, "t")
	dk.bearers.put(key, bearer{credential: factKey{1}, until: time.Now().Add(time.Hour)})
	expect("a token", token, 200, "hit", 2)
	expect("a token", token, 200, "hit", 1)
	dk.bearers.put(key, bearer{credential: factKey{2}, until: time.Now().Add(time.Hour)})
	o.setFront(answering(403))
	expect("the token of somebody else", token, 403, "fwd=miss; fwd-status=403", 2)
	o.setFront(nil)
	expect("the token of somebody else, allowed", token, 200, "hit", 2)
	dk.bearers.put(key, bearer{credential: factKey{2}, until: time.Now().Add(-time.Second)})
	o.setFront(answering(403))
	expect("an expired token", token, 403, "fwd=miss; fwd-status=403", 2)

	o.setFront(nil)
	for range 2 {
		expect("a token from elsewhere", "Authorization: Bearer elsewhere", 200, "hit", 2)
	}
	expect("anybody", "X: y", 200, "hit", 2)
	expect("anybody", "X: y", 200, "hit", 1)
	n.manifests = manifestCache{}
	expect("no longer in memory", "X: y", 200, "hit", 1) // the first has brought it back
	anywhere := strings.Replace(head("GET", d), "?ns="+testHost, "", 1)
	expectOf("the only registry", anywhere, 200, "Cache-Status: connected-registry; hit\r\n", 1)
	if err := n.SetRegistries(map[string]Registry{"other.example": {Upstreams: []Upstream{{URL: o.URL}}}}); err != nil {
		t.Fatal(err)
	}
	expectOf("a registry that is no longer answered for", head("GET", d, "X: y"), 404, "", 2)
	o.setFront(answering(403))
	expectOf("another registry", anywhere, 403, "", 2)
}

// TestRepeatsMidConnection checks that what ends while a connection is open ends
// on that connection.
func TestRepeatsMidConnection(t *testing.T) {
	clk := &clock{}
	n, o, d := repeatNode(t, Config{Now: clk.now})
	f := newFronts(t, n.Cache)
	conn, err := net.Dial("tcp", f.repeating)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r := bufio.NewReader(conn)
	ask := func(status int, cacheStatus string, told int64) {
		t.Helper()
		before := f.seen.Load()
		io.WriteString(conn, head("GET", d))
		conn.SetReadDeadline(time.Now().Add(time.Minute))
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		f.settle(t)
		if got := resp.Header.Get("Cache-Status"); resp.StatusCode != status || got != "connected-registry; "+cacheStatus || f.seen.Load()-before != told {
			t.Errorf("%d, %s, package http told %d times; want %d, %s, %d", resp.StatusCode, got, f.seen.Load()-before, status, cacheStatus, told)
		}
	}
	ask(200, "hit", 1)
	st, other := n.disk.Load().store, []byte("used since")
	if err := st.put(digest.FromBytes(other), other); err != nil {
		t.Fatal(err)
	}
	ask(200, "hit", 0)
	st.mu.Lock()
	if last := st.oldest.prev.digest; last != d {
		t.Errorf("used last: %s, want the manifest", last)
	}
	st.mu.Unlock()
	clk.advance(6 * time.Minute)
	ask(200, "hit; detail=checked", 1)
	ask(200, "hit", 0)
	clk.advance(6 * time.Minute)
	o.setFront(answering(503))
	ask(200, "hit; detail=offline", 1)
	ask(200, "hit; detail=offline", 1)
	o.setFront(answering(404))
	clk.advance(6 * time.Minute)
	ask(404, "fwd=miss; fwd-status=404", 1)
	o.setFront(nil)
	ask(200, "hit; detail=checked", 1)
	ask(200, "hit", 0)
	n.mu.Lock()
	n.stopping = true
	n.mu.Unlock()
	before := f.seen.Load()
	io.WriteString(conn, head("GET", d))
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable || f.seen.Load()-before != 1 {
		t.Errorf("while stopping: status %d, package http told %d times; want 503, told once", resp.StatusCode, f.seen.Load()-before)
	}
	n.mu.Lock()
	n.stopping = false
	n.mu.Unlock()
}

// TestRepeatsAreCounted checks that the metrics miss nothing.
func TestRepeatsAreCounted(t *testing.T) {
	reg := prometheus.NewRegistry()
	n, _, d := repeatNode(t, Config{Metrics: reg})
	f := newFronts(t, n.Cache)
	before := samples(t, reg)
	f.converse(t, f.repeating, long, head("HEAD", d), head("HEAD", d), head("GET", d), head("GET", d), head("GET", d))
	got := samples(t, reg)
	for name, want := range map[string]float64{
		"requests_total[kind=manifest result=hit]": 5,
		"served_bytes_total[source=store]":         3 * float64(len(testManifest(digest.FromString("a")))),
	} {
		if got[name]-before[name] != want {
			t.Errorf("%s rose by %v, want %v", name, got[name]-before[name], want)
		}
	}
	if seen := f.seen.Load(); seen != 2 {
		t.Errorf("package http was told of %d requests, want 2", seen)
	}
}

// TestRepeatsAreBounded fills the memory for heads, and looks for credentials in
// it.
func TestRepeatsAreBounded(t *testing.T) {
	var r repeats
	for i := range 3 * maxRepeats {
		r.put(headSum{byte(i), byte(i >> 8)}, &repeat{})
		if len(r.byHead) > maxRepeats {
			t.Fatalf("%d heads are remembered", len(r.byHead))
		}
	}
	n, _, d := repeatNode(t, Config{})
	f := newFronts(t, n.Cache)
	const secret = "correct-horse-battery-staple"
	request := head("GET", d, "Authorization: Basic "+secret)
	f.converse(t, f.repeating, long, request, request, request)
	if seen := f.seen.Load(); seen != 2 {
		t.Fatalf("package http was told of %d requests, want 2: the first had to be checked", seen)
	}
	for _, what := range n.disk.Load().repeats.byHead {
		if s := fmt.Sprintf("%+v", *what); strings.Contains(s, secret) {
			t.Errorf("a credential is kept: %s", s)
		}
	}
}

// TestRepeatsStop stops a cache that is being asked: every answer is complete, or
// there is none.
func TestRepeatsStop(t *testing.T) {
	n, _, d := repeatNode(t, Config{})
	var clients sync.WaitGroup
	var answered atomic.Int64
	request := []byte(head("GET", d))
	for range 4 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(n.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		clients.Go(func() {
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(time.Minute))
			r := bufio.NewReader(conn)
			for {
				if _, err := conn.Write(request); err != nil {
					return
				}
				if _, err := r.Peek(1); err != nil {
					return
				}
				resp, err := http.ReadResponse(r, nil)
				if err != nil {
					t.Error(err)
					return
				}
				body, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if resp.StatusCode == http.StatusServiceUnavailable {
					return
				}
				if err != nil || digest.FromBytes(body) != d {
					t.Errorf("status %d, %d bytes, %v", resp.StatusCode, len(body), err)
					return
				}
				answered.Add(1)
			}
		})
	}
	n.await(func() bool { return answered.Load() > 100 })
	n.stop()
	clients.Wait()
}

// connect returns both ends of a connection to c.
func connect(t *testing.T, c *Cache) (client *net.TCPConn, server *repeatConn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	client = conn.(*net.TCPConn)
	late := time.AfterFunc(time.Minute, func() { client.Close() })
	accepted, err := repeatListener{l, c}.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		late.Stop()
		client.Close()
		accepted.Close()
	})
	return client, accepted.(*repeatConn)
}

// TestRepeatsReadAhead reads as package http does when a request comes before it
// has stopped to watch for the client's leaving: that request is the server's,
// the next one need not be.
func TestRepeatsReadAhead(t *testing.T) {
	n, _, d := repeatNode(t, Config{})
	request := head("GET", d)
	f := newFronts(t, n.Cache)
	want, _, _ := strings.Cut(f.converse(t, f.repeating, long, request), "\r\n\r\n") // and have it remembered
	client, server := connect(t, n.Cache)
	read := func(size int, want string) {
		t.Helper()
		p := make([]byte, size)
		if n, err := server.Read(p); err != nil || string(p[:n]) != want {
			t.Fatalf("read %q, %v, want %q", p[:n], err, want)
		}
	}
	io.WriteString(client, request)
	read(4096, request)
	io.WriteString(client, request)
	read(1, request[:1])
	server.nextRequest()
	read(4096, request[1:])
	if server.head != sha256.Sum256([]byte(request)) {
		t.Error("what was read ahead is not of the head")
	}
	server.nextRequest()
	before := time.Now().Add(-time.Hour)
	server.renewed = before
	io.WriteString(client, request)
	client.CloseWrite()
	if n, err := server.Read(make([]byte, 4096)); n != 0 || err != io.EOF {
		t.Fatalf("read %d, %v, want the end", n, err)
	}
	if server.renewed.Equal(before) {
		t.Error("the connection is as idle as before")
	}
	server.Close()
	got, err := io.ReadAll(client)
	if first, _, _ := strings.Cut(dates.ReplaceAllString(string(got), ""), "\r\n\r\n"); err != nil || first != want {
		t.Errorf("%v, %q, want %q", err, first, want)
	}
}

// TestRepeatsRenewDeadline checks that a repeated request puts off the end of an
// idle connection.
func TestRepeatsRenewDeadline(t *testing.T) {
	client, conn := connect(t, nil)
	conn.awaits = false
	ago := time.Now().Add(-idleTimeout - time.Hour)
	conn.renew(ago)
	if _, err := conn.Read(make([]byte, 1)); !os.IsTimeout(err) {
		t.Errorf("idle for long, and %v", err)
	}
	conn.renew(ago.Add(renewEvery / 2))
	if !conn.renewed.Equal(ago) {
		t.Error("renewed too often")
	}
	conn.renew(time.Now())
	io.WriteString(client, "x")
	if n, err := conn.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("not idle, and read %d, %v", n, err)
	}
}

// FuzzRepeats has whole conversations with and without repeats.
func FuzzRepeats(f *testing.F) {
	n, _, d := repeatNode(f, Config{})
	fronts := newFronts(f, n.Cache)
	get, hd := head("GET", d), head("HEAD", d)
	for _, lines := range []string{
		"Accept: */*", "Connection: close", "Connection: keep-alive, close", "Content-Length: 0", "Content-Length: 3", "Content-Length: x",
		"Transfer-Encoding: chunked", "Transfer-Encoding: identity", "Expect: 100-continue", "Expect: x", "Upgrade: h2c",
		"X: a\r\n b", "X : a", " X: a", "X: a\n\n", "X: a\r\r", "X: \x00", "\xff: a", "Via: 1.1 x", "Authorization: Basic x", "Range: bytes=1-2",
		"If-None-Match: *", "Host: b", "Trailer: X", "Te: trailers", "Pragma: no-cache",
	} {
		with := head("GET", d, lines)
		f.Add(strings.Join([]string{get, with, with, get}, "|"))
	}
	for _, chunks := range [][]string{
		{get, get, hd, hd, get}, {get + get, get}, {get, get[:9], get[9:], get}, {get, hd + get, get},
		{"GET http://b" + get[4:], get}, {strings.Replace(get, "?", "%3f", 1), get}, {strings.Replace(get, "1.1", "1.0", 1), get},
		{strings.Replace(get, "GET", "POST", 1), "\r\n" + get, get}, {strings.Replace(get, "GET", "PUT", 1), "\r\n" + get, get}, {strings.ReplaceAll(get, "\r", ""), get, get}, {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"},
		{strings.Replace(get, d.String(), "v1", 1), get, get}, {"GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\n", get, get}, {"\r\n\r\n"},
	} {
		f.Add(strings.Join(chunks, "|"))
	}
	f.Fuzz(func(t *testing.T, script string) {
		chunks := strings.Split(script, "|")
		if len(chunks) > 8 {
			return
		}
		fronts.converse(t, fronts.plain, short, chunks...) // whoever has to be asked is asked
		want := fronts.converse(t, fronts.plain, short, chunks...)
		for range 2 {
			if diff := cmp.Diff(want, fronts.converse(t, fronts.repeating, short, chunks...)); diff != "" {
				t.Fatalf("%q: -package http alone +repeats\n%s", chunks, diff)
			}
		}
	})
}

// FuzzIsHead checks that package http ends where isHead does.
func FuzzIsHead(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	f.Add([]byte("GET / HTTP/1.1\nHost: a\n\nGET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a\r\n \r\n\t\r\n\r\n"))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a\r\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReaderSize(bytes.NewReader(b), len(b)+16)
		req, err := http.ReadRequest(r)
		if err != nil || req.Body != http.NoBody {
			return
		}
		left, _ := io.ReadAll(r)
		if isHead(b) && len(left) > 0 {
			t.Errorf("%q: package http leaves %q", b, left)
		}
	})
}
