package node

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// memory is a node in memory.
type memory map[string][]byte

func (m memory) read(name string) ([]byte, error) { return m[name], nil }

func (m memory) list(string) ([]string, error) { return nil, nil }

// FuzzPlan: whatever a configuration says, a plan keeps every value but one, and
// every byte but a few; and what cannot be parsed is left alone.
func FuzzPlan(f *testing.F) {
	for _, node := range fixtures(f) {
		for _, file := range node.files {
			if bytes.HasSuffix([]byte(file.Name), []byte(".toml")) {
				f.Add(file.Data, node.version.Text)
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, version string) {
		const name = "/etc/containerd/config.toml"
		node := memory{name: data}
		d := Detection{layout: layouts[len(layouts)-1], version: parseVersion(version), configFile: name}
		c, err := loadConfig(node, name, d.version)
		if err != nil || c.unclear() != "" {
			return
		}
		d.config = c
		d.readsHosts = c.hosts(defaultCertsDir).reads
		p := plan(node, d)
		if p.File == "" {
			return
		}
		if p.File != name {
			if !isPattern(string(data)) {
				t.Fatalf("%s is written, which nothing imports", p.File)
			}
			return
		}
		after, err := loadConfig(memory{name: p.Data}, name, d.version)
		if err != nil {
			t.Fatalf("the result does not parse: %v\n%s", err, p.Data)
		}
		if s := after.hosts(defaultCertsDir); !s.reads || s.mirrors {
			t.Fatalf("no hosts directory is read with\n%s", p.Data)
		}
		key := at("plugins", after.plugin(), "registry", "config_path")
		if diff := cmp.Diff([]string{key}, changedKeys(c, after)); diff != "" {
			t.Fatalf("changed (-want +got):\n%s", diff)
		}
		// All that was there before stays, but for the old value and a missing end
		// of the last line.
		start := commonPrefix(data, p.Data)
		lost := len(data) - start - commonSuffix(data[start:], p.Data[start:])
		if old, ok := c.values[key]; lost > 1 && (!ok || lost > old.end-old.start) {
			t.Fatalf("%d bytes are lost:\n%s", lost, p.Data)
		}
	})
}

func commonPrefix(a, b []byte) (n int) {
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}

func commonSuffix(a, b []byte) (n int) {
	for n < len(a) && n < len(b) && a[len(a)-1-n] == b[len(b)-1-n] {
		n++
	}
	return n
}

// FuzzRegistries: a registries.yaml is foreign too.
func FuzzRegistries(f *testing.F) {
	f.Add([]byte("mirrors:\n  docker.io:\n    endpoint: [\"https://mirror.example\"]\nconfigs:\n  mirror.example: {}\n"))
	f.Add([]byte("mirrors: []\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		hosts, err := registryHosts(data)
		if err != nil && hosts != nil {
			t.Errorf("both %q and %v", hosts, err)
		}
	})
}
