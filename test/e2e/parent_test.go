package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/connected-registry/connected-registry/test/cluster"
)

const (
	parentHost     = "parent.example.com"
	parentUser     = "edge-sync"
	parentPassword = "the-parent's-password"
)

// parent is a registry outside the cluster that wants credentials. It serves
// from the test itself and can be stopped.
type parent struct {
	addr    netip.AddrPort
	handler http.Handler
	pair    pair

	mu     sync.Mutex // guards server
	server *http.Server
	done   chan struct{}

	store *httptest.Server // the same content, for seeding
	next  atomic.Int64
}

func newParent(t *testing.T, c *cluster.Cluster) *parent {
	t.Helper()
	content := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	p := &parent{
		addr:  netip.AddrPortFrom(c.HostAddr(), 443),
		pair:  newPair(t, []string{parentHost}, nil),
		store: httptest.NewServer(content),
	}
	p.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != parentUser || password != parentPassword {
			w.Header().Set("WWW-Authenticate", `Basic realm="parent"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		content.ServeHTTP(w, r)
	})
	t.Cleanup(p.store.Close)
	t.Cleanup(p.stop)
	if err := c.AddHost(parentHost, c.HostAddr()); err != nil {
		t.Fatal(err)
	}
	p.start(t)
	return p
}

func (p *parent) start(t *testing.T) {
	t.Helper()
	certificate, err := tls.X509KeyPair(p.pair.cert, p.pair.key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", p.addr.String(), &tls.Config{Certificates: []tls.Certificate{certificate}})
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	server, done := &http.Server{Handler: p.handler, ErrorLog: log.New(io.Discard, "", 0)}, make(chan struct{})
	p.server, p.done = server, done
	go func() {
		defer close(done)
		_ = server.Serve(l) // ends by stop
	}()
}

// stop ends the registry; nothing answers at its address then.
func (p *parent) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.server != nil {
		p.server.Close()
		<-p.done
		p.server = nil
	}
}

// push makes an image that nobody has seen before, whose only program ends at
// once, and gives it to the parent as hello-world:tag.
func (p *parent) push(t *testing.T, tag string) {
	t.Helper()
	image, err := cluster.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	image = unique(t, image)
	ref, err := name.NewTag(p.store.Listener.Addr().String()+"/hello-world:"+tag, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, image); err != nil {
		t.Fatal(err)
	}
}

// pushLayers gives the parent an image of layers of so many bytes, which nothing
// makes smaller.
func (p *parent) pushLayers(t *testing.T, image string, sizes ...int) {
	t.Helper()
	made, err := cluster.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	for i, size := range sizes {
		content := make([]byte, size)
		rand.Read(content)
		var archive bytes.Buffer
		w := tar.NewWriter(&archive)
		err := w.WriteHeader(&tar.Header{Name: fmt.Sprint("content-", i), Mode: 0o644, Size: int64(size), Typeflag: tar.TypeReg})
		if _, e := w.Write(content); err == nil {
			err = e
		}
		if err = errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
		if made, err = mutate.AppendLayers(made, static.NewLayer(archive.Bytes(), types.OCIUncompressedLayer)); err != nil {
			t.Fatal(err)
		}
	}
	ref, err := name.NewTag(p.store.Listener.Addr().String()+"/"+image, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, made); err != nil {
		t.Fatal(err)
	}
}

func unique(t *testing.T, image v1.Image) v1.Image {
	t.Helper()
	layer, err := random.Layer(20_000, types.DockerLayer)
	if err != nil {
		t.Fatal(err)
	}
	// A random layer is a tar of one file.
	if image, err = mutate.AppendLayers(image, layer); err != nil {
		t.Fatal(err)
	}
	return image
}

// fill pushes so many images under the names that take gives out.
func (p *parent) fill(t *testing.T, n int) {
	t.Helper()
	for i := range n {
		p.push(t, fmt.Sprint("t", i))
	}
}

// take returns a tag that was not taken yet, so that pulling it is work.
func (p *parent) take() string { return fmt.Sprint("t", p.next.Add(1)-1) }

// pair is a certificate that signs itself, with its key, in PEM.
type pair struct{ cert, key []byte }

func newPair(t *testing.T, names []string, addrs []net.IP) pair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: fmt.Sprint("end to end ", names, addrs)},
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		DNSNames: names, IPAddresses: addrs,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pair{
		cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
	}
}
