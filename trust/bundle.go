package trust

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Bounds on what [ParseBundle] accepts. A Secret holds at most 1 MiB, and no
// registry needs a hundred roots; beyond these something else was pasted in.
const (
	MaxBundleBytes        = 1 << 20
	MaxBundleCertificates = 128
)

// ErrPrivateKey is returned for input that holds a private key. Callers branch
// on it to warn that the key must be regarded as disclosed.
var ErrPrivateKey = errors.New("contains a private key: give certificates only, and replace that key if others could read it")

// Bundle is an immutable set of CA certificates without duplicates, in a stable
// order. Equal sets are equal bundles, however they were written down. The zero
// value is the empty set.
type Bundle struct {
	certs []*x509.Certificate
}

// ParseBundle reads CERTIFICATE blocks from data, which must hold nothing else
// but white space. Each certificate must be a CA or signed by itself.
// Certificates that have expired at now are left out as long as others remain;
// notes has a line for each of them, and for each that is not valid yet.
//
// No error or note repeats any of the input but a certificate's subject, quoted
// and shortened.
func ParseBundle(data []byte, now time.Time) (b Bundle, notes []string, err error) {
	if err := checkBundleInput(data); err != nil {
		return Bundle{}, nil, err
	}
	var certs []*x509.Certificate
	expired := 0
	for n := 1; ; n++ {
		data = bytes.TrimLeft(data, pemSpace)
		if len(data) == 0 {
			break
		}
		if n > MaxBundleCertificates {
			return Bundle{}, nil, fmt.Errorf("more than %d certificates: give only the roots that the registry needs", MaxBundleCertificates)
		}
		var cert *x509.Certificate
		cert, data, err = nextCertificate(data)
		if err != nil {
			return Bundle{}, nil, fmt.Errorf("certificate %d: %w", n, err)
		}
		if now.After(cert.NotAfter) {
			expired++
			notes = append(notes, fmt.Sprintf("certificate %d (%s) expired on %s and is left out", n, subject(cert), cert.NotAfter.UTC().Format(time.DateOnly)))
			continue
		}
		if now.Before(cert.NotBefore) {
			notes = append(notes, fmt.Sprintf("certificate %d (%s) is not valid before %s", n, subject(cert), cert.NotBefore.UTC().Format(time.RFC3339)))
		}
		certs = append(certs, cert)
	}
	switch {
	case len(certs) > 0:
		return newBundle(certs), notes, nil
	case expired > 0:
		return Bundle{}, notes, fmt.Errorf("all certificates have expired (%d): give a current CA certificate", expired)
	default:
		return Bundle{}, nil, errors.New("no certificate: give at least one CA certificate in PEM form")
	}
}

const (
	pemSpace = " \t\r\n"
	pemBegin = "-----BEGIN "
	pemCert  = "-----BEGIN CERTIFICATE-----"
)

// checkBundleInput refuses what must not even be parsed.
func checkBundleInput(data []byte) error {
	switch {
	case len(data) > MaxBundleBytes:
		return fmt.Errorf("%d bytes, more than the %d allowed: give only the roots that the registry needs", len(data), MaxBundleBytes)
	case bytes.Contains(data, []byte("PRIVATE KEY")):
		return ErrPrivateKey
	}
	return nil
}

// nextCertificate takes the block at the beginning of data. pem.Decode skips
// what it does not understand, so the block is checked to begin where data
// does and to be the only one consumed.
func nextCertificate(data []byte) (*x509.Certificate, []byte, error) {
	if !bytes.HasPrefix(data, []byte(pemCert)) {
		if bytes.HasPrefix(data, []byte(pemBegin)) {
			return nil, nil, errors.New("a PEM block that is not a CERTIFICATE: remove it")
		}
		return nil, nil, errors.New("text that is not PEM: only CERTIFICATE blocks and white space are allowed")
	}
	block, rest := pem.Decode(data)
	consumed := data[:len(data)-len(rest)]
	if block == nil || bytes.Count(consumed, []byte(pemBegin)) != 1 {
		return nil, nil, errors.New("a damaged PEM block: copy the certificate again")
	}
	if len(block.Headers) > 0 {
		return nil, nil, errors.New("a PEM block with headers: remove the lines between BEGIN and the encoded certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, nil, fmt.Errorf("parsing the certificate: %w", err)
	}
	if !isCA(cert) && !isSelfSigned(cert) {
		return nil, nil, fmt.Errorf("%s is neither a CA nor signed by itself: give the CA that issued it", subject(cert))
	}
	return cert, rest, nil
}

func isCA(cert *x509.Certificate) bool {
	return cert.BasicConstraintsValid && cert.IsCA
}

func isSelfSigned(cert *x509.Certificate) bool {
	return bytes.Equal(cert.RawIssuer, cert.RawSubject) &&
		cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature) == nil
}

