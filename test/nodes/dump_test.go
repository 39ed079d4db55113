package nodes

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/connected-registry/connected-registry/node"
)

// executableAt is where every node of the tests has its containerd, K3s aside.
const executableAt = "/usr/bin/containerd"

// TestDump compares, for every node that the node package is tested with and
// every containerd, what is detected with what "containerd config dump" makes of
// the same files, before and after the plan.
func TestDump(t *testing.T) {
	names, err := filepath.Glob("../../node/testdata/nodes/*.txtar")
	if err != nil || len(names) == 0 {
		t.Fatal("no nodes", err)
	}
	for _, name := range names {
		archive, err := txtar.ParseFile(name)
		if err != nil {
			t.Fatal(err)
		}
		layout := map[string]string{}
		for _, f := range archive.Files {
			layout["/"+f.Name] = string(f.Data)
		}
		for i, executable := range runtimes {
			t.Run(strings.TrimSuffix(filepath.Base(name), ".txtar")+"/"+filepath.Base(modules[i]), func(t *testing.T) {
				at := executableAt
				for _, id := range []string{"k3s", "rke2"} {
					if layout["/var/lib/rancher/"+id+"/agent/etc/containerd/config.toml"] != "" {
						at = "/var/lib/rancher/" + id + "/data/current/bin/containerd"
					}
				}
				if layout["/var/snap/microk8s/current/args/containerd.toml"] != "" {
					at = "/snap/microk8s/current/bin/containerd"
				}
				r := newRoot(t, layout, executable, at)
				checkDump(t, r, at)
				d, err := node.Detect(t.Context(), r.dir)
				if err != nil {
					t.Fatal(err)
				}
				p, err := node.NewPlan(t.Context(), r.dir, d)
				if err != nil || p.File == "" {
					return
				}
				r.write(t, p.File, string(p.Data))
				if f := checkDump(t, r, at); f.Verdict != node.OK {
					t.Errorf("after the plan: %+v", f)
				}
			})
		}
	}
}

// checkDump returns what was detected of config_path.
func checkDump(t *testing.T, r *root, at string) node.Finding {
	t.Helper()
	d, err := node.Detect(t.Context(), r.dir)
	if err != nil {
		t.Fatal(err)
	}
	files, ok := d.Finding("configuration")
	if !ok || files.Verdict != node.OK {
		return files // nothing is claimed
	}
	found, ok := d.Finding("config_path")
	if !ok {
		return found // not written yet
	}
	if d.Version == "" {
		t.Fatalf("no version found in the executable: %+v", d.Findings)
	}
	configPath, mirrors, err := dump(r, at, files.Evidence.File)
	if err != nil {
		t.Fatalf("containerd does not take what was taken for understood: %v", err)
	}
	claimed := ""
	if e := found.Evidence; e != nil && strings.HasSuffix(e.Key, ".config_path") {
		claimed = strings.Trim(e.Value, `"`)
	}
	if e := found.Evidence; e != nil && strings.Contains(e.Key, ".mirrors.") {
		if mirrors == 0 {
			t.Errorf("containerd sees no mirrors: %+v", found)
		}
		return found
	}
	if claimed != configPath || mirrors > 0 {
		t.Errorf("containerd %s has config_path %q and %d mirrors, detected was %+v", d.Version, configPath, mirrors, found)
	}
	return found
}

// dump returns what containerd itself makes of its configuration.
func dump(r *root, at, configuration string) (configPath string, mirrors int, err error) {
	argv := []string{at, "config", "default"}
	if _, err := os.Stat(r.dir + configuration); err == nil {
		argv = []string{at, "--config", configuration, "config", "dump"}
	}
	cmd, err := r.command(argv...)
	if err != nil {
		return "", 0, err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", 0, fmt.Errorf("%w\n%s", err, stderr.Bytes())
	}
	type registry struct {
		Registry struct {
			ConfigPath string         `toml:"config_path"`
			Mirrors    map[string]any `toml:"mirrors"`
		} `toml:"registry"`
	}
	var config struct {
		Plugins struct {
			CRI    *registry `toml:"io.containerd.grpc.v1.cri"`
			Images *registry `toml:"io.containerd.cri.v1.images"`
		} `toml:"plugins"`
	}
	if err := toml.Unmarshal(out, &config); err != nil {
		return "", 0, err
	}
	p := config.Plugins.Images
	if p == nil {
		p = config.Plugins.CRI
	}
	if p == nil {
		return "", 0, fmt.Errorf("no CRI plugin in what containerd printed:\n%.2000s", out)
	}
	return p.Registry.ConfigPath, len(p.Registry.Mirrors), nil
}
