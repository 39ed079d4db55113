package trust

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func authority(t *testing.T, dir string, now time.Time) *Authority {
	t.Helper()
	a, err := LoadOrCreateAuthority(dir, now)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func ensure(t *testing.T, a *Authority, dir string, now time.Time, hosts ...string) bool {
	t.Helper()
	changed, err := a.EnsureServing(dir, hosts, now)
	if err != nil {
		t.Fatal(err)
	}
	return changed
}

func mode(t *testing.T, name string) os.FileMode {
	t.Helper()
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode()
}

func leafOf(t *testing.T, dir string) *x509.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
	if err != nil {
		t.Fatal(err)
	}
	if len(pair.Certificate) != 1 {
		t.Errorf("tls.crt holds %d certificates", len(pair.Certificate))
	}
	return pair.Leaf
}

func TestAuthority(t *testing.T) {
	dir := t.TempDir()
	a := authority(t, dir, testNow)
	if got := mode(t, filepath.Join(dir, "ca.key")); got != 0o600 {
		t.Errorf("mode of the key is %v", got)
	}
	root := a.Bundle().Certificates()[0]
	if !root.IsCA || !root.MaxPathLenZero || root.MaxPathLen != 0 || root.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		t.Errorf("root: CA %v, path length %d, usage %b", root.IsCA, root.MaxPathLen, root.KeyUsage)
	}
	if years := root.NotAfter.Sub(testNow).Hours() / 24 / 365; years < 9.9 || years > 10.1 {
		t.Errorf("root is valid for %v years", years)
	}
	if parsed, notes, err := ParseBundle(a.Bundle().PEM(), testNow); err != nil || len(notes) > 0 || !parsed.Equal(a.Bundle()) {
		t.Errorf("the bundle does not parse: %v, %q", err, notes)
	}
	before := readTree(t, dir)
	if again := authority(t, dir, testNow.AddDate(1, 0, 0)); !again.Bundle().Equal(a.Bundle()) {
		t.Error("a second start has another root")
	}
	if diff := cmp.Diff(before, readTree(t, dir)); diff != "" {
		t.Error(diff)
	}
}

func TestAuthorityIsRenewedWithItsKey(t *testing.T) {
	dir := t.TempDir()
	old := authority(t, dir, testNow)
	later := testNow.AddDate(8, 0, 1)
	ensure(t, old, dir, later.AddDate(0, 0, -1), "a.example")
	oldLeaf := leafOf(t, dir)
	renewed := authority(t, dir, later)
	if renewed.Bundle().Equal(old.Bundle()) {
		t.Fatal("the root was not renewed in its last two years")
	}
	if ensure(t, renewed, dir, later, "a.example") {
		t.Error("a serving certificate that both roots verify was replaced")
	}
	ensure(t, renewed, dir, later, "b.example")
	for name, leaf := range map[string]*x509.Certificate{"old": oldLeaf, "new": leafOf(t, dir)} {
		for _, roots := range []Bundle{old.Bundle(), renewed.Bundle()} {
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots.Pool(), CurrentTime: later}); err != nil {
				t.Errorf("%s leaf: %v", name, err)
			}
		}
	}
	if again := authority(t, dir, later); !again.Bundle().Equal(renewed.Bundle()) {
		t.Error("the root is renewed at every start")
	}
}

