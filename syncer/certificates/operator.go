package certificates

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

// operator offers the certificate of the operator's own Secret.
func (r *run) operator(s secrets, o observed) offer {
	name := r.cr.Spec.TLS.SecretName
	if s.root != nil && certManagerMade(s.root) {
		return offer{prepare: r.retireCertManager(s.issued, &write{do: func(ctx context.Context) error { return r.remove(ctx, s.root) }})}
	}
	if s.own == nil {
		return offer{fault: &fault{reason: "SecretMissing", message: "secret " + name + " is not there: create it with the keys tls.crt, tls.key and ca.crt"}}
	}
	own, err := parsePair(s.own.Data[corev1.TLSCertKey], s.own.Data[corev1.TLSPrivateKeyKey])
	if err != nil {
		return offer{fault: &fault{reason: "SecretInvalid", message: "secret " + name + ": " + err.Error()}}
	}
	roots, err := r.rootsOf(own, s.own.Data[v1alpha1.SecretKeyCA])
	if err != nil {
		return offer{fault: &fault{reason: "SecretInvalid", message: "secret " + name + ": " + err.Error()}}
	}
	offered := offer{roots: roots, direct: name == TLSSecret}
	if !offered.direct && (!own.equal(o.served) || !roots.Equal(o.servedRoots)) {
		offered.next = func() (*pair, error) { return own, nil }
	}
	return offered
}

// rootsOf finds the CAs that the operator's chain verifies under: those given
// with it, or the self-signed certificate at its end. None are needed for one
// that verifies under the system's.
func (r *run) rootsOf(own *pair, ca []byte) (trust.Bundle, error) {
	if own.expired(r.now) {
		return trust.Bundle{}, fmt.Errorf("tls.crt expired on %s: renew it", own.leaf().NotAfter.UTC().Format(time.DateOnly))
	}
	if len(ca) > 0 {
		roots, _, err := trust.ParseBundle(ca, r.now)
		if err != nil {
			return trust.Bundle{}, fmt.Errorf("ca.crt: %w", err)
		}
		if err := own.verify(roots, r.now); err != nil {
			return trust.Bundle{}, fmt.Errorf("tls.crt does not verify under ca.crt: %w; give the CA that issued it, and the intermediate certificates in tls.crt", err)
		}
		return roots, nil
	}
	if roots, ok := selfSigned(own.chain[len(own.chain)-1], r.now); ok && own.verify(roots, r.now) == nil {
		return roots, nil
	}
	if own.verify(trust.Bundle{}, r.now) == nil {
		return trust.Bundle{}, nil
	}
	return trust.Bundle{}, errors.New("ca.crt is missing, and tls.crt is neither self-signed nor issued by a public CA: add the CA that issued it as ca.crt")
}

func selfSigned(cert *x509.Certificate, now time.Time) (trust.Bundle, bool) {
	if !bytes.Equal(cert.RawIssuer, cert.RawSubject) || cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature) != nil {
		return trust.Bundle{}, false
	}
	b, _, err := trust.ParseBundle(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), now)
	return b, err == nil
}
