package trust

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"
)

const (
	// lockWait is long enough for another process to make a key and sign.
	lockWait = 15 * time.Second

	authorityCert = "ca.crt"
	authorityKey  = "ca.key"
	servingCert   = "tls.crt"
	servingKey    = "tls.key"
)

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
	case cert != nil && !a.NearsEnd(now):
		return a, nil
	}
	if err := a.sign(now); err != nil {
		return nil, err
	}
	_, err = d.write(authorityCert, encodeCertificate(a.cert), 0o644)
	return a, err
}

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

func isUnusable(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errUnusable)
}

func readCertificate(d *disk, name string) (*x509.Certificate, error) {
	data, err := d.read(name)
	if err != nil {
		return nil, err
	}
	cert, err := parseCertificate(data)
	if err != nil {
		return nil, fmt.Errorf("%s %w", name, err)
	}
	return cert, nil
}

// readKey returns an ECDSA P-256 key and closes its file to others.
func readKey(d *disk, name string) (*ecdsa.PrivateKey, error) {
	data, err := d.read(name)
	if err != nil {
		return nil, err
	}
	key, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("%s %w", name, err)
	}
	_, err = d.write(name, data, 0o600)
	return key, err
}

func createKey(d *disk, name string) (*ecdsa.PrivateKey, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	data, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	_, err = d.write(name, data, 0o600)
	return key, err
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
