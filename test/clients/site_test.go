package clients

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/standalone"
)

// login is a client token with one of its passwords.
type login struct{ user, password string }

var (
	writer   = login{"writer", "a writer's password: with /+=@ in it"}
	reader   = login{"reader", "second-password"} // may read team/**
	impostor = login{"writer", "not the password"}
)

// site is a registry that runs, and what a client needs to know of it.
type site struct {
	host     string // host:port
	caFile   string
	certsDir string // for skopeo and podman: holds ca.crt
	pool     *x509.CertPool
}

const resource = `apiVersion: connectedregistry.io/v1alpha1
kind: ConnectedRegistry
metadata: {name: clients}
spec:
  clientTokens:
    - name: writer
      secretRef: {name: writer}
      scopeMap:
        - {repositories: ["team/**", "secret/**"], actions: [content/read, content/write, content/delete, metadata/read, metadata/write]}
    - name: reader
      secretRef: {name: reader}
      scopeMap:
        - {repositories: ["team/**"], actions: [content/read, metadata/read]}
  mode: `

// newSite runs a registry over the given data directory for as long as the test.
func newSite(t *testing.T, data string, mode v1alpha1.Mode) *site {
	t.Helper()
	for name, content := range map[string]string{
		"secrets/writer/password1": writer.password + "\n",
		"secrets/reader/password1": "first-password",
		"secrets/reader/password2": reader.password,
	} {
		write(t, filepath.Join(data, name), []byte(content))
	}
	spec, err := v1alpha1.Load("clients.yaml", []byte(resource+string(mode)))
	if err != nil {
		t.Fatal(err)
	}
	s, err := standalone.Open(t.Context(), standalone.Config{Resource: spec, Data: data, Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		s.Close()
	})
	site := &site{
		host:     s.LoginServer,
		caFile:   filepath.Join(data, "ca", "ca.crt"),
		certsDir: t.TempDir(),
		pool:     x509.NewCertPool(),
	}
	pem, err := os.ReadFile(site.caFile)
	if err != nil {
		t.Fatal(err)
	}
	site.pool.AppendCertsFromPEM(pem)
	write(t, filepath.Join(site.certsDir, "ca.crt"), pem)
	return site
}

// httpClient trusts the registry's CA alone.
func (s *site) httpClient(t *testing.T) *http.Client {
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.pool}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// dockerConfig writes a docker configuration file that holds the login, and
// returns its directory.
func (s *site) dockerConfig(t *testing.T, l login) string {
	t.Helper()
	config, err := json.Marshal(map[string]any{"auths": map[string]any{
		s.host: map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte(l.user + ":" + l.password))},
	}})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write(t, filepath.Join(dir, "config.json"), config)
	return dir
}

func write(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
}
