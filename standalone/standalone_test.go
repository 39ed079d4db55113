package standalone

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/go-containerregistry/pkg/name"
	parentregistry "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"go.uber.org/goleak"

	"github.com/connected-registry/connected-registry/agent"
	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/syncer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func load(t *testing.T, spec string) *v1alpha1.ConnectedRegistry {
	t.Helper()
	r, err := v1alpha1.Load("test", []byte("apiVersion: connectedregistry.io/v1alpha1\nkind: ConnectedRegistry\nmetadata: {name: test}\nspec:\n"+spec))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestStops ends a Standalone in the midst of a synchronisation that the parent
// does not let finish and of a pull through the cache.
func TestStops(t *testing.T) {
	asked := make(chan struct{}, 100)
	next := parentregistry.New(parentregistry.Logger(log.New(io.Discard, "", 0)))
	parent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/sha256:") {
			asked <- struct{}{}
			<-r.Context().Done()
			return
		}
		next.ServeHTTP(w, r)
	}))
	defer parent.Close()
	host := strings.TrimPrefix(parent.URL, "http://")
	push(t, host+"/team/app:v1")

	dir := t.TempDir()
	s, err := Open(t.Context(), Config{
		Resource:    load(t, fmt.Sprintf("  parent: {endpoint: %q, insecure: true}\n  repositories: [{name: team/app}]\n  anonymousPull: true\n", host)),
		Data:        filepath.Join(dir, "data"),
		Listen:      "127.0.0.1:0",
		CacheListen: "127.0.0.1:0",
		NodeRoot:    dir,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	select {
	case <-asked:
	case err := <-done:
		t.Fatalf("Run ended: %v", err)
	case <-time.After(30 * time.Second):
		t.Fatal("the parent is not asked for blobs")
	}
	// A connection that a client keeps open must not keep the process.
	idle, err := net.Dial("tcp", strings.TrimPrefix(s.CacheURL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()

	start := time.Now()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	s.Close()
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("stopping took %s, more than 5 s", took)
	}
}

func push(t *testing.T, tagged string) {
	t.Helper()
	ref, err := name.ParseReference(tagged)
	if err != nil {
		t.Fatal(err)
	}
	img, err := random.Image(1<<16, 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	remote.DefaultTransport.(*http.Transport).CloseIdleConnections()
}

// TestSecondProcess wants the data directory to belong to one process, and to
// be free once that has gone.
func TestSecondProcess(t *testing.T) {
	c := Config{Resource: load(t, "  anonymousPull: true\n"), Data: t.TempDir(), Listen: "127.0.0.1:0"}
	first, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("is used by process %d", os.Getpid())) {
		t.Errorf("second Open: %v", err)
	}
	first.Close()
	again, err := Open(t.Context(), c)
	if err != nil {
		t.Fatalf("Open after Close: %v", err)
	}
	again.Close()
}

// TestKeepsItsCA wants nodes that trust the first start to trust the next.
func TestKeepsItsCA(t *testing.T) {
	c := Config{Resource: load(t, "  anonymousPull: true\n"), Data: t.TempDir(), Listen: "127.0.0.1:0"}
	var fingerprints []string
	for range 2 {
		s, err := Open(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		fingerprints = append(fingerprints, s.ca.Fingerprint())
		s.Close()
	}
	if fingerprints[0] != fingerprints[1] {
		t.Error("the second start made another CA")
	}
}

// TestKeepServing lets two years pass, and wants a valid certificate at the end
// of each day of them.
func TestKeepServing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		certs := filepath.Join(t.TempDir(), "tls")
		s := &Standalone{log: slog.New(slog.DiscardHandler), LoginServer: "registry.example.com"}
		if err := s.openTLS(t.TempDir(), certs, &net.TCPAddr{IP: net.IPv4(10, 1, 2, 3), Port: 443}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go s.keepServing(ctx)
		for range 2 * 366 {
			time.Sleep(24 * time.Hour)
			synctest.Wait()
			pair, err := tls.LoadX509KeyPair(filepath.Join(certs, "tls.crt"), filepath.Join(certs, "tls.key"))
			if err != nil {
				t.Fatal(err)
			}
			_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: s.ca.Pool(), DNSName: "registry.example.com", CurrentTime: time.Now()})
			if err != nil {
				t.Fatalf("on %s: %v", time.Now().Format(time.DateOnly), err)
			}
		}
	})
}

