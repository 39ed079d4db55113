package clients

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

// cranePath is the crane executable under test. TestMain sets it once, before
// any test runs.
var cranePath string

func TestMain(m *testing.M) {
	for _, program := range []string{"skopeo", "podman"} {
		if _, err := exec.LookPath(program); err != nil {
			fmt.Fprintf(os.Stderr, "%s is not installed: install the packages skopeo, podman and crun\n", program)
			os.Exit(1)
		}
	}
	cmd := exec.Command("go", "tool", "-n", "crane")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		fmt.Fprintf(os.Stderr, "building crane: %v\n%s", err, stderr.Bytes())
		os.Exit(1)
	}
	cranePath = strings.TrimSpace(string(out))
	goleak.VerifyTestMain(m)
}
