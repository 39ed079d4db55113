package main

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"flag"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/connected-registry/connected-registry/agent"
	"github.com/connected-registry/connected-registry/trust"
)

var update = flag.Bool("update", false, "write the golden files")

// doctorNode is a node whose mirrors are set up by the agent.
type doctorNode struct {
	root  string
	names *strings.Replacer // makes output the same on every run
}

// newDoctorNode lays out a node with a containerd of which nothing but the
// configuration is there, the registry over TLS, a cache, and an upstream.
func newDoctorNode(t *testing.T, config string, cacheRuns, trusted bool) doctorNode {
	t.Helper()
	answer := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) })
	registry, cache, upstream := httptest.NewUnstartedServer(answer), httptest.NewServer(answer), httptest.NewServer(answer)
	registry.Config.ErrorLog = log.New(io.Discard, "", 0) // a certificate is refused on purpose
	registry.StartTLS()
	t.Cleanup(registry.Close)
	t.Cleanup(upstream.Close)
	if cacheRuns {
		t.Cleanup(cache.Close)
	} else {
		cache.Close()
	}
	n := doctorNode{root: t.TempDir()}
	for name, text := range map[string]string{
		"etc/os-release": "ID=debian\nVERSION_ID=13\n", "usr/sbin/update-ca-certificates": "", "etc/containerd/config.toml": config,
	} {
		name = filepath.Join(n.root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var ca trust.Bundle
	if trusted {
		var err error
		if ca, _, err = trust.ParseBundle(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: registry.Certificate().Raw}), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	a, err := agent.New(agent.Config{
		NodeRoot: n.root, Registry: registry.Listener.Addr().String(), CA: ca, CacheURL: cache.URL,
		Mirrors: []agent.Mirror{{Registry: "registry.test", Server: upstream.URL}, {Registry: "isolated.test", NoFallback: true}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.names = strings.NewReplacer(registry.Listener.Addr().String(), "REGISTRY", cache.Listener.Addr().String(), "CACHE", upstream.Listener.Addr().String(), "UPSTREAM")
	return n
}

const (
	configured   = "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '/etc/containerd/certs.d'\n"
	unconfigured = "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n"
)

// TestDoctor compares what doctor prints with golden files.
func TestDoctor(t *testing.T) {
	for _, test := range []struct {
		name, config       string
		cacheRuns, trusted bool
		args               []string
		faulty             bool
	}{
		{"all well", configured, true, true, []string{"--image", "registry.test/team/app:1", "--own-image", "registry.test/connected-registry:1"}, false},
		{"not configured", unconfigured, true, true, nil, true},
		{"cache away", configured, false, true, []string{"--image", "registry.test/team/app:1"}, false},
		{"certificate not trusted", configured, false, false, []string{"--image", "isolated.test/team/app:1"}, true},
		{"own image on the mirror", configured, true, true, []string{"--own-image", "isolated.test/connected-registry:1"}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := newDoctorNode(t, test.config, test.cacheRuns, test.trusted)
			var out bytes.Buffer
			err := run(t.Context(), append([]string{"doctor", "--node-root", n.root}, test.args...), &out, &out)
			if (err != nil) != test.faulty {
				t.Errorf("error %v, want one: %v", err, test.faulty)
			}
			checkGolden(t, filepath.Join("testdata/doctor", strings.ReplaceAll(test.name, " ", "-")+".txt"), n.plain(out.String()))
		})
	}
}

// plain takes out of a table what differs from run to run.
func (n doctorNode) plain(out string) string {
	lines := strings.Split(n.names.Replace(out), "\n")
	for i, l := range lines {
		lines[i] = strings.Join(strings.Fields(l), " ")
	}
	return strings.Join(lines, "\n")
}

func checkGolden(t *testing.T, name, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

// TestDoctorJSON: what other programs read says the same.
func TestDoctorJSON(t *testing.T) {
	n := newDoctorNode(t, configured, true, true)
	var out bytes.Buffer
	if err := run(t.Context(), []string{"doctor", "--node-root", n.root, "-o", "json", "--image", "registry.test/team/app:1"}, &out, &out); err != nil {
		t.Fatal(err)
	}
	var found struct {
		Node struct {
			Distribution, CertsDir, Verdict string
		}
		Images []struct {
			Image, Verdict string
			Hosts          []struct{ URL, Verdict string }
		}
	}
	if err := json.Unmarshal(out.Bytes(), &found); err != nil {
		t.Fatalf("%v in %s", err, out.Bytes())
	}
	if found.Node.CertsDir != "/etc/containerd/certs.d" || found.Node.Verdict != "warning" || len(found.Images) != 1 || len(found.Images[0].Hosts) != 3 || found.Images[0].Verdict != "ok" {
		t.Errorf("%+v", found)
	}
}

// TestDoctorMistakes: what cannot be done is said.
func TestDoctorMistakes(t *testing.T) {
	for _, args := range [][]string{{"-o", "yaml"}, {"--node-root", filepath.Join(t.TempDir(), "absent")}} {
		if err := run(t.Context(), append([]string{"doctor"}, args...), &bytes.Buffer{}, &bytes.Buffer{}); err == nil {
			t.Errorf("%v is accepted", args)
		}
	}
}
