package nodes

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/containerd/log"
)

// enterVariable makes the test executable enter the root directory that is its
// value, and there become the program of its arguments.
const enterVariable = "NODES_TEST_ENTER"

// modules are the modules that pin a containerd as a tool, oldest first.
var modules = []string{"containerd17", "containerd22", "../containerd"}

// runtimes are the executables built from modules. TestMain sets them once.
var runtimes []string

func TestMain(m *testing.M) {
	if root := os.Getenv(enterVariable); root != "" {
		fmt.Fprintln(os.Stderr, enter(root, os.Args[1:]))
		os.Exit(1)
	}
	if err := log.SetLevel("fatal"); err != nil {
		panic(err)
	}
	for _, module := range modules {
		path, err := build(module)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		runtimes = append(runtimes, path)
	}
	goleak.VerifyTestMain(m)
}

// build compiles the containerd that a module pins as a tool; the go command
// keeps it in its build cache. The tags leave out what has no part in pulling.
func build(module string) (string, error) {
	cmd := exec.Command("go", "tool", "-C", module, "-n", "containerd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+
		" -tags=no_btrfs,no_devmapper,no_zfs,no_aufs,no_tracing,urfave_cli_no_docs,osusergo,netgo"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("building containerd with %q: %w\n%s", cmd.Args, err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), nil
}
