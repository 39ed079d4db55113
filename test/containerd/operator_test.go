package containerd

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/connected-registry/connected-registry/agent"
)

// TestOperatorFiles pulls on a node whose operator has host configuration of
// his own, sound and broken, for other registries and for one that we mirror,
// and cleans up after it.
func TestOperatorFiles(t *testing.T) {
	const (
		broken = "server = \"https://broken.test\n[host\n"
		// deadMirror refuses connections: no server has port 1.
		deadMirror = "127.0.0.1:1"
	)
	for _, test := range []struct {
		name  string
		hosts string   // the operator's hosts.toml for the parent, %s its host
		asked []string // the hosts that it adds to ours
	}{
		{"sound", "server = 'http://%s'\n\n# switched off at night\n[host.'http://" + deadMirror + "']\n", []string{deadMirror}},
		{"broken", "# for %s\n" + broken, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			image := load(t, smallImage)
			parent := startParent(t, false)
			parent.push(t, repository+":1", image)
			others := map[string]string{
				"broken.test/hosts.toml": broken,
				"sound.test/hosts.toml":  "server = 'https://sound.test'\n\n[host.'http://" + parent.host + "']\n",
				"docker.io/ca.crt":       "not a certificate\n",
			}
			all := maps.Clone(others)
			all[parent.host+"/hosts.toml"] = fmt.Sprintf(test.hosts, parent.host)
			s := startSystem(t, parent, systemConfig{PrepareNode: func(certs string) {
				for name, content := range all {
					writeHostsFile(t, filepath.Join(certs, name), content)
				}
			}})
			h := &hops{system: s, daemon: startContainerd(t, daemonConfig{CertsDir: s.certs}), image: image}

			for name, content := range others {
				if diff := cmp.Diff(content, readFile(t, filepath.Join(s.certs, name))); diff != "" {
					t.Errorf("the operator's %s (-want +got):\n%s", name, diff)
				}
			}
			h.pulls(t, "the operator's registry", "sound.test/"+repository+":1", []string{parent.host}, parent.host)
			viaCache := []string{h.cacheHost()}
			h.pulls(t, "everything runs", h.own(), viaCache, h.cacheHost())
			h.pulls(t, "everything runs", h.mirrored(), viaCache, h.cacheHost())
			s.cache.stop(t)
			s.registry.stop(t)
			toTheEnd := slices.Concat([]string{h.cacheHost(), s.LoginServer}, test.asked, []string{parent.host})
			h.pulls(t, "cache and registry stopped", h.mirrored(), toTheEnd, parent.host)

			if err := agent.Cleanup(t.Context(), agent.CleanupConfig{NodeRoot: s.nodeRoot}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(all, tree(t, s.certs)); diff != "" {
				t.Errorf("host configuration after the clean-up (-want +got):\n%s", diff)
			}
			pullAndCheck(t, h.daemon, h.mirrored(), image)
		})
	}
}

func writeHostsFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// tree is the content of every file below dir, by its path there.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	for name := range digestTree(t, dir) {
		files[name] = readFile(t, filepath.Join(dir, name))
	}
	return files
}
