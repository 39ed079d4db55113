package trust

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
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
	// lockWait is long enough for another process to make a key and sign.
	lockWait = 15 * time.Second

	authorityCert = "ca.crt"
	authorityKey  = "ca.key"
	servingCert   = "tls.crt"
	servingKey    = "tls.key"
)

// Authority is the built-in certificate authority: one ECDSA P-256 root, kept
// in a directory, that issues the registry's serving certificate when none is
// given from elsewhere.
type Authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// LoadOrCreateAuthority reads ca.crt and ca.key (mode 0600) from dir, which
// must exist, or makes them: a root valid for ten years, path length 0.
//
// The key is written before the certificate and never replaced, so the two
// always belong together: a key alone means that its certificate was never
// published, and one is made for it. A certificate alone is an error, since
// nodes may trust it already and its key cannot be made again. In its last two
// years the root is signed anew with the same key and name; what was issued
// under either verifies under both.
func LoadOrCreateAuthority(dir string, now time.Time) (*Authority, error) {
	a, err := loadOrCreateAuthority(dir, now, nil)
	if err != nil {
		return nil, fmt.Errorf("certificate authority in %s: %w", dir, err)
	}
	return a, nil
}

func loadOrCreateAuthority(dir string, now time.Time, before func(string)) (*Authority, error) {
	d, unlock, err := openLocked(dir, before)
	if err != nil {
		return nil, err
	}
	defer unlock()

	cert, err := readCertificate(d, authorityCert)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	key, err := readKey(d, authorityKey)
	switch {
	case errors.Is(err, fs.ErrNotExist) && cert != nil:
		return nil, fmt.Errorf("%s is there but %s is not: put the key back, or remove the certificate to begin with a new authority", authorityCert, authorityKey)
	case errors.Is(err, fs.ErrNotExist):
		if key, err = createKey(d, authorityKey); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	}
	a := &Authority{cert: cert, key: key}
	switch {
	case cert != nil && !key.PublicKey.Equal(cert.PublicKey):
		return nil, fmt.Errorf("%s and %s do not belong together: put the right one back, or remove both to begin with a new authority", authorityCert, authorityKey)
	case cert != nil && !isCA(cert):
		return nil, fmt.Errorf("%s is not a CA certificate: put the right one back, or remove both %[1]s and %s to begin with a new authority", authorityCert, authorityKey)
	case cert != nil && cert.NotAfter.Sub(now) > servingLife:
		return a, nil
	}
	return a, a.sign(d, now)
}

// sign publishes a root certificate for the key.
func (a *Authority) sign(d *disk, now time.Time) error {
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
	if _, err := d.write(authorityCert, encodeCertificate(cert), 0o644); err != nil {
		return err
	}
	a.cert = cert
	return nil
}

// Bundle holds the authority's own certificate.
func (a *Authority) Bundle() Bundle { return newBundle([]*x509.Certificate{a.cert}) }

// EnsureServing makes sure that dir, which must exist, holds tls.crt and
// tls.key (mode 0600) for hosts, DNS names or IP addresses without port. The
// certificate is valid for two years, at most to the authority's end, and is
// issued again when its names, its issuer or its remaining life (a third) call
// for it; changed says that it was.
//
// A key that is there is used again, so that renewing is one rename and a
// server never reads a certificate and a key that do not match. Only when the
// key was missing or unusable are both new: key first, then certificate, and a
// process killed in between repairs that at its next start.
func (a *Authority) EnsureServing(dir string, hosts []string, now time.Time) (changed bool, err error) {
	changed, err = a.ensureServing(dir, hosts, now, nil)
	if err != nil {
		return changed, fmt.Errorf("serving certificate in %s: %w", dir, err)
	}
	return changed, nil
}

func (a *Authority) ensureServing(dir string, hosts []string, now time.Time, before func(string)) (changed bool, err error) {
	names, err := parseNames(hosts)
	if err != nil {
		return false, err
	}
	d, unlock, err := openLocked(dir, before)
	if err != nil {
		return false, err
	}
	defer unlock()

	key, err := readKey(d, servingKey)
	if err != nil && !isUnusable(err) {
		return false, err
	}
	cert, err := readCertificate(d, servingCert)
	if err != nil && !isUnusable(err) {
		return false, err
	}
	if key != nil && cert != nil && key.PublicKey.Equal(cert.PublicKey) && a.current(cert, names, now) {
		return false, nil
	}
	if key == nil {
		if key, err = createKey(d, servingKey); err != nil {
			return false, err
		}
	}
	cert, err = issue(names.template(), a, key, now, servingLife)
	if err != nil {
		return false, err
	}
	return d.write(servingCert, encodeCertificate(cert), 0o644)
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

// errUnusable marks a file that is there but holds nothing that could be used.
var errUnusable = errors.New("unusable")

func isUnusable(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errUnusable)
}

func readCertificate(d *disk, name string) (*x509.Certificate, error) {
	data, err := d.read(name)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%s holds no certificate (%w): put it back from a copy", name, errUnusable)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s (%w): %w", name, errUnusable, err)
	}
	return cert, nil
}

// readKey returns an ECDSA P-256 key and closes its file to others.
func readKey(d *disk, name string) (*ecdsa.PrivateKey, error) {
	data, err := d.read(name)
	if err != nil {
		return nil, err
	}
	unusable := fmt.Errorf("%s holds no ECDSA P-256 key (%w): put it back from a copy", name, errUnusable)
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
	_, err = d.write(name, data, 0o600)
	return key, err
}

func createKey(d *disk, name string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	_, err = d.write(name, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
	return key, err
}

func encodeCertificate(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

// openLocked opens dir, takes the lock on it, and sweeps what an earlier
// process left half-made there.
func openLocked(dir string, before func(string)) (*disk, func(), error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, nil, err
	}
	d := &disk{root: root, before: before}
	ctx, cancel := context.WithTimeoutCause(context.Background(), lockWait, errors.New("gave up waiting"))
	defer cancel()
	unlock, err := d.lock(ctx, ".")
	if err != nil {
		_ = root.Close()
		return nil, nil, err
	}
	release := func() {
		unlock()
		_ = root.Close()
	}
	if err := d.sweep("."); err != nil {
		release()
		return nil, nil, err
	}
	return d, release, nil
}
