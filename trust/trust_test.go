package trust

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/log"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashEnv); dir != "" {
		crashHere(dir)
		return
	}
	// containerd's parser says a lot about files that are broken on purpose.
	if err := log.SetLevel("fatal"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// testNow is when all certificates of the tests are looked at.
var testNow = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

// testCert is a certificate with its key.
type testCert struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (c testCert) pem() []byte { return encodeCertificate(c.cert) }

func (c testCert) bundle() Bundle { return newBundle([]*x509.Certificate{c.cert}) }

// newCert makes a CA valid for a year around testNow, unless change says
// otherwise.
func newCert(t testing.TB, name string, issuer *testCert, change func(*x509.Certificate)) testCert {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             testNow.AddDate(0, -6, 0),
		NotAfter:              testNow.AddDate(0, 6, 0),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	if change != nil {
		change(template)
	}
	parent, signer := template, key
	if issuer != nil {
		parent, signer = issuer.cert, issuer.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return testCert{cert, key}
}

func newCA(t testing.TB, name string) testCert { return newCert(t, name, nil, nil) }

func keyPEM(t testing.TB, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func writeTree(t testing.TB, root string, files map[string]string) {
	t.Helper()
	for name, data := range files {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// readTree returns everything below root: files with mode and content,
// directories with mode, links with target.
func readTree(t testing.TB, root string) map[string]string {
	t.Helper()
	tree := make(map[string]string)
	err := filepath.WalkDir(root, func(p string, e os.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(p, root)
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(p)
			tree[name] = info.Mode().String() + " " + string(data)
			return err
		case info.Mode()&os.ModeSymlink != 0:
			target, err := os.Readlink(p)
			tree[name] = "-> " + target
			return err
		}
		tree[name] = info.Mode().String()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// mustContain checks that an error is there and names what it should.
func mustContain(t testing.TB, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not contain %q", err, p)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("error has more than one line: %q", err)
	}
}

// systemSubjects are the raw subjects in the pool of this machine.
var systemSubjects = sync.OnceValue(func() map[string]bool {
	pool, err := x509.SystemCertPool()
	if err != nil {
		panic(err)
	}
	out := make(map[string]bool)
	for _, raw := range pool.Subjects() { //nolint:staticcheck // what was loaded from files is in it
		out[string(raw)] = true
	}
	return out
})

func commonName(t testing.TB, raw []byte) string {
	t.Helper()
	var rdn pkix.RDNSequence
	if _, err := asn1.Unmarshal(raw, &rdn); err != nil {
		t.Fatal(err)
	}
	var name pkix.Name
	name.FillFromRDNSequence(&rdn)
	return name.CommonName
}
