package containerd

import (
	"bytes"
	"encoding/pem"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// parent is the registry that images come from, on loopback. It counts what it
// is asked.
type parent struct {
	host   string // host:port
	server *httptest.Server

	mu       sync.Mutex
	requests []*http.Request
}

// startParent starts an empty parent, over plain HTTP or over TLS with a
// certificate that no system trusts.
func startParent(t *testing.T, overTLS bool) *parent {
	t.Helper()
	p := &parent{}
	backend := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	p.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		p.requests = append(p.requests, r.Clone(r.Context()))
		p.mu.Unlock()
		serveRange(backend, w, r)
	}))
	if overTLS {
		p.server.StartTLS()
	} else {
		p.server.Start()
	}
	t.Cleanup(p.stop)
	p.host = p.server.Listener.Addr().String()
	return p
}

// serveRange answers the open ranges ("bytes=0-") that containerd asks for and
// that go-containerregistry's registry refuses.
func serveRange(backend http.Handler, w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet || r.Header.Get("Range") == "" || !strings.Contains(r.URL.Path, "/blobs/") {
		backend.ServeHTTP(w, r)
		return
	}
	whole := r.Clone(r.Context())
	whole.Header.Del("Range")
	recorder := httptest.NewRecorder()
	backend.ServeHTTP(recorder, whole)
	maps.Copy(w.Header(), recorder.Header())
	if recorder.Code != http.StatusOK {
		w.WriteHeader(recorder.Code)
		_, _ = w.Write(recorder.Body.Bytes())
		return
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(recorder.Body.Bytes()))
}

// certificate is the PEM of the certificate that the parent serves with and
// that signs itself; nil over plain HTTP.
func (p *parent) certificate() []byte {
	certificate := p.server.Certificate()
	if certificate == nil {
		return nil
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw})
}

// stop makes the parent refuse connections. It may be called more than once.
func (p *parent) stop() {
	p.server.CloseClientConnections()
	p.server.Close()
}

func (p *parent) push(t *testing.T, repositoryTag string, image *testImage) {
	t.Helper()
	// go-containerregistry takes a loopback address for plain HTTP unless its
	// transport says otherwise.
	ref, err := name.ParseReference(p.host + "/" + repositoryTag)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, image.index, remote.WithTransport(p.server.Client().Transport)); err != nil {
		t.Fatalf("seeding the parent: %v", err)
	}
}

// reset forgets what was asked so far.
func (p *parent) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.requests = nil
}

// seen is what was asked since the last reset, a line for each request.
func (p *parent) seen() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var lines []string
	for _, r := range p.requests {
		lines = append(lines, strings.TrimSpace(r.Method+" "+r.URL.String()+" "+r.Header.Get("Range")))
	}
	return lines
}

// count is the number of requests of that method whose path holds part.
func (p *parent) count(method, part string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, r := range p.requests {
		if r.Method == method && strings.Contains(r.URL.Path, part) {
			n++
		}
	}
	return n
}

// ranged says whether a part of a blob from its middle was asked for.
func (p *parent) ranged() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.requests {
		if v := r.Header.Get("Range"); v != "" && !strings.HasPrefix(v, "bytes=0-") {
			return true
		}
	}
	return false
}