func TestAuthorityRefusesHalfAPair(t *testing.T) {
	other := newCA(t, "other")
	tests := map[string]struct {
		change func(t *testing.T, dir string)
		want   []string
	}{
		"key lost":   {func(t *testing.T, dir string) { remove(t, dir, "ca.key") }, []string{"ca.key is not", "put the key back"}},
		"other key":  {func(t *testing.T, dir string) { put(t, dir, "ca.key", keyPEM(t, other.key)) }, []string{"do not belong together"}},
		"other cert": {func(t *testing.T, dir string) { put(t, dir, "ca.crt", other.pem()) }, []string{"do not belong together"}},
		"empty key":  {func(t *testing.T, dir string) { put(t, dir, "ca.key", nil) }, []string{"ca.key", "put it back"}},
		"garbage as key": {func(t *testing.T, dir string) {
			put(t, dir, "ca.key", []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
		}, []string{"ca.key", "put it back"}},
		"empty cert": {func(t *testing.T, dir string) { put(t, dir, "ca.crt", nil) }, []string{"ca.crt", "put it back"}},
		"directory":  {func(t *testing.T, dir string) { remove(t, dir, "ca.crt"); mkdir(t, dir, "ca.crt") }, []string{"ca.crt"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			authority(t, dir, testNow)
			tt.change(t, dir)
			before := readTree(t, dir)
			_, err := LoadOrCreateAuthority(dir, testNow)
			mustContain(t, err, append(tt.want, dir)...)
			if diff := cmp.Diff(before, readTree(t, dir)); diff != "" {
				t.Errorf("something was changed: %s", diff)
			}
		})
	}
	_, err := LoadOrCreateAuthority(filepath.Join(t.TempDir(), "missing"), testNow)
	mustContain(t, err, "missing", "no such file")
}

func TestAuthorityKeyAloneGetsItsCertificate(t *testing.T) {
	dir := t.TempDir()
	a := authority(t, dir, testNow)
	remove(t, dir, "ca.crt")
	if err := os.Chmod(filepath.Join(dir, "ca.key"), 0o644); err != nil {
		t.Fatal(err)
	}
	again := authority(t, dir, testNow)
	if !again.key.Equal(a.key) {
		t.Error("the key was replaced")
	}
	if got := mode(t, filepath.Join(dir, "ca.key")); got != 0o600 {
		t.Errorf("the key stays open to others: %v", got)
	}
}

func TestAuthorityStartedManyTimesAtOnce(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	got := make([]Bundle, 8)
	for i := range got {
		wg.Go(func() {
			a, err := LoadOrCreateAuthority(dir, testNow)
			if err != nil {
				t.Error(err)
				return
			}
			got[i] = a.Bundle()
		})
	}
	wg.Wait()
	for _, b := range got {
		if !b.Equal(got[0]) {
			t.Fatal("two authorities in one directory")
		}
	}
}

func TestEnsureServing(t *testing.T) {
	dir := t.TempDir()
	a := authority(t, dir, testNow)
	hosts := []string{"10.0.0.10", "registry.example", "fd00::10", "Registry.Example"}
	if !ensure(t, a, dir, testNow, hosts...) {
		t.Fatal("a new certificate is no change")
	}
	if got := mode(t, filepath.Join(dir, "tls.key")); got != 0o600 {
		t.Errorf("mode of the key is %v", got)
	}
	leaf := leafOf(t, dir)
	if diff := cmp.Diff([]string{"registry.example"}, leaf.DNSNames); diff != "" {
		t.Error(diff)
	}
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature || leaf.NotAfter.Sub(testNow) != servingLife {
		t.Errorf("leaf: CA %v, usage %b, until %v", leaf.IsCA, leaf.KeyUsage, leaf.NotAfter)
	}
	for _, host := range []string{"10.0.0.10", "fd00::10", "registry.example"} {
		_, err := leaf.Verify(x509.VerifyOptions{Roots: a.Bundle().Pool(), CurrentTime: testNow, DNSName: host})
		if err != nil {
			t.Errorf("%s: %v", host, err)
		}
	}
	key := leaf.PublicKey.(*ecdsa.PublicKey)
	steps := []struct {
		name    string
		now     time.Time
		hosts   []string
		changed bool
	}{
		{"same", testNow, hosts, false},
		{"other order", testNow, []string{"fd00::10", "registry.example", "10.0.0.10"}, false},
		{"a name less", testNow, hosts[:2], true},
		{"a name more", testNow, hosts, true},
		{"two thirds left", testNow.Add(servingLife / 3), hosts, false},
		{"less than a third left", testNow.Add(servingLife * 7 / 10), hosts, true},
		{"clock far back", testNow.AddDate(-1, 0, 0), hosts, true},
		{"same again", testNow.AddDate(-1, 0, 0), hosts, false},
	}
	for _, s := range steps {
		if got := ensure(t, a, dir, s.now, s.hosts...); got != s.changed {
			t.Errorf("%s: changed = %v", s.name, got)
		}
		if !key.Equal(leafOf(t, dir).PublicKey) {
			t.Errorf("%s: the key was replaced, so that a reader may find it beside the old certificate", s.name)
		}
	}
}

func TestEnsureServingEndsWithTheAuthority(t *testing.T) {
	dir := t.TempDir()
	a := authority(t, dir, testNow)
	ensure(t, a, dir, testNow.AddDate(9, 0, 0), "a.example")
	if leaf := leafOf(t, dir); !leaf.NotAfter.Equal(a.Bundle().NotAfter()) {
		t.Errorf("leaf until %v, authority until %v", leaf.NotAfter, a.Bundle().NotAfter())
	}
}

func TestEnsureServingRepairs(t *testing.T) {
	other := newCA(t, "other")
	tests := map[string]func(t *testing.T, dir string){
		"certificate lost":  func(t *testing.T, dir string) { remove(t, dir, "tls.crt") },
		"key lost":          func(t *testing.T, dir string) { remove(t, dir, "tls.key") },
		"certificate empty": func(t *testing.T, dir string) { put(t, dir, "tls.crt", nil) },
		"key garbage":       func(t *testing.T, dir string) { put(t, dir, "tls.key", []byte("x")) },
		"another's pair": func(t *testing.T, dir string) {
			put(t, dir, "tls.key", keyPEM(t, other.key))
			put(t, dir, "tls.crt", other.pem())
		},
		"key of another pair": func(t *testing.T, dir string) { put(t, dir, "tls.key", keyPEM(t, other.key)) },
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			a := authority(t, dir, testNow)
			ensure(t, a, dir, testNow, "a.example")
			change(t, dir)
			if !ensure(t, a, dir, testNow, "a.example") {
				t.Error("no change")
			}
			if _, err := leafOf(t, dir).Verify(x509.VerifyOptions{Roots: a.Bundle().Pool(), CurrentTime: testNow, DNSName: "a.example"}); err != nil {
				t.Error(err)
			}
			if ensure(t, a, dir, testNow, "a.example") {
				t.Error("repaired twice")
			}
		})
	}
}