func TestOpenMistakes(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	secrets := t.TempDir()
	writeSecret(t, secrets, "key", "ca.crt", "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
	writeSecret(t, secrets, "docker", ".dockerconfigjson", `{"auths":{"other.example.com":{"auth":"c2VjcmV0OnNlY3JldA=="}}}`)
	writeSecret(t, secrets, "broken", ".dockerconfigjson", `{"auths":{"parent.example.com":{"auth":"hunter2"}}}`)

	for _, test := range []struct{ name, spec, listen, cache, want string }{
		{"nobody may pull", "  mode: ReadOnly\n", "127.0.0.1:0", "", "nobody could pull"},
		{"port taken", "  anonymousPull: true\n", taken.Addr().String(), "", "address already in use: stop what uses it or give another address"},
		{"cache for everybody", "  anonymousPull: true\n", "127.0.0.1:0", "0.0.0.0:0", "stays on loopback"},
		{"Secret missing", "  parent: {endpoint: parent.example.com, credentialsSecretRef: {name: absent}}\n", "", "", "Secret absent: open " + secrets},
		{"key for a CA", "  parent: {endpoint: parent.example.com, caSecretRef: {name: key}}\n", "", "", "Secret key, key ca.crt: "},
		{"credentials of another", "  parent: {endpoint: parent.example.com, credentialsSecretRef: {name: docker}}\n", "", "", "auths has no entry for parent.example.com"},
		{"credentials broken", "  parent: {endpoint: parent.example.com, credentialsSecretRef: {name: broken}}\n", "", "", `auths["parent.example.com"].auth is not`},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := Open(t.Context(), Config{
				Resource: load(t, test.spec), Data: t.TempDir(), Secrets: secrets, Listen: test.listen, CacheListen: test.cache,
			})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("error %v, expected %q", err, test.want)
			}
			for _, secret := range []string{"c2VjcmV0", "hunter2"} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("the error shows a secret: %v", err)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %v", err)
			}
		})
	}
}

func writeSecret(t *testing.T, dir, name, key, value string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name, key), []byte(value), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestMirrors(t *testing.T) {
	r := load(t, "  parent: {endpoint: registry.example.com}\n")
	source, err := syncer.Resolve(t.Context(), r.Spec.Parent, secrets(""))
	if err != nil {
		t.Fatal(err)
	}
	ignoreCA := cmpopts.IgnoreFields(agent.Mirror{}, "ServerCA")
	want := []agent.Mirror{{Registry: "registry.example.com", Server: "https://registry.example.com"}}
	if diff := cmp.Diff(want, mirrors(&r.Spec, source), ignoreCA); diff != "" {
		t.Errorf("by default the parent is mirrored: %s", diff)
	}
	r = load(t, "  parent: {endpoint: registry.example.com}\n  mirrors: [{registry: ghcr.io, resolveTags: false}, {registry: registry.example.com, fallback: false}]\n")
	want = []agent.Mirror{
		{Registry: "ghcr.io", TagsUpstream: true},
		{Registry: "registry.example.com", NoFallback: true},
	}
	if diff := cmp.Diff(want, mirrors(&r.Spec, source), ignoreCA); diff != "" {
		t.Error(diff)
	}
}

