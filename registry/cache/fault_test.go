package cache

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

// refusing returns the address of a port that nobody listens on.
func refusing(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	return "http://" + l.Addr().String()
}

// silent accepts connections, as far as the kernel does, and never answers.
func silent(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

func answering(status int, header ...string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		for i := 0; i < len(header); i += 2 {
			w.Header().Add(header[i], header[i+1])
		}
		w.WriteHeader(status)
		return true
	}
}

// breaking sends the first n bytes of a body of the stated length, from where
// the Range begins, and then does what end says.
func breaking(body []byte, n int, end func(net.Conn)) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		rng := parseRange(r.Header.Get("Range"))
		s, _ := rng.of(int64(len(body)))
		w.Header().Set("Content-Length", strconv.FormatInt(s.len(), 10))
		if rng.set {
			w.Header().Set("Content-Range", "bytes "+strconv.FormatInt(s.start, 10)+"-"+
				strconv.FormatInt(s.end-1, 10)+"/"+strconv.Itoa(len(body)))
			w.WriteHeader(http.StatusPartialContent)
		}
		w.Write(body[s.start:min(s.end, s.start+int64(n))])
		http.NewResponseController(w).Flush()
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		end(conn)
		return true
	}
}

func reset(conn net.Conn) {
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
}

func fin(conn net.Conn) { conn.Close() }

// TestFaultFallsThrough has one upstream that is broken in one way, and checks
// that the client learns soon, and in a way that makes it go on.
func TestFaultFallsThrough(t *testing.T) {
	body := random(1<<20, 3)
	d := digest.FromBytes(body)
	selfSigned := httptest.NewUnstartedServer(http.NotFoundHandler())
	selfSigned.Config.ErrorLog = log.New(io.Discard, "", 0)
	selfSigned.StartTLS()
	t.Cleanup(selfSigned.Close)
	plain := newOrigin(t)
	wrong := random(len(body), 4)
	for _, tt := range []struct {
		name   string
		url    string // instead of an origin
		front  func(http.ResponseWriter, *http.Request) bool
		status int
		cache  string
	}{
		{name: "refused", url: refusing(t), status: 502},
		{name: "unknown authority", url: selfSigned.URL, status: 502},
		{name: "plain HTTP behind https", url: strings.Replace(plain.URL, "http:", "https:", 1), status: 502},
		{name: "500", front: answering(500), status: 502},
		{name: "503", front: answering(503), status: 502},
		{name: "429", front: answering(429, "Retry-After", "1"), status: 502},
		{name: "408", front: answering(408), status: 502},
		{name: "304", front: answering(304), status: 502},
		{name: "301 to nowhere", front: answering(301, "Location", refusing(t)+"/x"), status: 502},
		{name: "404", front: answering(404), status: 404, cache: "fwd=miss; fwd-status=404"},
		{name: "403", front: answering(403), status: 403, cache: "fwd=miss; fwd-status=403"},
		{name: "401", front: answering(401, "Www-Authenticate", `Bearer realm="http://x/token"`), status: 401, cache: "fwd=miss; fwd-status=401"},
		{name: "reset mid-body", front: breaking(body, 1000, reset), status: 502},
		{name: "short body", front: breaking(body, 1000, fin), status: 502},
		{name: "wrong bytes", front: func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Length", strconv.Itoa(len(wrong)))
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Write(wrong)
			return true
		}, status: 502},
		{name: "no length", front: func(w http.ResponseWriter, r *http.Request) bool {
			w.Write(body[:100])
			http.NewResponseController(w).Flush()
			w.Write(body[100:])
			return true
		}, status: 502},
		{name: "compressed", front: answering(200, "Content-Encoding", "gzip"), status: 502},
	} {
		for _, kind := range []string{"blob", "manifest", "tag"} {
			if kind != "blob" && (strings.Contains(tt.name, "body") || tt.name == "no length") {
				continue
			}
			if kind == "tag" && tt.name == "wrong bytes" {
				continue // whatever a tag names is right
			}
			t.Run(tt.name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				url := tt.url
				if url == "" {
					o := newOrigin(t)
					o.blob("app", body)
					o.setFront(tt.front)
					url = o.URL
				}
				n := start(t, Config{Registries: upstreams(url)})
				path := map[string]string{
					"blob": blobURL("app", d), "manifest": manifestURL("app", d.String()), "tag": manifestURL("app", "v1"),
				}[kind]
				want := tt.cache
				r := n.get(path)
				if want == "" {
					want = "fwd=miss; detail=unreachable"
					if tt.name == "wrong bytes" {
						want = "fwd=miss; detail=bad-content"
					}
				}
				n.wantRefused(r, tt.status, want)
				if tt.status == 401 && r.header.Get("Www-Authenticate") == "" {
					t.Error("the challenge is missing")
				}
				if tt.status != 401 && r.header.Get("Www-Authenticate") != "" {
					t.Error("a challenge of our own")
				}
				if r.header.Get("Retry-After") != "" {
					t.Error("Retry-After was passed on")
				}
				head := n.do(http.MethodHead, path)
				if s := head.status; s == 200 && head.header.Get("Docker-Content-Digest") == "" || s == 408 || s == 429 || s == 304 {
					t.Errorf("HEAD: %d", s)
				}
				if n.stored(d) {
					t.Error("something was stored")
				}
			})
		}
	}
}

