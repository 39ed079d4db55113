package trust

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

const (
	authorityLife = 10 * 365 * 24 * time.Hour
	servingLife   = 2 * 365 * 24 * time.Hour
	// backdate lets machines whose clocks are a little behind take a
	// certificate that was just made.
	backdate = time.Hour
)

// Authority is the built-in certificate authority: one ECDSA P-256 root that
// issues the registry's serving certificate when none is given from elsewhere.
// It is kept in a directory ([LoadOrCreateAuthority]) or wherever the caller
// keeps what [Authority.PEM] returns.
type Authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewAuthority makes a root with a new key, valid for ten years from now, path
// length 0.
func NewAuthority(now time.Time) (*Authority, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	a := &Authority{key: key}
	return a, a.sign(now)
}

// ParseAuthority reads what [Authority.PEM] wrote. Errors never repeat any of
// the input.
func ParseAuthority(cert, key []byte) (*Authority, error) {
	parsed, err := parseCertificate(cert)
	if err != nil {
		return nil, fmt.Errorf("the CA %w", err)
	}
	a := &Authority{cert: parsed}
	if a.key, err = parseKey(key); err != nil {
		return nil, fmt.Errorf("the CA's key %w", err)
	}
	switch {
	case !a.key.PublicKey.Equal(parsed.PublicKey):
		return nil, errors.New("the CA and its key do not belong together")
	case !isCA(parsed):
		return nil, errors.New("the CA is not a CA certificate")
	}
	return a, nil
}

// PEM returns the root certificate and its private key, which nobody but the
// authority may read.
func (a *Authority) PEM() (cert, key []byte, err error) {
	key, err = encodeKey(a.key)
	return encodeCertificate(a.cert), key, err
}

// NearsEnd reports whether the root ends before a serving certificate would
// that was issued at now.
func (a *Authority) NearsEnd(now time.Time) bool { return a.cert.NotAfter.Sub(now) <= servingLife }

// sign makes a root certificate for the key.
func (a *Authority) sign(now time.Time) error {
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "Connected Registry CA", Organization: []string{"connected-registry"}},
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
	}
	if a.cert != nil {
		// The same name and key identifier, or what was issued would no
		// longer find its issuer.
		template.RawSubject = a.cert.RawSubject
		template.SubjectKeyId = a.cert.SubjectKeyId
	}
	cert, err := issue(template, nil, a.key, now, authorityLife)
	if err != nil {
		return err
	}
	a.cert = cert
	return nil
}

// Bundle holds the authority's own certificate.
func (a *Authority) Bundle() Bundle { return newBundle([]*x509.Certificate{a.cert}) }

// Issue makes a serving certificate with a new key for hosts, DNS names or IP
// addresses without port. It is valid for two years, at most to the authority's
// end.
func (a *Authority) Issue(hosts []string, now time.Time) (cert, key []byte, err error) {
	names, err := parseNames(hosts)
	if err != nil {
		return nil, nil, err
	}
	private, err := newKey()
	if err != nil {
		return nil, nil, err
	}
	issued, err := issue(names.template(), a, private, now, servingLife)
	if err != nil {
		return nil, nil, err
	}
	key, err = encodeKey(private)
	return encodeCertificate(issued), key, err
}

// Current reports whether cert can go on being served for hosts: the authority
// issued it, for these names and no others, and more than a third of its life
// is left. The error is about hosts.
func (a *Authority) Current(cert *x509.Certificate, hosts []string, now time.Time) (bool, error) {
	names, err := parseNames(hosts)
	return err == nil && a.current(cert, names, now), err
}

// current reports whether cert can go on being served.
func (a *Authority) current(cert *x509.Certificate, n names, now time.Time) bool {
	life := cert.NotAfter.Sub(cert.NotBefore)
	return cert.NotAfter.Sub(now) > life/3 &&
		!now.Before(cert.NotBefore) &&
		cert.CheckSignatureFrom(a.cert) == nil &&
		n.equal(namesOf(cert))
}

// names are subject alternative names, sorted and without duplicates.
type names struct {
	dns []string
	ips []netip.Addr
}

func parseNames(hosts []string) (names, error) {
	var n names
	for _, h := range hosts {
		if addr, err := netip.ParseAddr(h); err == nil && addr.Zone() == "" {
			n.ips = append(n.ips, addr.Unmap())
			continue
		}
		if _, port, err := ParseHost(h); err != nil || port != "" || strings.HasPrefix(h, "[") {
			return names{}, fmt.Errorf("host %.100q: give a DNS name or an IP address, without port and brackets", h)
		}
		n.dns = append(n.dns, strings.ToLower(h))
	}
	if len(n.dns)+len(n.ips) == 0 {
		return names{}, errors.New("no host: give at least one DNS name or IP address")
	}
	n.sort()
	return n, nil
}

func namesOf(cert *x509.Certificate) names {
	n := names{dns: slices.Clone(cert.DNSNames)}
	for _, ip := range cert.IPAddresses {
		if addr, ok := netip.AddrFromSlice(ip); ok {
			n.ips = append(n.ips, addr.Unmap())
		}
	}
	n.sort()
	return n
}

func (n *names) sort() {
	slices.Sort(n.dns)
	n.dns = slices.Compact(n.dns)
	slices.SortFunc(n.ips, netip.Addr.Compare)
	n.ips = slices.Compact(n.ips)
}

func (n names) equal(o names) bool {
	return slices.Equal(n.dns, o.dns) && slices.Equal(n.ips, o.ips)
}

func (n names) template() *x509.Certificate {
	t := &x509.Certificate{
		// A common name is for people; it has a limit of 64 characters, which
		// DNS names may exceed.
		Subject:     pkix.Name{CommonName: "connected-registry"},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:    n.dns,
		// A leaf that says so cannot be mistaken for a CA.
		BasicConstraintsValid: true,
	}
	for _, ip := range n.ips {
		t.IPAddresses = append(t.IPAddresses, net.IP(ip.AsSlice()))
	}
	return t
}

// issue signs template for key, by issuer or, if that is nil, by key itself.
func issue(template *x509.Certificate, issuer *Authority, key *ecdsa.PrivateKey, now time.Time, life time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial.Add(serial, big.NewInt(1))
	template.NotBefore = now.Add(-backdate)
	template.NotAfter = now.Add(life)
	parent, signer := template, key
	if issuer != nil {
		parent, signer = issuer.cert, issuer.key
		if template.NotAfter.After(parent.NotAfter) {
			template.NotAfter = parent.NotAfter
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	return x509.ParseCertificate(der)
}

// errUnusable marks what is there but holds nothing that could be used.
var errUnusable = errors.New("unusable")

func parseCertificate(data []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("holds no certificate (%w): put it back from a copy", errUnusable)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("holds a certificate that does not parse (%w): %w", errUnusable, err)
	}
	return cert, nil
}

func encodeCertificate(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

func newKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

func parseKey(data []byte) (*ecdsa.PrivateKey, error) {
	unusable := fmt.Errorf("holds no ECDSA P-256 key (%w): put it back from a copy", errUnusable)
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, unusable
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, unusable
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, unusable
	}
	return key, nil
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
