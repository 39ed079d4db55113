package cluster

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// need is something of the host's, and the Debian package that has it.
type need struct {
	path, pkg string
}

func needs() []need {
	return []need{
		{"busybox", "busybox-static"}, // the real program in test images
		{"conntrack", "conntrack"},    // kube-proxy forgets stale flows with it
		{"gcc", "gcc"},                // runc's beginning is C
		{"ip", "iproute2"},
		{"iptables", "iptables"},
		{"mount", "mount"}, // the kubelet mounts volumes with it
		{"nsenter", "util-linux"},
		{"pkg-config", "pkg-config"},
		{"unshare", "util-linux"},
		{"/usr/include/seccomp.h", "libseccomp-dev"},
	}
}

// prepare installs what is missing, or says what that is.
func prepare(ctx context.Context, log *slog.Logger) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("a cluster needs root: run this as root, for instance with sudo -E")
	}
	var missing []string
	for _, n := range needs() {
		if !has(n.path) {
			missing = append(missing, n.pkg)
		}
	}
	slices.Sort(missing)
	missing = slices.Compact(missing)
	if len(missing) == 0 {
		return nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("missing programs: install what Debian calls %s", strings.Join(missing, " "))
	}
	log.Info("installing with apt-get", "packages", missing)
	for _, args := range [][]string{
		{"update", "-qq"},
		append([]string{"install", "-qq", "-y", "--no-install-recommends"}, missing...),
	} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if _, err := output(cmd); err != nil {
			return fmt.Errorf("installing %s: %w", strings.Join(missing, " "), err)
		}
	}
	return nil
}

func has(path string) bool {
	if strings.HasPrefix(path, "/") {
		_, err := os.Stat(path)
		return err == nil
	}
	_, err := exec.LookPath(path)
	return err == nil
}
