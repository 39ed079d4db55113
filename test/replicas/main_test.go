package replicas

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

var (
	duration = flag.Duration("replicas.time", 45*time.Second, "for how long replicas are killed")
	// storageFile names an object store, for both the replicas and the leader.
	storageFile = flag.String("replicas.storage", "", "storage.yaml of an object store to use in place of a directory")
)

// The programs under test. TestMain builds them, before any test runs.
var program, containerdPath string

func TestMain(m *testing.M) {
	if root := os.Getenv(leaderVariable); root != "" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		err := lead(ctx, root)
		stop()
		if err != nil {
			fmt.Fprintln(os.Stderr, "leader:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "replicas-")
	if err == nil {
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "connected-registry")
		err = build(program)
	}
	if err == nil {
		containerdPath, err = buildContainerd()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

func build(to string) error {
	cmd := exec.Command("go", "build", "-C", "../..", "-o", to, "./cmd/connected-registry")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building the registry: %w\n%s", err, out)
	}
	return nil
}

// buildContainerd compiles the containerd that go.mod pins, without what has no
// part in pulling, and returns where it is.
func buildContainerd() (string, error) {
	cmd := exec.Command("go", "tool", "-n", "containerd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+
		" -tags=no_btrfs,no_devmapper,no_zfs,no_tracing,urfave_cli_no_docs,osusergo,netgo"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("building containerd: %w\n%s", err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), nil
}
