package controller

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

// PeersSecret is what the caches of nodes know one another by, mounted into the
// agents: a certificate, its key and its CA. All nodes have the same: whoever
// holds it may read what is in the caches, and is one of the nodes. To shut out
// one that got away, delete it, and it is made anew.
const PeersSecret = "connected-registry-peers"

const (
	keyCA          = "ca.crt"
	keyCertificate = "tls.crt"
	keyPrivate     = "tls.key"
	// peersName is the certificate's; nobody asks for it, since nodes are
	// reached by their addresses.
	peersName = "peers.connected-registry.internal"
)

// renderPeers makes PeersSecret while nodes ask one another, and removes it when
// they do not.
func (l *loop) renderPeers(ctx context.Context, cr *v1alpha1.ConnectedRegistry, secrets *secretReader) error {
	was, err := secrets.get(ctx, PeersSecret)
	if err != nil {
		return err
	}
	if !cr.Spec.NodeCache.Peers || cr.Spec.TrustDistribution.Disabled {
		return l.removeSecret(ctx, PeersSecret, was)
	}
	now := time.Now()
	if was != nil && peersAreGood(was.Data, now) {
		return l.writeSecret(ctx, cr, PeersSecret, was, was.Data)
	}
	data, err := newPeers(now)
	if err != nil {
		return err
	}
	l.log.Info("making a new certificate for the caches of nodes: until each has it, those that have and those that have not ask the registry instead of one another")
	return l.writeSecret(ctx, cr, PeersSecret, was, data)
}

// newPeers makes a CA, has it sign one certificate, and forgets its key: nothing
// else is ever trusted for its sake.
func newPeers(now time.Time) (map[string][]byte, error) {
	authority, err := trust.NewAuthority(now)
	if err != nil {
		return nil, err
	}
	cert, key, err := authority.Issue([]string{peersName}, now)
	if err != nil {
		return nil, err
	}
	return map[string][]byte{keyCA: authority.Bundle().PEM(), keyCertificate: cert, keyPrivate: key}, nil
}

// peersAreGood reports whether all parts belong together, and more than a third
// of the certificate's life is left.
func peersAreGood(data map[string][]byte, now time.Time) bool {
	pair, err := tls.X509KeyPair(data[keyCertificate], data[keyPrivate])
	if err != nil {
		return false
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(data[keyCA])
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return false
	}
	return pair.Leaf.NotAfter.Sub(now) > pair.Leaf.NotAfter.Sub(pair.Leaf.NotBefore)/3
}