// TestGoesOnWithTheNextUpstream breaks the first of two upstreams, in every way,
// at several places of a large blob.
func TestGoesOnWithTheNextUpstream(t *testing.T) {
	body := random(9<<20, 5)
	for _, tt := range []struct {
		name  string
		front func(http.ResponseWriter, *http.Request) bool
		url   string
	}{
		{name: "refused", url: refusing(t)},
		{name: "404", front: answering(404)},
		{name: "403", front: answering(403)},
		{name: "500", front: answering(500)},
		{name: "429", front: answering(429)},
		{name: "reset at the start", front: breaking(body, 0, reset)},
		{name: "reset in the middle", front: breaking(body, 5<<20, reset)},
		{name: "reset before the end", front: breaking(body, len(body)-1, reset)},
		{name: "short at the start", front: breaking(body, 0, fin)},
		{name: "short in the middle", front: breaking(body, 5<<20, fin)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			first, second := newOrigin(t), newOrigin(t)
			url := first.URL
			if tt.url != "" {
				url = tt.url
			}
			first.setFront(tt.front)
			d := second.blob("app", body)
			n := start(t, Config{Registries: upstreams(url, second.URL)})
			r := n.get(blobURL("app", d))
			n.wantBlob(r, body, "fwd=miss; stored")
			n.settled()
			if !n.stored(d) {
				t.Error("not stored")
			}
			if strings.Contains(tt.name, "middle") {
				from := parseRange(second.ranges[0])
				// A reset takes bytes with it that were on their way.
				if from.first != 5<<20 && tt.name != "reset in the middle" || from.first == 0 {
					t.Errorf("the second upstream was asked for %q", second.ranges[0])
				}
			}
		})
	}
}

// TestOneUpstreamResumes has a single upstream that breaks off again and again
// but makes progress, as behind a load balancer.
func TestOneUpstreamResumes(t *testing.T) {
	body := random(9<<20, 6)
	o := newOrigin(t)
	o.setFront(breaking(body, 2<<20, fin))
	d := o.blob("app", body)
	n := start(t, Config{Registries: upstreams(o.URL)})
	n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
	if got := o.count("GET"); got != 5 {
		t.Errorf("%d requests, want 5: %q", got, o.ranges)
	}
}

// rawGet speaks HTTP without a client's help, to see how a connection ends.
func rawGet(t *testing.T, n *node, path string, rng string) (head string, body []byte, err error) {
	t.Helper()
	conn, e := net.Dial("tcp", strings.TrimPrefix(n.url, "http://"))
	if e != nil {
		t.Fatal(e)
	}
	defer conn.Close()
	io.WriteString(conn, "GET "+path+"?ns="+testHost+" HTTP/1.1\r\nHost: cache\r\n"+rng+"\r\n")
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	all, err := io.ReadAll(conn)
	h, b, _ := bytes.Cut(all, []byte("\r\n\r\n"))
	return string(h), b, err
}

