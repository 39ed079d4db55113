package trust

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseBundle(t *testing.T) {
	a, b := newCA(t, "a"), newCA(t, "b")
	old := newCert(t, "old", nil, func(c *x509.Certificate) { c.NotAfter = testNow.Add(-time.Hour) })
	early := newCert(t, "early", nil, func(c *x509.Certificate) { c.NotBefore = testNow.Add(time.Hour) })
	selfSigned := newCert(t, "self", nil, func(c *x509.Certificate) { c.IsCA = false })
	leaf := newCert(t, "leaf", &a, func(c *x509.Certificate) { c.IsCA = false })
	intermediate := newCert(t, "intermediate", &a, nil)
	secret := keyPEM(t, a.key)
	secretLine := strings.Split(string(secret), "\n")[1]

	join := func(parts ...[]byte) []byte { return slices.Concat(parts...) }
	withHeader := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Headers: map[string]string{"A": "b"}, Bytes: a.cert.Raw})
	tests := map[string]struct {
		in    []byte
		want  []testCert
		notes int
		err   string
	}{
		"one":                  {in: a.pem(), want: []testCert{a}},
		"two":                  {in: join(a.pem(), b.pem()), want: []testCert{a, b}},
		"same twice":           {in: join(a.pem(), a.pem()), want: []testCert{a}},
		"white space around":   {in: join([]byte("\n \t\r\n"), a.pem(), []byte("\n\n"), b.pem(), []byte(" \n")), want: []testCert{a, b}},
		"CRLF":                 {in: bytes.ReplaceAll(join(a.pem(), b.pem()), []byte("\n"), []byte("\r\n")), want: []testCert{a, b}},
		"no newline at end":    {in: bytes.TrimSpace(a.pem()), want: []testCert{a}},
		"self-signed leaf":     {in: selfSigned.pem(), want: []testCert{selfSigned}},
		"intermediate":         {in: intermediate.pem(), want: []testCert{intermediate}},
		"expired among others": {in: join(old.pem(), a.pem()), want: []testCert{a}, notes: 1},
		"not valid yet":        {in: early.pem(), want: []testCert{early}, notes: 1},
		"expired alone":        {in: old.pem(), notes: 1, err: "all certificates have expired"},
		"empty":                {in: nil, err: "no certificate"},
		"white space alone":    {in: []byte(" \n\n"), err: "no certificate"},
		"leaf":                 {in: leaf.pem(), err: "neither a CA"},
		"key":                  {in: secret, err: "private key"},
		"key after":            {in: join(a.pem(), secret), err: "private key"},
		"key before":           {in: join(secret, a.pem()), err: "private key"},
		"key far inside":       {in: join(bytes.Repeat(a.pem(), 20), secret, a.pem()), err: "private key"},
		"key as garbage":       {in: join(a.pem(), secret[:60]), err: "private key"},
		"DER":                  {in: a.cert.Raw, err: "not PEM"},
		"text before":          {in: join([]byte("# my CA\n"), a.pem()), err: "not PEM"},
		"text between":         {in: join(a.pem(), []byte("x"), b.pem()), err: "not PEM"},
		"text after":           {in: join(a.pem(), []byte("x")), err: "not PEM"},
		"byte order mark":      {in: join([]byte("\ufeff"), a.pem()), err: "not PEM"},
		"NUL after":            {in: join(a.pem(), []byte{0}), err: "not PEM"},
		"headers":              {in: withHeader, err: "headers"},
		"other block":          {in: pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: []byte("x")}), err: "not a CERTIFICATE"},
		"trusted certificate":  {in: pem.EncodeToMemory(&pem.Block{Type: "TRUSTED CERTIFICATE", Bytes: a.cert.Raw}), err: "not a CERTIFICATE"},
		"no certificate in it": {in: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}), err: "certificate 1: parsing"},
		"two in one block":     {in: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: join(a.cert.Raw, b.cert.Raw)}), err: "parsing"},
		"cut off":              {in: a.pem()[:200], err: "damaged"},
		"cut off, then whole":  {in: join(a.pem()[:200], []byte("\n"), a.pem()), err: "damaged"},
		"bad base64":           {in: bytes.Replace(a.pem(), []byte("MII"), []byte("M!I"), 1), err: "damaged"},
		"too many":             {in: bytes.Repeat(a.pem(), MaxBundleCertificates+1), err: "more than 128"},
		"a thousand":           {in: bytes.Repeat(a.pem(), 1000), err: "more than 128"},
		"ten megabytes":        {in: bytes.Repeat([]byte("\n"), 10<<20), err: "more than the 1048576 allowed"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, notes, err := ParseBundle(tt.in, testNow)
			if len(notes) != tt.notes {
				t.Errorf("notes = %q, want %d", notes, tt.notes)
			}
			if tt.err != "" {
				mustContain(t, err, tt.err)
				if !got.Empty() {
					t.Error("an error, and certificates as well")
				}
				if strings.Contains(err.Error(), secretLine) || strings.Contains(err.Error(), secretLine[:20]) {
					t.Error("the error repeats the key")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var want Bundle
			for _, c := range tt.want {
				want = want.Union(c.bundle())
			}
			if !got.Equal(want) {
				t.Errorf("got %d certificates, want %d", got.Len(), want.Len())
			}
		})
	}
	if _, _, err := ParseBundle(secret, testNow); !errors.Is(err, ErrPrivateKey) {
		t.Errorf("error for a key is %v, want ErrPrivateKey", err)
	}
}

