package daemon

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
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testNode = "node-1"
	certs    = "etc/containerd/certs.d"
)

// authority is a CA certificate and its key, in PEM.
func authority(t testing.TB, name string, lifetime time.Duration) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(lifetime),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

func bundle(t testing.TB, pem ...[]byte) trust.Bundle {
	t.Helper()
	b, _, err := trust.ParseBundle(slices.Concat(pem...), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const nodeYAML = `apiVersion: connectedregistry.io/v1alpha1
kind: NodeConfiguration
registry: 10.96.0.50:443
names: [10.96.0.50, registry.example.com]
caSecrets: [{name: connected-registry-ca}]
mirrors: [{registry: docker.io}]
`

// testCache is a cache of which only the outside is looked at here.
type testCache struct {
	mu         sync.Mutex
	registries []string
	caFile     string
	failing    atomic.Bool
	doubting   atomic.Bool
}

func (c *testCache) Configure(n *v1alpha1.NodeConfiguration, caFile string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.registries, c.caFile = n.Names, caFile
	return nil
}

func (c *testCache) Serving() bool { return !c.failing.Load() }

func (c *testCache) Doubts() bool { return c.doubting.Load() }

func (c *testCache) Fault() error {
	if c.failing.Load() {
		return errors.New("the address is taken")
	}
	return nil
}

// site is one node with its API server and mounted configuration.
type site struct {
	*api
	t     *testing.T
	root  string // of the node
	mount string // directory of the ConfigMap
	cache *testCache
	d     *Daemon
	stop  func()
}

func newSite(t *testing.T) *site {
	s := &site{api: newAPI(t), t: t, root: t.TempDir(), mount: t.TempDir(), cache: &testCache{}}
	if err := os.MkdirAll(filepath.Join(s.root, "etc/containerd"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(s.root, "var/lib"), 0o755); err != nil {
		t.Fatal(err)
	}
	return s
}

// start runs an agent until the test ends, or stop is called.
func (s *site) start(change ...func(*Config)) {
	s.t.Helper()
	cfg := Config{
		File: filepath.Join(s.mount, "node.yaml"), API: s.config(), Namespace: testNamespace, Node: testNode, Pod: "pod-1",
		NodeRoot: s.root, Cache: s.cache, CacheURL: "http://127.0.0.1:5050", Version: "v1", Metrics: prometheus.NewRegistry(),
	}
	for _, f := range change {
		f(&cfg)
	}
	var err error
	if s.d, err = New(cfg); err != nil {
		s.t.Fatal(err)
	}
	s.d.lease.gap, s.d.prober.every = 10*time.Millisecond, 10*time.Millisecond
	ctx, cancel := context.WithCancel(s.t.Context())
	ended := make(chan error, 1)
	d := s.d
	go func() { ended <- d.Run(ctx) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		s.dropWatches()
		if err := <-ended; err != nil {
			s.t.Errorf("Run: %v", err)
		}
	})
	s.t.Cleanup(s.stop)
}

// mounted puts a configuration in place as the kubelet does: a directory of its
// own, and a symbolic link that is swapped.
func (s *site) mounted(yaml string) {
	s.t.Helper()
	generation, err := os.MkdirTemp(s.mount, "..gen")
	if err == nil {
		err = os.WriteFile(filepath.Join(generation, "node.yaml"), []byte(yaml), 0o644)
	}
	link := filepath.Join(s.mount, "..data")
	if err == nil {
		err = os.Symlink(filepath.Base(generation), link+"_tmp")
	}
	if err == nil {
		err = os.Rename(link+"_tmp", link)
	}
	file := filepath.Join(s.mount, "node.yaml")
	if _, missing := os.Lstat(file); missing != nil && err == nil {
		err = os.Symlink("..data/node.yaml", file)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) ready() string {
	w := httptest.NewRecorder()
	s.d.Readyz(w, httptest.NewRequest(http.MethodGet, "/readyz", nil))
	return strings.TrimSpace(w.Body.String())
}

// eventually waits for a condition. The limit is for a machine that is busy.
func (s *site) eventually(what string, check func() bool) {
	s.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !check() {
		if time.Now().After(deadline) {
			s.t.Fatalf("not within 30 seconds: %s; ready: %s; the Lease says %v", what, s.ready(), s.said(testNode))
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// trusts waits until the node trusts these certificates for a registry, and
// says so.
func (s *site) trusts(registry string, certificates ...[]byte) {
	s.t.Helper()
	want := bundle(s.t, certificates...)
	s.eventually("trust in "+registry, func() bool {
		data, err := os.ReadFile(filepath.Join(s.root, certs, registry, "ca.crt"))
		return err == nil && string(data) == string(want.PEM())
	})
	s.eventually("acknowledgement", func() bool { return s.said(testNode)[AnnotationFingerprints] == fingerprints(want) })
}

func (s *site) complains(text string) {
	s.t.Helper()
	s.eventually("complaint of "+text, func() bool { return strings.Contains(s.said(testNode)[AnnotationError], text) })
}

func (s *site) content() { // with everything
	s.t.Helper()
	s.eventually("no complaint", func() bool { return s.said(testNode) != nil && s.said(testNode)[AnnotationError] == "" })
}

// files of the node, with what they hold.
func (s *site) files() map[string]string {
	all := make(map[string]string)
	filepath.WalkDir(s.root, func(path string, e os.DirEntry, err error) error {
		if err == nil {
			data, _ := os.ReadFile(path)
			all[strings.TrimPrefix(path, s.root)] = string(data)
		}
		return nil
	})
	return all
}

func secretOf(pem []byte) map[string][]byte { return map[string][]byte{"ca.crt": pem} }

// TestLife: from nothing, over changes and faults, to leaving.
func TestLife(t *testing.T) {
	s := newSite(t)
	pristine := s.files()
	a, _ := authority(t, "a", time.Hour)
	b, key := authority(t, "b", time.Hour)
	s.start()
	s.eventually("waiting", func() bool { return strings.HasPrefix(s.ready(), "waiting for the configuration") })
	s.mounted(nodeYAML)
	s.eventually("waiting", func() bool {
		return s.ready() == "waiting for the registry's CA certificates in Secret connected-registry-ca"
	})
	if diff := cmp.Diff(pristine, s.files()); diff != "" {
		t.Errorf("touched the node before it knew what to do: %s", diff)
	}
	s.setSecret(ControlSecret, secretOf(a), nil)
	s.trusts("10.96.0.50", a)
	s.trusts("registry.example.com", a)
	s.trusts("docker.io", a)
	s.content()
	s.eventually("ready", func() bool { return s.ready() == "ok" })
	if got, err := os.ReadFile(s.cache.caFile); err != nil || string(got) != string(bundle(t, a).PEM()) {
		t.Errorf("the cache's CA file: %v", err)
	}

	// A rotation: both, then the new one.
	s.setSecret(ControlSecret, secretOf(slices.Concat(a, b)), nil)
	s.trusts("docker.io", a, b)
	s.setSecret(ControlSecret, secretOf(b), nil)
	s.trusts("docker.io", b)

	// A Secret of no use changes nothing but the report.
	s.setSecret(ControlSecret, secretOf(slices.Concat(a, key)), nil)
	s.complains("private key")
	s.trusts("docker.io", b)
	if strings.Contains(fmt.Sprint(s.said(testNode), s.files()), string(key[40:80])) {
		t.Error("the key is written down")
	}
	s.eventually("Event", func() bool { return slices.Contains(s.raised(), "Secret/connected-registry-ca InvalidCertificates") })
	if got := s.ready(); got != "ok" {
		t.Errorf("not ready, though the node works: %s", got)
	}
	s.setSecret(ControlSecret, secretOf(b), nil)
	s.content()

	// Neither does a configuration of no use.
	digest := s.said(testNode)[AnnotationConfiguration]
	s.mounted(strings.Replace(nodeYAML, "docker.io", "../../etc", 1))
	s.complains("mirrors[0].registry")
	s.eventually("Event", func() bool {
		return slices.Contains(s.raised(), "ConfigMap/connected-registry-node InvalidConfiguration")
	})
	s.mounted(nodeYAML + "bogus: 1\n")
	s.complains("bogus")
	if got := s.said(testNode)[AnnotationConfiguration]; got != digest {
		t.Errorf("acknowledged %s", got)
	}
	s.mounted(nodeYAML + "push: true\n")
	s.content()
	s.eventually("another configuration", func() bool { return s.said(testNode)[AnnotationConfiguration] != digest })

	// The cache fails: the node is not ready, and everything else goes on.
	s.cache.failing.Store(true)
	s.setSecret(ControlSecret, secretOf(slices.Concat(a, b)), nil)
	s.trusts("docker.io", a, b)
	s.complains("the address is taken")
	if got := s.ready(); got == "ok" {
		t.Error("ready without a cache")
	}
	s.cache.failing.Store(false)

	s.setSecret(ControlSecret, secretOf(b), map[string]string{AnnotationUninstall: "true"})
	s.eventually("cleaned", func() bool { return s.said(testNode)[AnnotationCleaned] == "true" })
	if diff := cmp.Diff(pristine, s.files()); diff != "" {
		t.Errorf("left behind: %s", diff)
	}
	// The Secret goes with the rest of the installation.
	s.setSecret(ControlSecret, nil, nil)
	s.stop()
	if diff := cmp.Diff(pristine, s.files()); diff != "" || !s.d.Left() {
		t.Errorf("after the end: left %v, %s", s.d.Left(), diff)
	}
}

// TestUninstallCalledOff: the agent comes back, also after a restart.
func TestUninstallCalledOff(t *testing.T) {
	s := newSite(t)
	pristine := s.files()
	a, _ := authority(t, "a", time.Hour)
	s.mounted(nodeYAML)
	s.setSecret(ControlSecret, secretOf(a), nil)
	s.start()
	s.trusts("docker.io", a)
	s.setSecret(ControlSecret, secretOf(a), map[string]string{AnnotationUninstall: "true"})
	s.eventually("cleaned", func() bool { return s.said(testNode)[AnnotationCleaned] == "true" })
	s.stop()
	s.start()
	s.eventually("looking", func() bool { return s.ready() == "the node is being left" })
	if diff := cmp.Diff(pristine, s.files()); diff != "" {
		t.Errorf("a restart configured the node that is being left: %s", diff)
	}
	s.setSecret(ControlSecret, secretOf(a), nil)
	s.trusts("docker.io", a)
	if got := s.said(testNode)[AnnotationCleaned]; got != "" {
		t.Error("still says that it is cleaned")
	}
}

// TestWithoutAPIServer: a node boots by what it knew last.
func TestWithoutAPIServer(t *testing.T) {
	s := newSite(t)
	a, _ := authority(t, "a", time.Hour)
	b, _ := authority(t, "b", time.Hour)
	s.mounted(nodeYAML)
	s.setSecret(ControlSecret, secretOf(a), nil)
	s.start()
	s.trusts("docker.io", a)
	s.stop()

	s.setAway(true)
	if err := os.RemoveAll(filepath.Join(s.root, certs)); err != nil {
		t.Fatal(err)
	}
	s.mount = t.TempDir() // nothing is mounted
	s.start()
	s.eventually("last good state", func() bool { return s.ready() == "ok" })
	if _, err := os.Stat(filepath.Join(s.root, certs, "docker.io/hosts.toml")); err != nil {
		t.Error(err)
	}
	// It heals, too.
	if err := os.Remove(filepath.Join(s.root, certs, "docker.io/ca.crt")); err != nil {
		t.Fatal(err)
	}
	s.eventually("healed", func() bool {
		_, err := os.Stat(filepath.Join(s.root, certs, "docker.io/ca.crt"))
		return err == nil
	})
	s.setSecret(ControlSecret, secretOf(b), nil)
	s.setAway(false)
	s.trusts("docker.io", b)
}

// TestSecretDeleted: its certificates go after a while, and not at once.
func TestSecretDeleted(t *testing.T) {
	s := newSite(t)
	a, _ := authority(t, "a", time.Hour)
	b, _ := authority(t, "b", time.Hour)
	s.mounted(nodeYAML + "---")
	s.mounted(strings.Replace(nodeYAML, "caSecrets: [", "caSecrets: [{name: further, hosts: [harbor.example.com, docker.io]}, ", 1))
	s.setSecret(ControlSecret, secretOf(a), nil)
	s.setSecret("further", secretOf(b), nil)
	s.start(func(c *Config) { c.SecretGrace = 500 * time.Millisecond })
	s.trusts("docker.io", a)
	harbor := filepath.Join(s.root, certs, "harbor.example.com")
	s.eventually("trust in harbor", func() bool {
		data, err := os.ReadFile(filepath.Join(harbor, "server-ca.crt"))
		return err == nil && string(data) == string(bundle(t, b).PEM())
	})
	s.setSecret("further", nil, nil)
	s.complains("further does not exist")
	s.eventually("end of trust in harbor", func() bool {
		_, err := os.Stat(harbor)
		return os.IsNotExist(err)
	})
	s.trusts("docker.io", a)
	if _, err := os.Stat(filepath.Join(s.root, certs, "docker.io/server-ca.crt")); !os.IsNotExist(err) {
		t.Errorf("docker.io still has the certificates: %v", err)
	}
	// It comes back.
	s.setSecret("further", secretOf(b), nil)
	s.content()
	s.eventually("trust in harbor again", func() bool { _, err := os.Stat(harbor); return err == nil })
}

// TestNodeThatRefuses: a fault of the node is reported, not acknowledged, and
// got over.
func TestNodeThatRefuses(t *testing.T) {
	s := newSite(t)
	a, _ := authority(t, "a", time.Hour)
	blocked := filepath.Join(s.root, certs)
	if err := os.WriteFile(blocked, []byte("a file"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.mounted(nodeYAML)
	s.setSecret(ControlSecret, secretOf(a), nil)
	s.start()
	s.complains("not a directory")
	if said := s.said(testNode); said[AnnotationFingerprints] != "" || said[AnnotationConfiguration] != "" || s.ready() == "ok" {
		t.Errorf("acknowledged all the same: %v", said)
	}
	if err := os.Remove(blocked); err != nil {
		t.Fatal(err)
	}
	s.trusts("docker.io", a)
	s.content()
	// One of its own names alone cannot be configured.
	own := filepath.Join(blocked, "10.96.0.50")
	if err := os.Rename(own, t.TempDir()+"/away"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(own, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s.complains("10.96.0.50")
	s.eventually("doubt", func() bool { return s.said(testNode)[AnnotationFingerprints] == "" })
}

func TestNewRefuses(t *testing.T) {
	for name, cfg := range map[string]Config{
		"nothing": {},
		"no API":  {File: "f", Namespace: "n", Node: "n", Pod: "p"},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
