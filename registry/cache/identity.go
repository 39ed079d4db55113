package cache

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"
)

// identity is a node's certificate among its peers, and whose it trusts. The
// files are read again when they change; connections that stand go on.
type identity struct {
	cfg PeerConfig
	ca  *authorities
	log *slog.Logger

	mu      sync.Mutex // guards everything below
	changed time.Time
	pair    *tls.Certificate // the last good one
}

func newIdentity(cfg PeerConfig, log *slog.Logger) *identity {
	return &identity{cfg: cfg, ca: &authorities{path: cfg.CAFile, log: log}, log: log}
}

func (id *identity) certificate() (*tls.Certificate, error) {
	id.mu.Lock()
	defer id.mu.Unlock()
	fi, err := os.Stat(id.cfg.CertFile)
	if err == nil && id.pair != nil && fi.ModTime().Equal(id.changed) {
		return id.pair, nil
	}
	pair, loadErr := tls.LoadX509KeyPair(id.cfg.CertFile, id.cfg.KeyFile)
	switch {
	case loadErr == nil:
		id.pair = &pair
		if err == nil {
			id.changed = fi.ModTime()
		}
	case id.pair == nil:
		return nil, fmt.Errorf("this node's certificate for its peers: %w", loadErr)
	default:
		id.log.Warn("the certificate for peers cannot be read; the last good one is used", "error", loadErr)
	}
	return id.pair, nil
}

// dial connects to a peer.
func (id *identity) dial(ctx context.Context, d *net.Dialer, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.Timeout)
	defer cancel()
	dialer := tls.Dialer{NetDialer: d, Config: &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return id.certificate()
		},
		// Peers are reached by addresses that come and go, and are known by
		// their authority alone: verify does what is left out here.
		InsecureSkipVerify: true, //nolint:gosec // see verify
		VerifyConnection:   id.verify,
	}}
	return dialer.DialContext(ctx, network, addr)
}

// serverConfig is for connections from peers.
func (id *identity) serverConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return id.certificate()
		},
		ClientAuth:       tls.RequireAnyClientCert,
		VerifyConnection: id.verify,
	}
}

// verify accepts a certificate that the authorities have signed for TLS.
func (id *identity) verify(state tls.ConnectionState) error {
	pool, err := id.ca.pool(false)
	if err != nil {
		return err
	}
	if len(state.PeerCertificates) == 0 {
		return errors.New("the peer has no certificate")
	}
	between := x509.NewCertPool()
	for _, cert := range state.PeerCertificates[1:] {
		between.AddCert(cert)
	}
	_, err = state.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots: pool, Intermediates: between,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return &tls.CertificateVerificationError{UnverifiedCertificates: state.PeerCertificates, Err: err}
	}
	return nil
}