func TestEnsureServingRefuses(t *testing.T) {
	dir := t.TempDir()
	a := authority(t, dir, testNow)
	for _, hosts := range [][]string{nil, {""}, {"a:5000"}, {"[::1]"}, {"fe80::1%eth0"}, {"../x"}, {"a b"}, {"*.a"}} {
		if _, err := a.EnsureServing(dir, hosts, testNow); err == nil {
			t.Errorf("%q was taken", hosts)
		}
	}
	_, err := a.EnsureServing(filepath.Join(dir, "missing"), []string{"a"}, testNow)
	mustContain(t, err, "missing")
}

// TestServingOverTLS makes the handshake that containerd makes.
func TestServingOverTLS(t *testing.T) {
	dir := t.TempDir()
	a := authority(t, dir, time.Now())
	ensure(t, a, dir, time.Now(), "127.0.0.1")
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	server.StartTLS()
	defer server.Close()
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: a.Bundle().Pool()}, DialContext: (&net.Dialer{}).DialContext}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
}

// TestAuthorityCrash kills the process ahead of every step of creation and
// first issue: the next start works, and a root that could be read stays.
func TestAuthorityCrash(t *testing.T) {
	steps := 0
	for {
		dir := t.TempDir()
		if !crash(t, "authority", dir, steps) {
			break
		}
		steps++
		published, _ := os.ReadFile(filepath.Join(dir, "ca.crt"))
		a := authority(t, dir, testNow)
		if published != nil && !bytes.Equal(published, a.Bundle().PEM()) {
			t.Fatalf("killed at step %d: the published root was replaced", steps)
		}
		ensure(t, a, dir, testNow, "a.example")
		leafOf(t, dir)
		if n := len(readTree(t, dir)); n != 4 {
			t.Fatalf("killed at step %d: %d files are left", steps, n)
		}
	}
	if steps < 16 {
		t.Errorf("killed at %d steps only", steps)
	}
}

func remove(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, dir, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func mkdir(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestAuthorityFromBytes(t *testing.T) {
	made, err := NewAuthority(testNow)
	if err != nil {
		t.Fatal(err)
	}
	root, key, err := made.PEM()
	if err != nil {
		t.Fatal(err)
	}
	a, err := ParseAuthority(root, key)
	if err != nil {
		t.Fatal(err)
	}
	hosts := []string{"10.0.0.10", "registry.example"}
	cert, certKey, err := a.Issue(hosts, testNow)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cert, certKey)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: made.Bundle().Pool(), CurrentTime: testNow, DNSName: "10.0.0.10"}); err != nil {
		t.Error(err)
	}
	other, err := NewAuthority(testNow)
	if err != nil {
		t.Fatal(err)
	}
	if other.Bundle().Equal(made.Bundle()) {
		t.Error("two new authorities are one")
	}
	current := []struct {
		name      string
		authority *Authority
		hosts     []string
		now       time.Time
		want      bool
	}{
		{"just issued", a, hosts, testNow, true},
		{"a name more", a, append(hosts, "other.example"), testNow, false},
		{"another authority", other, hosts, testNow, false},
		{"less than a third left", a, hosts, testNow.Add(servingLife * 7 / 10), false},
	}
	for _, tt := range current {
		if got, err := tt.authority.Current(pair.Leaf, tt.hosts, tt.now); err != nil || got != tt.want {
			t.Errorf("%s: %v %v", tt.name, got, err)
		}
	}
	if _, err := a.Current(pair.Leaf, []string{"a b"}, testNow); err == nil {
		t.Error("a host that is none was taken")
	}
	if a.NearsEnd(testNow.AddDate(7, 11, 0)) || !a.NearsEnd(testNow.AddDate(8, 0, 2)) {
		t.Error("the end is near at the wrong time")
	}
}

func TestParseAuthorityRefuses(t *testing.T) {
	one, two := newCA(t, "one"), newCA(t, "two")
	leaf := newCert(t, "leaf", &one, func(c *x509.Certificate) { c.IsCA = false })
	tests := map[string]struct{ cert, key []byte }{
		"nothing":     {nil, nil},
		"no key":      {one.pem(), nil},
		"no cert":     {nil, keyPEM(t, one.key)},
		"swapped":     {keyPEM(t, one.key), one.pem()},
		"two pairs":   {one.pem(), keyPEM(t, two.key)},
		"not a CA":    {leaf.pem(), keyPEM(t, leaf.key)},
		"garbage key": {one.pem(), []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")},
	}
	for name, tt := range tests {
		if _, err := ParseAuthority(tt.cert, tt.key); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}