func TestParseBundleQuotesSubjects(t *testing.T) {
	rude := newCert(t, "a\nlevel=error msg=\"forged\""+strings.Repeat("x", 200), nil, func(c *x509.Certificate) { c.NotAfter = testNow.Add(-time.Hour) })
	_, notes, _ := ParseBundle(rude.pem(), testNow)
	if len(notes) != 1 || strings.ContainsAny(notes[0], "\n\r") || len(notes[0]) > 250 {
		t.Errorf("notes = %q", notes)
	}
}

func TestZeroBundle(t *testing.T) {
	var b Bundle
	if !b.Empty() || b.Len() != 0 || b.PEM() != nil || !b.NotAfter().IsZero() || len(b.Certificates()) != 0 {
		t.Error("the zero bundle is not empty")
	}
	if !b.Equal(b.Union(Bundle{})) || b.Fingerprint() != b.Union(Bundle{}).Fingerprint() {
		t.Error("the zero bundle is not equal to itself")
	}
	if _, err := newCA(t, "a").cert.Verify(x509.VerifyOptions{Roots: b.Pool(), CurrentTime: testNow}); err == nil {
		t.Error("the zero bundle trusts something")
	}
}

// TestBundleIsASet takes random multisets: however they are written down and
// put together, equal sets are equal, byte for byte.
func TestBundleIsASet(t *testing.T) {
	var all []testCert
	for range 6 {
		all = append(all, newCA(t, "same name"))
	}
	rng := rand.New(rand.NewPCG(1, 2))
	bundles := make(map[int]Bundle)
	for range 300 {
		members := 0
		var text []byte
		var union Bundle
		for range 1 + rng.IntN(10) {
			i := rng.IntN(len(all))
			members |= 1 << i
			text = append(text, all[i].pem()...)
			union = all[i].bundle().Union(union)
		}
		got, _, err := ParseBundle(text, testNow)
		if err != nil {
			t.Fatal(err)
		}
		again, _, err := ParseBundle(got.PEM(), testNow)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range []Bundle{union, again, got.Union(got)} {
			if !got.Equal(b) || got.Fingerprint() != b.Fingerprint() || !bytes.Equal(got.PEM(), b.PEM()) {
				t.Fatal("the same set, but another bundle")
			}
		}
		bundles[members] = got
	}
	seen := make(map[string]int)
	for members, b := range bundles {
		if other, ok := seen[b.Fingerprint()]; ok {
			t.Errorf("sets %b and %b have one fingerprint", members, other)
		}
		seen[b.Fingerprint()] = members
		if !strings.HasPrefix(b.Fingerprint(), "sha256:") || len(b.Fingerprint()) != len("sha256:")+64 {
			t.Errorf("fingerprint %q", b.Fingerprint())
		}
	}
}

func TestBundleNotAfter(t *testing.T) {
	soon := newCert(t, "soon", nil, func(c *x509.Certificate) { c.NotAfter = testNow.Add(time.Hour) })
	if got := newCA(t, "later").bundle().Union(soon.bundle()).NotAfter(); !got.Equal(soon.cert.NotAfter) {
		t.Errorf("NotAfter = %v", got)
	}
}

func FuzzParseBundle(f *testing.F) {
	a, b := newCA(f, "a"), newCA(f, "b")
	f.Add(a.pem())
	f.Add(slices.Concat(a.pem(), []byte("\r\n"), b.pem()))
	f.Add(keyPEM(f, a.key))
	f.Add(a.cert.Raw)
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nProc-Type: 4,ENCRYPTED\n\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, notes, err := ParseBundle(data, testNow)
		for _, n := range notes {
			if strings.Contains(n, "\n") {
				t.Errorf("a note has several lines: %q", n)
			}
		}
		if err != nil {
			return
		}
		if b.Empty() || b.Len() > MaxBundleCertificates {
			t.Fatalf("%d certificates without an error", b.Len())
		}
		again, _, err := ParseBundle(b.PEM(), testNow)
		if err != nil || !again.Equal(b) {
			t.Fatalf("the bundle does not survive being written: %v", err)
		}
		if !x509.NewCertPool().AppendCertsFromPEM(b.PEM()) {
			t.Fatal("containerd would not take the bundle")
		}
		_ = tls.Config{RootCAs: b.Pool()}
	})
}

func TestBundleWithout(t *testing.T) {
	a, b, c := newCA(t, "a").bundle(), newCA(t, "b").bundle(), newCA(t, "c").bundle()
	all := a.Union(b).Union(c)
	if got := all.Without(b); !got.Equal(a.Union(c)) {
		t.Error("something else is left")
	}
	if !all.Without(all).Empty() || !(Bundle{}).Without(all).Empty() || !all.Without(Bundle{}).Equal(all) {
		t.Error("the empty set is not treated as one")
	}
	if len(all.Certificates()) != 3 {
		t.Error("the bundle was changed")
	}
}

func TestBundleFingerprints(t *testing.T) {
	a, b := newCA(t, "a"), newCA(t, "b")
	var want []string
	for _, c := range []testCert{a, b} {
		want = append(want, fmt.Sprintf("%x", sha256.Sum256(c.cert.Raw)))
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, a.bundle().Union(b.bundle()).Fingerprints()); diff != "" {
		t.Error(diff)
	}
}
