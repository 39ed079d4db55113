package containerd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/connected-registry/connected-registry/registry/cache"
)

// faultyHost is the registry that the images of these tests are of.
const faultyHost = "registry.test"

// TestUpstreamFaults pulls through a cache whose registry is broken in every
// way, while the next host is sound: the pull succeeds with the right bytes, and
// the cache adds no more than two seconds to it.
//
// That these are two seconds to the millisecond is tested where the clock is the
// test's own, in package cache.
func TestUpstreamFaults(t *testing.T) {
	for _, test := range []struct {
		name   string
		daemon daemonConfig
	}{
		{"one request for a layer", daemonConfig{}},
		{"layers in chunks", daemonConfig{FetchBuffer: 4 << 20}},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := startFaulty(t, test.daemon)
			for _, fault := range upstreamFaults {
				t.Run(fault.name, func(t *testing.T) {
					url, caFile := fault.upstream(t, p.sound.server.Config.Handler)
					c := startWatchedCache(t, cache.Config{Registries: registryAt(url, caFile)})
					attempts := fault.attempts
					if test.daemon.FetchBuffer > 0 {
						// A refused chunk ends the pull (see midPullConfigs), and each
						// layer may meet the fault for itself.
						attempts = 1 + len(p.image.layers)
					}
					p.pull(t, c.host, max(1, attempts))
					c.check(t)
					if !slices.Contains(p.served(t), p.sound.host) && !fault.mends {
						t.Error("the sound host has served nothing: the fault was none")
					}
				})
			}
		})
	}
}

// faulty is a containerd that asks a cache first and a sound registry then.
type faulty struct {
	sound  *parent
	image  *testImage
	certs  string
	daemon *daemon
}

func startFaulty(t *testing.T, config daemonConfig) *faulty {
	t.Helper()
	p := &faulty{sound: startParent(t, false), image: load(t, bigImage), certs: t.TempDir()}
	p.sound.push(t, repository+":1", p.image)
	config.CertsDir = p.certs
	p.daemon = startContainerd(t, config)
	return p
}

const faultyRef = faultyHost + "/" + repository + ":1"

// pull pulls through the cache at address what containerd has nothing of, and
// leaves nothing of it behind.
func (p *faulty) pull(t *testing.T, address string, attempts int) {
	t.Helper()
	writeHostsFile(t, filepath.Join(p.certs, faultyHost, "hosts.toml"),
		fmt.Sprintf("server = 'http://%s'\n[host.'http://%s']\n", p.sound.host, address))
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
		id, err := p.daemon.pull(ctx, faultyRef)
		cancel()
		if err == nil {
			check(t, p.daemon, faultyRef, id, p.image)
			p.daemon.remove(t, faultyRef)
			return
		}
		if attempts--; attempts == 0 {
			t.Fatalf("pulling: %v\n%s", err, p.daemon.logExcerpt())
		}
		// The kubelet comes back later, when containerd has cleared away what the
		// failed pull had fetched.
		t.Logf("pulling: %v", err)
		p.daemon.collectGarbage(t)
	}
}

// served are the hosts that gave content since the last call.
func (p *faulty) served(t *testing.T) []string {
	t.Helper()
	return p.daemon.exchanges(t).served()
}

func registryAt(url, caFile string) map[string]cache.Registry {
	return map[string]cache.Registry{faultyHost: {Upstreams: []cache.Upstream{{URL: url, CAFile: caFile}}}}
}

// startCache runs a cache until the test ends, and returns its address.
func startCache(t *testing.T, config cache.Config) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	config.Listener = listener
	if config.Dir == "" {
		config.Dir = t.TempDir()
	}
	config.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	c, err := cache.New(config)
	if err != nil {
		t.Fatal(err)
	}
	startPart(t, "cache", c.Run)
	return listener.Addr().String()
}

