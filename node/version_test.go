package node

import (
	"debug/buildinfo"
	"os"
	"path/filepath"
	"runtime/debug"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestModuleVersion: what executables tell of the containerd in them, by how
// distributors build them.
func TestModuleVersion(t *testing.T) {
	const v1, v2 = "github.com/containerd/containerd", "github.com/containerd/containerd/v2"
	for _, test := range []struct {
		name string
		info buildinfo.BuildInfo
		want Version
	}{
		{"the module itself", buildinfo.BuildInfo{Main: debug.Module{Path: v2, Version: "v2.4.2"}}, Version{2, 4, "2.4.2"}},
		{"version 1", buildinfo.BuildInfo{Main: debug.Module{Path: v1, Version: "v1.7.35"}}, Version{1, 7, "1.7.35"}},
		{"a flag of the linker", buildinfo.BuildInfo{
			Main:     debug.Module{Path: v2, Version: "(devel)"},
			Settings: []debug.BuildSetting{{Key: "-ldflags", Value: "-s -w -X " + v2 + "/version.Version=2.1.4-1 -X " + v2 + "/version.Revision=abc"}},
		}, Version{2, 1, "2.1.4-1"}},
		{"a working copy", buildinfo.BuildInfo{Main: debug.Module{Path: v2, Version: "(devel)"}}, Version{2, -1, "2.x"}},
		{"part of another program, replaced", buildinfo.BuildInfo{
			Main: debug.Module{Path: "github.com/k3s-io/k3s", Version: "(devel)"},
			Deps: []*debug.Module{{Path: v2, Version: "v2.1.0", Replace: &debug.Module{Path: "github.com/k3s-io/containerd/v2", Version: "v2.1.4-k3s1"}}},
		}, Version{2, 1, "2.1.4-k3s1"}},
		{"another program", buildinfo.BuildInfo{Main: debug.Module{Path: "example.com/x", Version: "v1.2.3"}}, Version{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, _ := moduleVersion(&test.info)
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestDetect: an executable that tells nothing is no fault. What real ones tell
// is tested in test/nodes.
func TestDetect(t *testing.T) {
	root := t.TempDir()
	name := filepath.Join(root, "usr/bin/containerd")
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	d, err := Detect(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	if f, _ := d.Finding("runtime"); d.Version != "" || f.Verdict != Warning {
		t.Errorf("version %q, %+v", d.Version, f)
	}
	if dir, err := CertsDir(t.Context(), root); err != nil || dir != defaultCertsDir {
		t.Errorf("hosts directory %q, %v", dir, err)
	}
	if _, err := Detect(t.Context(), filepath.Join(root, "absent")); err == nil {
		t.Error("a node root that is not there is accepted")
	}
}

// TestConfigureNotAllowed changes nothing and says what is to be done; nor is
// anything changed where nobody could tell whether the runtime comes back.
func TestConfigureNotAllowed(t *testing.T) {
	for _, f := range fixtures(t) {
		if f.name != "comments" {
			continue
		}
		f.lay(t)
		before := f.tree(t)
		if _, p, err := Configure(t.Context(), Config{NodeRoot: f.dir}); err != nil || len(p.Steps) == 0 {
			t.Errorf("%+v, %v", p, err)
		}
		if _, _, err := Configure(t.Context(), Config{NodeRoot: f.dir, Allowed: true, Restarter: service{}}); err == nil {
			t.Error("a runtime that does not run is restarted")
		}
		if diff := cmp.Diff(before, f.tree(t)); diff != "" {
			t.Errorf("(-before +after):\n%s", diff)
		}
		return
	}
	t.Fatal("no such node")
}
