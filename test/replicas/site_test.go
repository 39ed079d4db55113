package replicas

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
)

// The client token that everybody uses.
const user, password = "ci", "a password: with /+=@ in it"

// site is two replicas on one storage, with a Service before them.
type site struct {
	t       *testing.T
	dir     string
	data    string // the replicas' data directory, as they see it
	extra   []*os.File
	storage string // storage.yaml; empty: data is all there is
	host    string // host:port of the Service
	service *service
	tls     *tls.Config
	client  *http.Client
	log     tail

	replicas []*replica
}

// replica is one process, and those that take its place.
type replica struct {
	address, health string

	mu      sync.Mutex
	process *process // guarded by mu
}

// newSite starts the replicas. data is a directory, and extra are files that
// processes need to reach it.
func newSite(t *testing.T, data string, extra ...*os.File) *site {
	t.Helper()
	s := &site{t: t, dir: t.TempDir(), data: data, extra: extra, service: newService()}
	s.host = s.service.listen(t)
	s.writeSettings()
	s.writeCertificate()
	if *storageFile != "" {
		s.writeStorage()
	}
	transport := s.transport()
	s.client = &http.Client{Transport: transport}
	ctx, cancel := context.WithCancel(context.Background())
	var looking sync.WaitGroup
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		cancel()
		looking.Wait()
		for _, r := range s.replicas {
			r.running().terminate(t)
		}
		if t.Failed() {
			t.Logf("the replicas' log:\n%s", &s.log)
		}
	})
	for i := range 2 {
		// Not where clients connect from, who would take a dead replica's port.
		host := fmt.Sprintf("127.0.0.%d", 2+i)
		r := &replica{address: freeAddress(t, host), health: freeAddress(t, host)}
		if err := s.start(r); err != nil {
			t.Fatal(err)
		}
		s.replicas = append(s.replicas, r)
		looking.Go(func() { s.service.look(ctx, r.address, r.health) })
	}
	s.untilReady(2)
	return s
}

// start starts a replica's process.
func (s *site) start(r *replica) error {
	args := []string{"registry", "--replica", s.dir, "--tls", s.dir, "--data", s.data, "--listen", r.address, "--health-listen", r.health,
		"--drain-delay", "3s", "--drain-timeout", "30s"}
	if s.storage != "" {
		args = append(args, "--storage", s.storage)
	}
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = &s.log, &s.log, s.extra
	p, err := start(cmd)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.process = p
	return nil
}

// running is the process that is a replica now.
func (r *replica) running() *process {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.process
}

// untilReady waits until so many replicas are ready.
func (s *site) untilReady(n int) {
	s.t.Helper()
	for deadline := time.Now().Add(time.Minute); !s.service.all(n); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("%d replicas are not ready:\n%s", n, &s.log)
		}
	}
}

func (s *site) writeSettings() {
	token, err := clienttoken.NewRenderer().Render([]string{password}, []v1alpha1.Scope{{
		Repositories: []string{"**"},
		Actions: []v1alpha1.Action{v1alpha1.ActionContentRead, v1alpha1.ActionContentWrite, v1alpha1.ActionContentDelete,
			v1alpha1.ActionMetadataRead, v1alpha1.ActionMetadataWrite},
	}}, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	// With a parent, changes are written to the journal.
	resource := fmt.Sprintf(`apiVersion: %s
kind: %s
metadata: {name: connected-registry}
spec:
  mode: ReadWrite
  logLevel: Warning
  parent: {endpoint: parent.test, credentialsSecretRef: {name: parent}}
`, v1alpha1.APIVersion, v1alpha1.Kind)
	s.write("resource.yaml", []byte(resource))
	s.write("secret", []byte(strings.Repeat("ab", 32)))
	s.write("names", []byte(s.host+"\n"))
	s.write(user+".json", token)
}

// writeStorage makes a storage.yaml with a prefix that nobody else uses.
func (s *site) writeStorage() {
	content, err := os.ReadFile(*storageFile)
	if err != nil {
		s.t.Fatal(err)
	}
	var named map[string]any
	if err := yaml.Unmarshal(content, &named); err != nil {
		s.t.Fatal(err)
	}
	for _, kind := range []string{"s3", "azure", "gcs"} {
		if store, ok := named[kind].(map[string]any); ok {
			store["prefix"] = strings.TrimPrefix(fmt.Sprintf("%v/%s", cmp.Or(store["prefix"], any("")), rand.Text()), "/")
		}
	}
	if content, err = yaml.Marshal(named); err != nil {
		s.t.Fatal(err)
	}
	s.write("storage.yaml", content)
	s.storage = filepath.Join(s.dir, "storage.yaml")
}

func (s *site) write(name string, content []byte) {
	if err := os.WriteFile(filepath.Join(s.dir, name), content, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// writeCertificate makes a certificate that is its own CA.
func (s *site) writeCertificate() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "replicas"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:        true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		s.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		s.t.Fatal(err)
	}
	chain := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate})
	s.write("tls.crt", chain)
	s.write("ca.crt", chain)
	s.write("tls.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(chain)
	s.tls = &tls.Config{RootCAs: pool, ServerName: "127.0.0.1"}
}

// transport connects as a client in the cluster does. Its connections are its
// own.
func (s *site) transport() *http.Transport {
	return &http.Transport{DialContext: s.service.dial, TLSClientConfig: s.tls.Clone(), ForceAttemptHTTP2: true}
}

// freeAddress is one on a host that nobody listens on.
func freeAddress(t *testing.T, host string) string {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