// upstreamFaults are the ways in which a registry is broken: each makes a
// server of a healthy one's handler.
var upstreamFaults = []struct {
	name     string
	upstream func(t *testing.T, healthy http.Handler) (url, caFile string)
	attempts int  // that containerd may need by itself; 0: one
	mends    bool // the cache may make up for it
}{
	{name: "refused", upstream: func(t *testing.T, _ http.Handler) (string, string) {
		listener := listen(t)
		listener.Close()
		return "http://" + listener.Addr().String(), ""
	}},
	{name: "black-holed", upstream: func(t *testing.T, _ http.Handler) (string, string) {
		return "http://" + blackHole(t), ""
	}},
	{name: "black-holed TLS", upstream: func(t *testing.T, _ http.Handler) (string, string) {
		return "https://" + blackHole(t), ""
	}},
	{name: "expired certificate", upstream: expired},
	{name: "500", upstream: answering(http.StatusInternalServerError)},
	{name: "401 Basic", upstream: answering(http.StatusUnauthorized, `Basic realm="registry"`)},
	{name: "401 Bearer", upstream: answering(http.StatusUnauthorized, `Bearer realm="http://127.0.0.1:1/token",service="registry"`)},
	{name: "408", upstream: answering(http.StatusRequestTimeout)},
	{name: "429", upstream: answering(http.StatusTooManyRequests)},
	{name: "reset mid-blob", mends: true, upstream: breaking(func(conn *net.TCPConn) {
		_ = conn.SetLinger(0)
	})},
	{name: "short body", mends: true, upstream: breaking(func(*net.TCPConn) {})},
	{name: "stalled mid-blob", upstream: breaking(func(conn *net.TCPConn) {
		_, _ = io.Copy(io.Discard, conn) // until the cache has enough of it
	})},
	// The layer is taken back at its end; what containerd has of it by then is
	// wrong, and it begins anew.
	{name: "wrong bytes", attempts: 2, upstream: changing(func(body []byte) []byte {
		body[len(body)/2] ^= 0x10
		return body
	})},
	{name: "short body that looks complete", attempts: 2, upstream: changing(func(body []byte) []byte {
		return body[:len(body)/2]
	})},
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// blackHole takes connections, as far as the kernel does, and never answers.
func blackHole(t *testing.T) string {
	t.Helper()
	l := listen(t)
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

func serve(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return server.URL
}

func answering(status int, challenge ...string) func(*testing.T, http.Handler) (string, string) {
	return func(t *testing.T, _ http.Handler) (string, string) {
		return serve(t, func(w http.ResponseWriter, _ *http.Request) {
			for _, c := range challenge {
				w.Header().Set("WWW-Authenticate", c)
			}
			w.WriteHeader(status)
		}), ""
	}
}

// largeBlob is the answer of a healthy registry to a GET of a blob that is
// worth a fault; ok is false for anything else, which is answered.
func largeBlob(healthy http.Handler, w http.ResponseWriter, r *http.Request) (answer *httptest.ResponseRecorder, ok bool) {
	answer = httptest.NewRecorder()
	healthy.ServeHTTP(answer, r)
	large := r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") && answer.Body.Len() > 6<<20
	if !large {
		maps.Copy(w.Header(), answer.Header())
		w.WriteHeader(answer.Code)
		_, _ = w.Write(answer.Body.Bytes())
	}
	return answer, large
}

// breaking sends 5 MiB of every large blob, and ends the connection in its way.
func breaking(end func(*net.TCPConn)) func(*testing.T, http.Handler) (string, string) {
	return func(t *testing.T, healthy http.Handler) (string, string) {
		return serve(t, func(w http.ResponseWriter, r *http.Request) {
			answer, ok := largeBlob(healthy, w, r)
			if !ok {
				return
			}
			conn, out, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			fmt.Fprintf(out, "HTTP/1.1 %d x\r\nContent-Length: %d\r\n", answer.Code, answer.Body.Len())
			if of := answer.Header().Get("Content-Range"); of != "" {
				fmt.Fprintf(out, "Content-Range: %s\r\n", of)
			}
			fmt.Fprint(out, "\r\n")
			_, _ = out.Write(answer.Body.Bytes()[:5<<20])
			_ = out.Flush()
			end(conn.(*net.TCPConn))
		}), ""
	}
}

// changing alters every large blob.
func changing(change func([]byte) []byte) func(*testing.T, http.Handler) (string, string) {
	return func(t *testing.T, healthy http.Handler) (string, string) {
		return serve(t, func(w http.ResponseWriter, r *http.Request) {
			whole := r.Clone(r.Context())
			whole.Header.Del("Range") // it is the same whichever part is asked for
			if answer, ok := largeBlob(healthy, w, whole); ok {
				body := change(answer.Body.Bytes())
				w.Header().Set("Content-Length", strconv.Itoa(len(body)))
				_, _ = w.Write(body)
			}
		}), ""
	}
}

// expired serves with a certificate whose time is over.
func expired(t *testing.T, healthy http.Handler) (url, caFile string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(-24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(healthy)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	caFile = filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return server.URL, caFile
}

// TestFullDisk gives the cache a disk that one of the layers does not fit on:
// the pull goes through it all the same, and the other layer is kept.
func TestFullDisk(t *testing.T) {
	p := startFaulty(t, daemonConfig{})
	healthy := serve(t, p.sound.server.Config.Handler.ServeHTTP)
	c := startCacheProcess(t, cacheProcessConfig{
		Dir: filepath.Join(t.TempDir(), "cache"), DiskSize: 12 << 20,
		Registries: []string{faultyHost}, Upstream: healthy,
	})
	for range 2 {
		p.sound.reset()
		p.pull(t, c.host, 1)
		traffic := p.daemon.exchanges(t)
		if got := traffic.served(); len(got) != 1 || got[0] != c.host {
			t.Errorf("hosts that served: %v, want the cache alone", got)
		}
		if got := traffic.cacheStatus(); got["fwd=bypass; detail=no-space"] == 0 {
			t.Errorf("Cache-Status %v: want a layer that was passed through for lack of room", got)
		}
	}
}

// TestClockJumps pulls after the node's clock has jumped to either side, from
// the registry and then from the cache alone.
func TestClockJumps(t *testing.T) {
	p := startFaulty(t, daemonConfig{})
	for _, jump := range []time.Duration{72 * time.Hour, -72 * time.Hour, 87600 * time.Hour, -87600 * time.Hour} {
		t.Run(jump.String(), func(t *testing.T) {
			var offset atomic.Int64
			down := atomic.Bool{}
			url := serve(t, func(w http.ResponseWriter, r *http.Request) {
				if down.Load() {
					w.WriteHeader(http.StatusInternalServerError)
					return
				}
				p.sound.server.Config.Handler.ServeHTTP(w, r)
			})
			c := startWatchedCache(t, cache.Config{
				Registries: registryAt(url, ""),
				Now:        func() time.Time { return time.Now().Add(time.Duration(offset.Load())) },
			})
			p.pull(t, c.host, 1)
			offset.Store(int64(jump))
			p.served(t)
			p.pull(t, c.host, 1)
			if got := p.served(t); !slices.Equal(got, []string{c.host}) {
				t.Errorf("hosts that served: %v, want the cache alone", got)
			}
			down.Store(true)
			offset.Store(0)
			p.pull(t, c.host, 1) // from wherever it can be had
			offset.Store(int64(jump))
			p.pull(t, c.host, 1)
			c.check(t)
		})
	}
}

// TestDamagedStore damages the cache's directory in several ways while the
// registry is down: the pull gets the right bytes from the next host.
func TestDamagedStore(t *testing.T) {
	for _, test := range []struct {
		name   string
		damage func(t *testing.T, path string)
	}{
		{"truncated", func(t *testing.T, path string) { must(t, os.Truncate(path, 1000)) }},
		{"emptied", func(t *testing.T, path string) { must(t, os.Truncate(path, 0)) }},
		{"removed", func(t *testing.T, path string) { must(t, os.Remove(path)) }},
		{"flipped", flipByte},
		{"directory in its place", func(t *testing.T, path string) {
			must(t, os.Remove(path))
			must(t, os.Mkdir(path, 0o700))
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := startFaulty(t, daemonConfig{})
			up := httptest.NewServer(p.sound.server.Config.Handler)
			dir := t.TempDir()
			c := startWatchedCache(t, cache.Config{Dir: dir, Registries: registryAt(up.URL, "")})
			p.pull(t, c.host, 1)
			p.served(t)
			up.CloseClientConnections()
			up.Close()
			for _, layer := range p.image.layers {
				digest, err := layer.Digest()
				must(t, err)
				for _, path := range filesOf(t, dir, digest) {
					test.damage(t, path)
				}
			}
			p.pull(t, c.host, 1)
			if got := p.served(t); !slices.Contains(got, p.sound.host) {
				t.Errorf("hosts that served: %v, want the sound one among them", got)
			}
			c.check(t)
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestContentStore has the cache serve what containerd has pulled without it.
func TestContentStore(t *testing.T) {
	p := startFaulty(t, daemonConfig{})
	writeHostsFile(t, filepath.Join(p.certs, faultyHost, "hosts.toml"), fmt.Sprintf("server = 'http://%s'\n", p.sound.host))
	pullAndCheck(t, p.daemon, faultyRef, p.image)
	dir := t.TempDir()
	c := startCache(t, cache.Config{
		Dir: dir, Registries: registryAt("http://"+p.sound.host, ""), ContentStore: p.daemon.socket,
	})
	p.sound.reset()
	for _, layer := range p.image.layers {
		want, err := layer.Digest()
		must(t, err)
		resp, err := http.Get("http://" + c + "/v2/" + repository + "/blobs/" + want.String() + "?ns=" + faultyHost)
		must(t, err)
		got, _, err := v1.SHA256(resp.Body)
		resp.Body.Close()
		if err != nil || got != want {
			t.Errorf("%s: got %s, %v", want, got, err)
		}
		if got := resp.Header.Get("Cache-Status"); got != "connected-registry; hit; detail=containerd" {
			t.Errorf("Cache-Status %q", got)
		}
		if found := filesOf(t, dir, want); len(found) > 0 {
			t.Errorf("it is kept a second time: %v", found)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	if got := p.sound.count(http.MethodGet, "/blobs/"); got > 0 {
		t.Errorf("the registry was asked for %v", p.sound.seen())
	}
}
