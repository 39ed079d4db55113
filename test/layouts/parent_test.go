package layouts

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/connected-registry/connected-registry/test/cluster"
)

const (
	parentHost     = "parent.example.com"
	parentUser     = "edge-sync"
	parentPassword = "the-parent's-password"
)

// parent is a registry outside the cluster that wants credentials, and serves
// from the test itself until it is stopped.
type parent struct {
	pair   pair
	store  *httptest.Server // the same content, for seeding
	server *http.Server
	done   chan struct{}
	next   int
}

func newParent(t *testing.T, c *cluster.Cluster) *parent {
	t.Helper()
	content := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	p := &parent{pair: newPair(t), store: httptest.NewServer(content), done: make(chan struct{})}
	t.Cleanup(p.store.Close)
	if err := c.AddHost(parentHost, c.HostAddr()); err != nil {
		t.Fatal(err)
	}
	certificate, err := tls.X509KeyPair(p.pair.cert, p.pair.key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", netip.AddrPortFrom(c.HostAddr(), 443).String(), &tls.Config{Certificates: []tls.Certificate{certificate}})
	if err != nil {
		t.Fatal(err)
	}
	p.server = &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != parentUser || password != parentPassword {
			w.Header().Set("WWW-Authenticate", `Basic realm="parent"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		content.ServeHTTP(w, r)
	})}
	go func() {
		defer close(p.done)
		_ = p.server.Serve(l) // ends by stop
	}()
	t.Cleanup(p.stop)
	return p
}

// stop ends the registry; nothing answers at its address then.
func (p *parent) stop() {
	p.server.Close()
	<-p.done
}

// fill gives the parent so many images of hello-world under the tags that take
// gives out.
func (p *parent) fill(t *testing.T, n int) {
	t.Helper()
	base, err := cluster.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		// A random layer is a tar of one file.
		layer, err := random.Layer(20_000, types.DockerLayer)
		if err != nil {
			t.Fatal(err)
		}
		image, err := mutate.AppendLayers(base, layer)
		if err != nil {
			t.Fatal(err)
		}
		ref, err := name.NewTag(fmt.Sprint(p.store.Listener.Addr(), "/hello-world:t", i), name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref, image); err != nil {
			t.Fatal(err)
		}
	}
}

// take returns a tag that was not taken yet, so that pulling it is work.
func (p *parent) take() string {
	p.next++
	return fmt.Sprint("t", p.next-1)
}

// pair is the parent's certificate, which signs itself, with its key, in PEM.
type pair struct{ cert, key []byte }

func newPair(t *testing.T) pair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: parentHost},
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		DNSNames:              []string{parentHost},
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
