package containerd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/standalone"
)

// repository is the one that every test keeps.
const repository = "team/app"

// privateUser is who may read from a private system.
const (
	privateUser     = "reader"
	privatePassword = "correct horse battery staple"
)

// system is the product on one machine: the central registry with the content
// of a parent, the node cache, and a node's file system configured for both.
type system struct {
	*standalone.Standalone
	parent   *parent
	data     string // the product's data directory
	nodeRoot string
	certs    string // containerd's host configuration below nodeRoot

	registry, cache *part
}

// systemConfig says what is different from a system with everything.
type systemConfig struct {
	// Listen is the registry's address. Empty: a free port of 127.0.0.1.
	Listen string
	// WithoutCache leaves the node without a cache.
	WithoutCache bool
	// Private lets nobody read but the client privateUser.
	Private bool
	// Mirror is what the operator says about the mirror of the parent, as
	// fields of a YAML flow mapping. Empty: nothing.
	Mirror string
	// PrepareNode is called before the agent first sees the node. nil: the
	// node's file system is empty.
	PrepareNode func(certsDir string)
}

// startSystem synchronises repository from parent, configures a node and
// serves, until the test ends or a part is stopped.
func startSystem(t *testing.T, parent *parent, config systemConfig) *system {
	t.Helper()
	dir := t.TempDir()
	s := &system{
		parent:   parent,
		data:     filepath.Join(dir, "data"),
		nodeRoot: filepath.Join(dir, "node"),
		certs:    filepath.Join(dir, "node", "etc", "containerd", "certs.d"),
	}
	if err := os.MkdirAll(s.certs, 0o755); err != nil {
		t.Fatal(err)
	}
	if config.PrepareNode != nil {
		config.PrepareNode(s.certs)
	}
	s.open(t, config)
	s.registry = startPart(t, "registry", s.Registry.Run)
	if s.Cache != nil {
		s.cache = startPart(t, "cache", s.Cache.Run)
	}
	if _, err := s.Syncer.Sync(t.Context(), v1alpha1.SyncTriggerInitial); err != nil {
		t.Fatalf("synchronising: %v", err)
	}
	if _, err := s.Agent.Apply(t.Context()); err != nil {
		t.Fatalf("configuring the node: %v", err)
	}
	parent.reset()
	return s
}

func (s *system) open(t *testing.T, config systemConfig) {
	t.Helper()
	resource, err := v1alpha1.Load("test", s.resource(t, config))
	if err != nil {
		t.Fatal(err)
	}
	c := standalone.Config{
		Resource: resource,
		Data:     s.data,
		Listen:   cmp.Or(config.Listen, "127.0.0.1:0"),
		NodeRoot: s.nodeRoot,
		Logger:   slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	if !config.WithoutCache {
		c.CacheListen = "127.0.0.1:0"
	}
	s.Standalone, err = standalone.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
}

// resource is what an operator writes, with the parent's certificate, if it
// has one, in a Secret beside it. Synchronisation happens when the test says.
func (s *system) resource(t *testing.T, config systemConfig) []byte {
	t.Helper()
	mirror, access := config.Mirror, "anonymousPull: true"
	if config.Private {
		access = fmt.Sprintf("clientTokens: [{name: %[1]s, secretRef: {name: %[1]s}, scopeMap: [{repositories: [%[2]s], actions: [content/read, metadata/read]}]}]",
			privateUser, repository)
		s.writeSecret(t, privateUser, "password1", []byte(privatePassword))
	}
	var mirrors string
	if mirror != "" {
		mirrors = fmt.Sprintf("mirrors: [{registry: %q, %s}]", s.parent.host, mirror)
	}
	security := "insecure: true"
	if certificate := s.parent.certificate(); certificate != nil {
		security = "caSecretRef: {name: parent-ca}"
		s.writeSecret(t, "parent-ca", "ca.crt", certificate)
	}
	return fmt.Appendf(nil, `
apiVersion: connectedregistry.io/v1alpha1
kind: ConnectedRegistry
metadata:
  name: edge
spec:
  parent:
    endpoint: %s
    %s
  repositories:
    - name: %s
  %s
  sync:
    schedule: "0 0 1 1 *"
  %s
`, s.parent.host, security, repository, access, mirrors)
}

func (s *system) writeSecret(t *testing.T, name, key string, value []byte) {
	t.Helper()
	dir := filepath.Join(s.data, "secrets", name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, key), value, 0o600); err != nil {
		t.Fatal(err)
	}
}

// part is a running piece of the product.
type part struct {
	name   string
	cancel context.CancelFunc
	ended  chan struct{}
	err    error // of Run, once ended is closed
}

// startPart runs a part until it is stopped, at the latest at the end of the
// test.
func startPart(t *testing.T, name string, run func(context.Context) error) *part {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	p := &part{name: name, cancel: cancel, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		p.err = run(ctx)
	}()
	t.Cleanup(func() { p.stop(t) })
	return p
}

// stop ends the part and returns when it has ended. It may be called again.
func (p *part) stop(t *testing.T) {
	t.Helper()
	const patience = 15 * time.Second // it promises five, on a machine that is not busy
	p.cancel()
	select {
	case <-p.ended:
	case <-time.After(patience):
		t.Fatalf("the %s did not stop within %v", p.name, patience)
	}
	if p.err != nil && !errors.Is(p.err, context.Canceled) {
		t.Errorf("the %s ended with: %v", p.name, p.err)
	}
}
