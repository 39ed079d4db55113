package certificates

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/connected-registry/connected-registry/trust"
)

// pair is a serving certificate with its key.
type pair struct {
	cert, key []byte // PEM, as they are served
	chain     []*x509.Certificate
}

// parsePair reads a certificate, what it was issued by, and its key. Errors
// never repeat any of the input.
func parsePair(cert, key []byte) (*pair, error) {
	if len(cert) == 0 || len(key) == 0 {
		return nil, errors.New("tls.crt or tls.key is missing")
	}
	parsed, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("tls.crt and tls.key are no pair: %w", err)
	}
	p := &pair{cert: cert, key: key}
	for _, der := range parsed.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("tls.crt: %w", err)
		}
		p.chain = append(p.chain, c)
	}
	return p, nil
}

func (p *pair) leaf() *x509.Certificate { return p.chain[0] }

func (p *pair) expired(now time.Time) bool { return now.After(p.leaf().NotAfter) }

func (p *pair) equal(o *pair) bool {
	return o != nil && bytes.Equal(p.cert, o.cert) && bytes.Equal(p.key, o.key)
}

// verify reports why the chain does not verify under roots, or, if there are
// none, under those of the system.
func (p *pair) verify(roots trust.Bundle, now time.Time) error {
	return verifyChain(p.chain, roots, now)
}

func verifyChain(chain []*x509.Certificate, roots trust.Bundle, now time.Time) error {
	options := x509.VerifyOptions{Intermediates: x509.NewCertPool(), CurrentTime: now}
	if !roots.Empty() {
		options.Roots = roots.Pool()
	}
	for _, c := range chain[1:] {
		options.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(options)
	return err
}

// missing lists the hosts that the certificate does not name.
func (p *pair) missing(hosts []string) []string {
	var list []string
	for _, h := range hosts {
		if p.leaf().VerifyHostname(h) != nil {
			list = append(list, h)
		}
	}
	return list
}

// hosts are the names that a certificate of ours carries: what nodes, pods and
// people call the registry by.
func hosts(service Service, namespace, domain, loginServer string) []string {
	var list []string
	for _, ip := range service.ClusterIPs {
		list = append(list, ip.String())
	}
	for _, name := range []string{service.Name, service.Name + "-rstorage"} {
		list = append(list, name, name+"."+namespace, name+"."+namespace+".svc", name+"."+namespace+".svc."+domain)
	}
	if host, _, err := trust.ParseHost(loginServer); err == nil {
		list = append(list, strings.ToLower(host))
	}
	return list
}

// called are those of hosts that nodes and people certainly use: the addresses
// and the login server.
func called(service Service, loginServer string) []string {
	var list []string
	for _, ip := range service.ClusterIPs {
		list = append(list, ip.String())
	}
	if host, _, err := trust.ParseHost(loginServer); err == nil {
		list = append(list, host)
	}
	return list
}

// split parts hosts into DNS names and addresses.
func split(hosts []string) (names, addresses []string) {
	for _, h := range hosts {
		if _, err := netip.ParseAddr(h); err == nil {
			addresses = append(addresses, h)
		} else {
			names = append(names, h)
		}
	}
	return names, addresses
}
