package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/random"
)

// TestFullDisk fills the file system of the data directory, a small one in a
// mount namespace of its own. The synchronisation that does not fit fails with
// one line, and what was there before stays whole. A first start says what to do.
func TestFullDisk(t *testing.T) {
	parent := newParent(t)
	small, err := random.Image(64<<10, 2)
	if err != nil {
		t.Fatal(err)
	}
	large, err := random.Image(4<<20, 4)
	if err != nil {
		t.Fatal(err)
	}
	parent.push(t, "team/app:v1", small)
	dir := t.TempDir()
	config := writeConfig(t, dir, parent.host)
	mount := filepath.Join(dir, "small")
	if err := os.Mkdir(mount, 0o755); err != nil {
		t.Fatal(err)
	}
	pushed := filepath.Join(dir, "pushed")

	// The shell waits between the commands for what the test changes.
	script := fmt.Sprintf(`
mount -t tmpfs -o size=8m tmpfs %[1]s || exit 1
%[2]s sync --config %[3]s --data %[1]s/data || exit 1
touch %[4]s.wanted
while [ ! -e %[4]s ]; do sleep 0.02; done
echo === full; echo === full >&2
%[2]s sync --config %[3]s --data %[1]s/data && exit 1
echo === after; echo === after >&2
%[2]s sync --config %[3]s --data %[1]s/data --dry-run || exit 1
echo === new >&2
dd if=/dev/zero of=%[1]s/fill bs=64k 2>%[4]s.dd
%[2]s standalone --config %[3]s --data %[1]s/new --anonymous --listen 127.0.0.1:0 --cache-listen= --node-root= && exit 1
exit 0
`, mount, os.Args[0], config, pushed)
	args := []string{"--mount", "--fork", "--kill-child"}
	if os.Geteuid() != 0 {
		args = append(args, "--user", "--map-root-user")
	}
	cmd := exec.CommandContext(t.Context(), "unshare", append(args, "sh", "-c", script)...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	waitFile(t, pushed+".wanted", done)
	parent.push(t, "team/app:v2", large)
	if err := os.WriteFile(pushed, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatalf("%v\n%s%s", err, stdout.String(), stderr.String())
	}

	_, full, _ := strings.Cut(stderr.String(), "=== full\n")
	full, _, _ = strings.Cut(full, "=== after\n")
	if strings.Count(full, "\n") != 1 || !strings.Contains(full, "no space left on device") || !strings.Contains(full, mount) {
		t.Errorf("the full disk is reported as\n%s", full)
	}
	_, begun, _ := strings.Cut(stderr.String(), "=== new\n")
	if !strings.HasSuffix(begun, "no space left on device: free space on the volume of "+mount+"/new, or give another directory with --data\n") {
		t.Errorf("to begin on a full disk is reported as\n%s", begun)
	}
	_, after, _ := strings.Cut(stdout.String(), "=== after\n")
	if fields := strings.Fields(lineWith(after, " v1 ")); len(fields) < 3 || fields[2] != "keep" {
		t.Errorf("after the full disk, v1 is not kept:\n%s", after)
	}
}

func lineWith(text, part string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(line, part) {
			return line
		}
	}
	return ""
}