// TestWrongLargeBody checks that a large body with a wrong byte ends short, by
// FIN and not by RST, and that containerd's next request is sent elsewhere.
func TestWrongLargeBody(t *testing.T) {
	body := random(9<<20, 7)
	d := digest.FromBytes(body)
	for _, at := range []int{0, 5 << 20, len(body) - 1} {
		o := newOrigin(t)
		o.blob("app", body)
		wrong := bytes.Clone(body)
		wrong[at] ^= 1
		o.mu.Lock()
		o.blobs["app/"+d.String()] = wrong
		o.mu.Unlock()
		n := start(t, Config{Registries: upstreams(o.URL)})
		head, got, err := rawGet(t, n, blobURL("app", d), "")
		if err != nil || errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the connection did not end by FIN: %v", err)
		}
		if !strings.HasPrefix(head, "HTTP/1.1 200") || len(got) >= len(body) {
			t.Errorf("%d of %d bytes: %s", len(got), len(body), head)
		}
		n.settled()
		if n.stored(d) {
			t.Error("wrong content was stored")
		}
		r := n.get(blobURL("app", d), "Range", "bytes="+strconv.Itoa(len(got))+"-")
		n.wantRefused(r, 502, "fwd=miss; detail=bad-content")
	}
}

// TestWrongBytesThenNextUpstream checks that a small body comes from the next
// upstream without the client noticing, and a large one at the next request.
func TestWrongBytesThenNextUpstream(t *testing.T) {
	for _, size := range []int{1000, 9 << 20} {
		body := random(size, 8)
		bad, good := newOrigin(t), newOrigin(t)
		d := good.blob("app", body)
		bad.blobs["app/"+d.String()] = random(size, 9)
		n := start(t, Config{Registries: upstreams(bad.URL, good.URL)})
		if size > HoldBackWhole {
			if r := n.get(blobURL("app", d)); r.err == nil {
				t.Errorf("a wrong body ended well: %d", r.status)
			}
		}
		n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")

		m := testManifest(d)
		md := good.manifest("app", "", m)
		bad.manifests["app/"+md.String()] = []byte(testManifest())
		if r := n.get(manifestURL("app", md.String())); r.status != 200 || string(r.body) != m {
			t.Errorf("manifest: %d", r.status)
		}
	}
}

// TestUnusableAnswerThenNextUpstream has a first upstream whose answers look
// right and cannot be used.
func TestUnusableAnswerThenNextUpstream(t *testing.T) {
	body := random(5<<20, 14)
	for name, front := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"no length": func(w http.ResponseWriter, _ *http.Request) bool {
			w.Write(body[:100])
			http.NewResponseController(w).Flush()
			w.Write(body[100:])
			return true
		},
		"part of what was asked for": answering(206, "Content-Range", "bytes 0-4/10", "Content-Length", "5"),
		"compressed":                 answering(200, "Content-Encoding", "gzip", "Content-Length", "0"),
	} {
		first, second := newOrigin(t), newOrigin(t)
		first.setFront(front)
		d := second.blob("app", body)
		n := start(t, Config{Registries: upstreams(first.URL, second.URL)})
		r := n.get(blobURL("app", d))
		if r.err != nil || !bytes.Equal(r.body, body) {
			t.Errorf("%s: %d, %v", name, r.status, r.err)
		}
	}
}

// TestDistrust checks that an upstream that was wrong once is not taken at its
// word for large bodies either.
func TestDistrust(t *testing.T) {
	small, large, right := random(1000, 15), random(9<<20, 16), random(9<<20, 17)
	o := newOrigin(t)
	for _, body := range [][]byte{small, large} {
		d := o.blob("app", body)
		wrong := bytes.Clone(body)
		wrong[0] ^= 1
		o.blobs["app/"+d.String()] = wrong
	}
	o.blob("app", right)
	n := start(t, Config{Registries: upstreams(o.URL)})
	for _, body := range [][]byte{small, large} {
		n.wantRefused(n.get(blobURL("app", digest.FromBytes(body))), 502, "fwd=miss; detail=bad-content")
	}
	n.wantBlob(n.get(blobURL("app", digest.FromBytes(right))), right, "fwd=miss; stored")
}

// TestSetRegistries checks that a change reaches the next request, and that what
// has not changed keeps its state.
func TestSetRegistries(t *testing.T) {
	first, second := newOrigin(t), newOrigin(t)
	body := random(1000, 18)
	d := second.blob("app", body)
	n := start(t, Config{Registries: upstreams(first.URL)})
	n.wantRefused(n.get(blobURL("app", d)), 404, "fwd=miss; fwd-status=404")
	before := (*n.registries.Load())[testHost]
	if err := n.SetRegistries(upstreams(first.URL)); err != nil || (*n.registries.Load())[testHost] != before {
		t.Errorf("the same again: %v", err)
	}
	if err := n.SetRegistries(upstreams("nonsense")); err == nil || (*n.registries.Load())[testHost] != before {
		t.Errorf("nonsense: %v", err)
	}
	if err := n.SetRegistries(upstreams(second.URL)); err != nil {
		t.Fatal(err)
	}
	n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
}

