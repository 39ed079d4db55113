package node

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// initProgram writes what it is called with to /called, and fails if that names
// a service called "broken".
const initProgram = `package main

import (
	"os"
	"strings"
)

func main() {
	line := strings.Join(os.Args, " ") + " " + os.Getenv("SYSTEMD_IGNORE_CHROOT")
	if err := os.WriteFile("/called", []byte(line), 0o644); err != nil {
		os.Exit(2)
	}
	if strings.Contains(line, "broken") {
		os.Stderr.WriteString("Job failed.\n")
		os.Exit(1)
	}
}
`

// TestRestart runs a program as the init system's in a changed root: the right
// service is restarted, whatever the distribution calls it.
func TestRestart(t *testing.T) {
	program := buildInit(t)
	for _, test := range []struct {
		name     string
		files    []string
		init     string
		want     string
		detected layout
		err      string
	}{
		{"systemd", []string{"run/systemd/system/x", "usr/lib/systemd/system/containerd.service"}, "usr/bin/systemctl", "/usr/bin/systemctl restart containerd 1", layouts[len(layouts)-1], ""},
		{"agent of K3s", []string{"run/systemd/system/x", "etc/systemd/system/k3s-agent.service"}, "usr/bin/systemctl", "/usr/bin/systemctl restart k3s-agent 1", layouts[0], ""},
		{"OpenRC", []string{"run/openrc/x", "etc/init.d/k3s"}, "sbin/rc-service", "/sbin/rc-service k3s restart 1", layouts[0], ""},
		{"failure", []string{"run/systemd/system/x", "etc/systemd/system/broken.service"}, "usr/bin/systemctl", "/usr/bin/systemctl restart broken 1", layout{units: []string{"broken"}}, "Job failed."},
		{"unknown service", []string{"run/systemd/system/x"}, "usr/bin/systemctl", "", layouts[0], "restart the runtime by hand"},
		{"systemd does not run", []string{"etc/systemd/system/k3s.service"}, "usr/bin/systemctl", "", layouts[0], "restart the runtime by hand"},
	} {
		t.Run(test.name, func(t *testing.T) {
			root := t.TempDir()
			for _, name := range append(test.files, test.init) {
				name = filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name, program, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			r, err := NewRestarter(root, Detection{layout: test.detected})
			if err == nil {
				err = r.Restart(t.Context())
			}
			if os.Geteuid() != 0 && test.want != "" {
				test.want, test.err = "", "run as root"
			}
			if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Errorf("error %v, want %q", err, test.err)
			}
			called, _ := os.ReadFile(filepath.Join(root, "called"))
			if diff := cmp.Diff(test.want, string(called)); diff != "" {
				t.Errorf("called (-want +got):\n%s", diff)
			}
		})
	}
}

func buildInit(t *testing.T) []byte {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(initProgram), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "init"), filepath.Join(dir, "main.go"))
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	program, err := os.ReadFile(filepath.Join(dir, "init"))
	if err != nil {
		t.Fatal(err)
	}
	return program
}

// TestNothingRestarts: where nobody can restart the runtime, its configuration
// stays, and a person is told all that is to be done.
func TestNothingRestarts(t *testing.T) {
	root := t.TempDir()
	name := filepath.Join(root, defaultConfig)
	const config = "version = 3\n"
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	_, _, err := Configure(t.Context(), Config{NodeRoot: root, Allowed: true})
	if err == nil || !strings.Contains(err.Error(), "by hand") || !strings.Contains(err.Error(), defaultConfig) || !strings.Contains(err.Error(), "config_path") {
		t.Errorf("%v, which does not tell of both steps", err)
	}
	if got, err := os.ReadFile(name); err != nil || string(got) != config {
		t.Errorf("the configuration is now %q, %v", got, err)
	}
}
