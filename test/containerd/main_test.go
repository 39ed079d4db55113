package containerd

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

// daemonPath is the containerd executable under test. TestMain sets it once,
// before any test runs.
var daemonPath string

func TestMain(m *testing.M) {
	if config := os.Getenv(cacheProcessVariable); config != "" {
		fmt.Fprintln(os.Stderr, runCacheProcess(config))
		os.Exit(1)
	}
	path, err := buildDaemon()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	daemonPath = path
	goleak.VerifyTestMain(m)
}

// buildDaemon compiles the containerd that go.mod pins as a tool and returns
// the executable's path. The go command keeps it in its build cache, so only
// the first run pays for it.
//
// The tags leave out what needs cgo or other programs and has no part in
// pulling: it halves the build.
func buildDaemon() (string, error) {
	cmd := exec.Command("go", "tool", "-n", "containerd")
	cmd.Env = append(os.Environ(),
		"CGO_ENABLED=0",
		"GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+
			" -tags=no_btrfs,no_devmapper,no_zfs,no_tracing,urfave_cli_no_docs,osusergo,netgo"),
	)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("building containerd with %q: %w\n%s", cmd.Args, err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), nil
}
