package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

const validity = 365 * 24 * time.Hour

// authority is the cluster's certificate authority and the directory where it
// and what it issues lie as <name>.crt and <name>.key.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  crypto.Signer
}

// newAuthority makes an authority as ca.crt and ca.key, and the key pair of the
// service account tokens as sa.pub and sa.key.
func newAuthority(dir string) (*authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	key, err := newKey(filepath.Join(dir, "ca.key"))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "test cluster"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(validity),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	if err := writePEM(filepath.Join(dir, "ca.crt"), "CERTIFICATE", der); err != nil {
		return nil, err
	}
	sa, err := newKey(filepath.Join(dir, "sa.key"))
	if err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(sa.Public())
	if err != nil {
		return nil, err
	}
	if err := writePEM(filepath.Join(dir, "sa.pub"), "PUBLIC KEY", public); err != nil {
		return nil, err
	}
	return openAuthority(dir)
}

// openAuthority reads what newAuthority wrote.
func openAuthority(dir string) (*authority, error) {
	cert, err := readPEM(filepath.Join(dir, "ca.crt"))
	if err != nil {
		return nil, err
	}
	keyDER, err := readPEM(filepath.Join(dir, "ca.key"))
	if err != nil {
		return nil, err
	}
	a := &authority{dir: dir}
	if a.cert, err = x509.ParseCertificate(cert); err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(keyDER)
	if err != nil {
		return nil, err
	}
	a.key = key.(*ecdsa.PrivateKey)
	return a, nil
}

// identity is whom a certificate names: an API user with its groups, a server
// with its names, or both.
type identity struct {
	user   string
	groups []string
	names  []string
	addrs  []netip.Addr
}

// issue writes <name>.crt and <name>.key.
func (a *authority) issue(name string, id identity) error {
	key, err := newKey(a.path(name, "key"))
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: id.user, Organization: id.groups},
		NotBefore:   time.Now().Add(-time.Hour),
		NotAfter:    time.Now().Add(validity),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		DNSNames:    id.names,
	}
	for _, addr := range id.addrs {
		template.IPAddresses = append(template.IPAddresses, net.IP(addr.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return err
	}
	return writePEM(a.path(name, "crt"), "CERTIFICATE", der)
}

func (a *authority) path(name, ext string) string { return filepath.Join(a.dir, name+"."+ext) }

// kubeconfig writes a kubeconfig, complete in itself, for an identity that was
// issued under name. JSON is YAML.
func (a *authority) kubeconfig(path, name, server string) error {
	var files [3][]byte
	for i, file := range []string{a.path("ca", "crt"), a.path(name, "crt"), a.path(name, "key")} {
		var err error
		if files[i], err = os.ReadFile(file); err != nil {
			return err
		}
	}
	type object = map[string]any
	data, err := json.MarshalIndent(object{
		"apiVersion":      "v1",
		"kind":            "Config",
		"current-context": name,
		"clusters":        []object{{"name": "cluster", "cluster": object{"server": server, "certificate-authority-data": files[0]}}},
		"users":           []object{{"name": name, "user": object{"client-certificate-data": files[1], "client-key-data": files[2]}}},
		"contexts":        []object{{"name": name, "context": object{"cluster": "cluster", "user": name}}},
	}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o600)
}

func newKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, writePEM(path, "PRIVATE KEY", der)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

func readPEM(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("%s is not PEM", path)
	}
	return block.Bytes, nil
}