// subject names a certificate in a message: quoted, since a subject may hold
// anything, and short.
func subject(cert *x509.Certificate) string {
	const limit = 80
	name := cert.Subject.String()
	if name == "" {
		return "subject empty"
	}
	if len(name) > limit {
		name = strings.ToValidUTF8(name[:limit], "") + "…"
	}
	return fmt.Sprintf("%q", name)
}

// newBundle sorts by the hash of the encoding, so that the order says nothing
// about where the certificates came from.
func newBundle(certs []*x509.Certificate) Bundle {
	type hashed struct {
		sum  [sha256.Size]byte
		cert *x509.Certificate
	}
	all := make([]hashed, len(certs))
	for i, c := range certs {
		all[i] = hashed{sha256.Sum256(c.Raw), c}
	}
	slices.SortFunc(all, func(a, b hashed) int { return bytes.Compare(a.sum[:], b.sum[:]) })
	all = slices.CompactFunc(all, func(a, b hashed) bool { return a.sum == b.sum })
	sorted := make([]*x509.Certificate, len(all))
	for i, h := range all {
		sorted[i] = h.cert
	}
	return Bundle{certs: sorted}
}

// PEM returns the certificates as CERTIFICATE blocks, in the bundle's order and
// with nothing in between. It is nil for the empty bundle.
func (b Bundle) PEM() []byte {
	var out bytes.Buffer
	for _, c := range b.certs {
		// Encoding into memory cannot fail: there are no headers.
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return out.Bytes()
}

// Fingerprint identifies the set as "sha256:<64 hex digits>": the hash over the
// SHA-256 sums of the certificates' DER encodings, in the bundle's order. The
// empty bundle has one as well.
func (b Bundle) Fingerprint() string {
	h := sha256.New()
	for _, c := range b.certs {
		sum := sha256.Sum256(c.Raw)
		h.Write(sum[:])
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}

// Len is the number of certificates.
func (b Bundle) Len() int { return len(b.certs) }

// Fingerprints returns the SHA-256 sum, as 64 hex digits, of each certificate's
// DER encoding. They are sorted.
func (b Bundle) Fingerprints() []string {
	var all []string
	for _, c := range b.certs {
		sum := sha256.Sum256(c.Raw)
		all = append(all, hex.EncodeToString(sum[:]))
	}
	return all
}

// Empty reports whether there are no certificates.
func (b Bundle) Empty() bool { return len(b.certs) == 0 }

// Equal reports whether both hold the same certificates.
func (b Bundle) Equal(o Bundle) bool {
	return slices.EqualFunc(b.certs, o.certs, func(x, y *x509.Certificate) bool { return x.Equal(y) })
}

// Union returns the certificates of both.
func (b Bundle) Union(o Bundle) Bundle {
	return newBundle(slices.Concat(b.certs, o.certs))
}

// Without returns the certificates of b that are not in o.
func (b Bundle) Without(o Bundle) Bundle {
	left := slices.DeleteFunc(slices.Clone(b.certs), func(c *x509.Certificate) bool {
		return slices.ContainsFunc(o.certs, c.Equal)
	})
	return Bundle{certs: left}
}

// Pool returns a new pool with the certificates and no others. The empty
// bundle gives an empty pool, which trusts nothing.
func (b Bundle) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range b.certs {
		pool.AddCert(c)
	}
	return pool
}

// Certificates returns the certificates in the bundle's order. They are shared:
// do not modify them.
func (b Bundle) Certificates() []*x509.Certificate { return slices.Clone(b.certs) }

// NotAfter is the earliest end of validity in the set, the zero time when it is
// empty.
func (b Bundle) NotAfter() time.Time {
	if b.Empty() {
		return time.Time{}
	}
	first := slices.MinFunc(b.certs, func(x, y *x509.Certificate) int {
		return cmp.Compare(x.NotAfter.Unix(), y.NotAfter.Unix())
	})
	return first.NotAfter
}