func TestNames(t *testing.T) {
	addr := func(s string) net.Addr {
		a, err := net.ResolveTCPAddr("tcp", s)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ addr, login, reach string }{
		{"10.1.2.3:443", "10.1.2.3", "10.1.2.3:443"},
		{"10.1.2.3:5443", "10.1.2.3:5443", "10.1.2.3:5443"},
		{"[fd00::1]:443", "[fd00::1]", "[fd00::1]:443"},
		{"[fd00::1]:5443", "[fd00::1]:5443", "[fd00::1]:5443"},
		{"0.0.0.0:5443", host + ":5443", "127.0.0.1:5443"},
	} {
		if got := loginServer(addr(test.addr)); got != test.login {
			t.Errorf("loginServer(%s) = %s, expected %s", test.addr, got, test.login)
		}
		if got := reachable(addr(test.addr)); got != test.reach {
			t.Errorf("reachable(%s) = %s, expected %s", test.addr, got, test.reach)
		}
		names, err := servingNames(test.login, addr(test.addr))
		if err != nil {
			t.Fatal(err)
		}
		joined := " " + strings.Join(names, " ") + " "
		for _, need := range []string{hostOnly(test.login), hostOnly(test.reach), "localhost"} {
			if !strings.Contains(joined, " "+need+" ") {
				t.Errorf("a registry on %s has no %s in its certificate: %v", test.addr, need, names)
			}
		}
	}
}

// TestDeletePropagation wants a tag that is no longer selected to go, if the
// resource says so.
func TestDeletePropagation(t *testing.T) {
	parent := httptest.NewServer(parentregistry.New(parentregistry.Logger(log.New(io.Discard, "", 0))))
	defer parent.Close()
	host := strings.TrimPrefix(parent.URL, "http://")
	push(t, host+"/team/app:v1")
	push(t, host+"/team/app:v2")
	data := t.TempDir()
	for _, test := range []struct {
		tags, sync string
		removed    int
	}{
		{"[v1, v2]", "{}", 0},
		{"[v1]", "{}", 0},
		{"[v1]", "{deletePropagation: true}", 1},
	} {
		s, err := Open(t.Context(), Config{Data: data, Resource: load(t, fmt.Sprintf(
			"  parent: {endpoint: %q, insecure: true}\n  repositories: [{name: team/app, tags: {include: %s}}]\n  sync: %s\n", host, test.tags, test.sync))})
		if err != nil {
			t.Fatal(err)
		}
		result, err := s.Syncer.Sync(t.Context(), v1alpha1.SyncTriggerManual)
		s.Close()
		if err != nil {
			t.Fatal(err)
		}
		if result.TagsRemoved != test.removed {
			t.Errorf("tags %s, sync %s: %d removed, expected %d", test.tags, test.sync, result.TagsRemoved, test.removed)
		}
	}
}

// TestRefusesWhatNeedsACluster names the field of each thing that one machine by
// itself cannot do.
func TestRefusesWhatNeedsACluster(t *testing.T) {
	for spec, field := range map[string]string{
		"  tls: {source: CertManager}\n":                                   "spec.tls.source: CertManager",
		"  tls: {source: Secret, secretName: a}\n":                         "spec.tls.source: Secret",
		"  trustDistribution: {caSecrets: [{name: a}]}\n":                  "spec.trustDistribution.caSecrets",
		"  trustDistribution: {configureRuntime: true}\n":                  "spec.trustDistribution.configureRuntime",
		"  nodeCache: {peers: true}\n":                                     "spec.nodeCache.peers",
		"  nodeCache: {prefetchWorkloads: true}\n":                         "spec.nodeCache.prefetchWorkloads",
		"  trustDistribution: {disabled: true}\n  tls: {disabled: true}\n": "spec.tls.disabled",
	} {
		_, err := Open(t.Context(), Config{Resource: load(t, spec), Data: t.TempDir()})
		if err == nil || !strings.HasPrefix(err.Error(), field+" works in a cluster only") {
			t.Errorf("%q: error %v", spec, err)
		}
	}
}
