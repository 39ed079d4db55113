package certificates_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	coordination "k8s.io/client-go/applyconfigurations/coordination/v1"

	"github.com/connected-registry/connected-registry/syncer/certificates"
	"github.com/connected-registry/connected-registry/trust"
)

const (
	service  = "connected-registry"
	replicas = 2
	address  = "10.0.0.10" // that nodes call the registry by, in the certificate
)

// world is the part of the cluster that the test plays: one agent for each
// node, replicas, and a client on each node that pulls all the time.
type world struct {
	*site
	wg       sync.WaitGroup
	serving  [replicas]atomic.Pointer[tls.Certificate]
	addrs    [replicas]string
	trusted  atomic.Pointer[trust.Bundle]
	pulls    atomic.Int64
	failures chan error
}

func newWorld(t *testing.T, s *site) *world {
	w := &world{site: s, failures: make(chan error, 1)}
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() {
		cancel()
		w.wg.Wait()
	})
	for i := range replicas {
		w.listen(ctx, t, i)
	}
	w.every(ctx, 100*time.Millisecond, func() error { return w.agent(ctx) })
	w.every(ctx, time.Second, func() error { return w.kubelet(ctx) })
	w.every(ctx, 10*time.Millisecond, func() error { return w.pull(ctx) })
	return w
}

// every calls f until ctx ends. The first error is kept for the test.
func (w *world) every(ctx context.Context, period time.Duration, f func() error) {
	w.wg.Go(func() {
		for {
			if err := f(); err != nil && ctx.Err() == nil {
				select {
				case w.failures <- err:
				default:
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(period):
			}
		}
	})
}

// listen starts a replica on an address that is none of loopback's, which the
// API server takes in no EndpointSlice.
func (w *world) listen(ctx context.Context, t *testing.T, i int) {
	config := &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		if p := w.serving[i].Load(); p != nil {
			return p, nil
		}
		return nil, errors.New("not started")
	}}
	l, err := tls.Listen("tcp", netip.AddrPortFrom(w.HostAddr(), 0).String(), config)
	if err != nil {
		t.Fatal(err)
	}
	w.addrs[i] = l.Addr().String()
	context.AfterFunc(ctx, func() { _ = l.Close() })
	w.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			w.wg.Go(func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
				_ = conn.(*tls.Conn).HandshakeContext(ctx)
			})
		}
	})
	port := int32(l.Addr().(*net.TCPAddr).Port)
	ready, name := true, "https"
	_, err = w.kube.DiscoveryV1().EndpointSlices(namespace).Create(t.Context(), &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: fmt.Sprintf("replica-%d", i), Namespace: namespace, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{w.HostAddr().String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// agent does for the node what the node agent does: take the bundle, then say
// so in the Lease.
func (w *world) agent(ctx context.Context) error {
	secret, err := w.kube.CoreV1().Secrets(namespace).Get(ctx, certificates.CASecret, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	b, _, err := trust.ParseBundle(secret.Data["ca.crt"], time.Now())
	if err != nil {
		return fmt.Errorf("what is published: %w", err)
	}
	if old := w.trusted.Load(); old != nil && old.Equal(b) {
		return nil
	}
	w.trusted.Store(&b)
	lease := coordination.Lease("connected-registry-node-"+w.Nodes()[0].Name(), namespace).
		WithLabels(map[string]string{"app.kubernetes.io/component": "node-agent"}).
		WithAnnotations(map[string]string{"connectedregistry.io/ca-fingerprints": strings.Join(b.Fingerprints(), ",")})
	_, err = w.kube.CoordinationV1().Leases(namespace).Apply(ctx, lease, metav1.ApplyOptions{FieldManager: "agent"})
	return err
}

// kubelet delivers the serving certificate to one replica after the other, a
// second apart.
func (w *world) kubelet(ctx context.Context) error {
	secret, err := w.kube.CoreV1().Secrets(namespace).Get(ctx, certificates.TLSSecret, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	pair, err := tls.X509KeyPair(secret.Data["tls.crt"], secret.Data["tls.key"])
	if err != nil {
		return fmt.Errorf("what replicas are to serve: %w", err)
	}
	for i := range w.serving {
		if old := w.serving[i].Load(); old == nil || !old.Leaf.Equal(pair.Leaf) {
			w.serving[i].Store(&pair)
			return nil
		}
	}
	return nil
}

// pull makes the handshake of a pull with every replica.
func (w *world) pull(ctx context.Context) error {
	trusted := w.trusted.Load()
	if trusted == nil {
		return nil
	}
	for i, addr := range w.addrs {
		if w.serving[i].Load() == nil {
			continue
		}
		// A client that took long to connect is judged by what its node trusts
		// now.
		if err := dial(ctx, addr, trusted.Pool()); err != nil && trusted == w.trusted.Load() {
			return fmt.Errorf("pulling from replica %d: %w", i, err)
		}
		w.pulls.Add(1)
	}
	return nil
}

func dial(ctx context.Context, addr string, roots *x509.CertPool) error {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: patience}, Config: &tls.Config{RootCAs: roots, ServerName: address}}
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	return conn.Close()
}

func (w *world) mustHavePulled(t *testing.T) {
	t.Helper()
	select {
	case err := <-w.failures:
		t.Fatal(err)
	default:
	}
}