// TestRedirectKeepsCredentials checks that Authorization stays with the server
// it was meant for.
func TestRedirectKeepsCredentials(t *testing.T) {
	body := random(1000, 11)
	d := digest.FromBytes(body)
	elsewhere := newOrigin(t)
	elsewhere.blob("app", body)
	o := newOrigin(t)
	o.setFront(func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, elsewhere.URL+r.URL.Path+"?signature=s3cret", http.StatusTemporaryRedirect)
		return true
	})
	n := start(t, Config{Registries: upstreams(o.URL)})
	n.wantBlob(n.get(blobURL("app", d), "Authorization", "Basic Zm9v"), body, "fwd=miss; stored")
	if o.auth[0] != "Basic Zm9v" || elsewhere.auth[0] != "" {
		t.Errorf("the registry got %q, the redirect's target %q", o.auth, elsewhere.auth)
	}
}

// TestUpstreamWithoutCredentials checks that they are not sent there.
func TestUpstreamWithoutCredentials(t *testing.T) {
	body := random(1000, 12)
	o := newOrigin(t)
	d := o.blob("app", body)
	n := start(t, Config{Registries: map[string]Registry{testHost: {
		Upstreams: []Upstream{{URL: o.URL, WithoutCredentials: true}},
	}}})
	n.wantBlob(n.get(blobURL("app", d), "Authorization", "Basic Zm9v"), body, "fwd=miss; stored")
	if o.auth[0] != "" {
		t.Errorf("the upstream got %q", o.auth)
	}
}

// TestAuthorities checks that the bundle is read again when it changes and that
// the last good one stays.
func TestAuthorities(t *testing.T) {
	body := random(1000, 13)
	o := newOrigin(t)
	d := o.blob("app", body)
	secure := httptest.NewUnstartedServer(o)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	var handshakes atomic.Int32
	secure.TLS.VerifyConnection = func(tls.ConnectionState) error { handshakes.Add(1); return nil }
	right := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})
	ca := filepath.Join(t.TempDir(), "ca.crt")
	n := start(t, Config{Registries: map[string]Registry{testHost: {
		Upstreams: []Upstream{{URL: secure.URL, CAFile: ca}},
	}}})
	write := func(content string) {
		if err := os.WriteFile(ca, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	path := blobURL("app", d)
	n.wantRefused(n.get(path), 502, "fwd=miss; detail=unreachable") // no file
	write("not a certificate")
	n.wantRefused(n.get(path), 502, "fwd=miss; detail=unreachable")
	write(string(right))
	n.wantBlob(n.get(path), body, "fwd=miss; stored")
	for _, bad := range []string{"", "garbage, longer than the bundle was, so that the change shows" + string(right[:100])} {
		write(bad)
		(*n.registries.Load())[testHost].closeIdle()
		if r := n.do(http.MethodHead, blobURL("app", digest.FromString(bad))); r.status != 404 {
			t.Errorf("with a broken bundle in place of a good one: %d", r.status)
		}
	}
	pool := x509.NewCertPool()
	if _, err := (&authorities{path: ca, log: quiet(), own: pool, all: pool}).pool(false); err != nil {
		t.Errorf("the last good bundle: %v", err)
	}
}

// TestExpiredCertificate has a right authority and a leaf whose time has passed.
func TestExpiredCertificate(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(-time.Hour),
	}
	caDER, err := x509.CreateCertificate(rand.Reader, authority, authority, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, authority, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	ca := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}), 0o600); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{leafDER}, PrivateKey: key}}}
	s.StartTLS()
	defer s.Close()
	reg := prometheus.NewRegistry()
	n := start(t, Config{Metrics: reg, Registries: map[string]Registry{testHost: {
		Upstreams: []Upstream{{URL: s.URL, CAFile: ca}},
	}}})
	n.wantRefused(n.get(blobURL("app", digest.FromString("x"))), 502, "fwd=miss; detail=unreachable")
	if got := samples(t, reg)["fallthroughs_total[cause=tls]"]; got != 1 {
		t.Errorf("not counted as a fault of TLS: %v", samples(t, reg))
	}
}
