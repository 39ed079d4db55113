package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// Restarter restarts a node's container runtime.
type Restarter interface {
	// Restart returns when the node's init system says that it is done, which
	// is before the runtime answers.
	Restart(ctx context.Context) error
}

// service is a service of the node's init system, restarted by the node's own
// program in the node's root. The running containers stay.
//
// In a container that takes the node's root file system mounted from "/" with
// what is mounted below it, and leave to change into it (CAP_SYS_CHROOT, user
// 0): the program speaks to the init system by a socket in /run. Neither the
// host's process namespace nor signals to its processes are needed.
type service struct {
	nodeRoot string
	argv     []string
}

// initSystems are the programs by which services are restarted, and where a
// service shows.
var initSystems = []struct {
	program, running string
	services         []string // with a verb for the service's name
	argv             func(program, service string) []string
}{
	{
		program: "/usr/bin/systemctl", running: "/run/systemd/system",
		services: []string{"/etc/systemd/system/%s.service", "/usr/lib/systemd/system/%s.service", "/lib/systemd/system/%s.service", "/usr/local/lib/systemd/system/%s.service"},
		argv:     func(program, service string) []string { return []string{program, "restart", service} },
	},
	{
		program: "/sbin/rc-service", running: "/run/openrc",
		services: []string{"/etc/init.d/%s"},
		argv:     func(program, service string) []string { return []string{program, service, "restart"} },
	},
}

// NewRestarter returns what restarts the runtime of the node whose file system
// is at nodeRoot. An error means that its init system is none that is known, or
// does not know the runtime.
func NewRestarter(nodeRoot string, d Detection) (Restarter, error) {
	root, err := os.OpenRoot(nodeRoot)
	if err != nil {
		return nil, fmt.Errorf("node root %s: %w", nodeRoot, err)
	}
	defer root.Close()
	r := rootFiles{root}
	for _, system := range initSystems {
		if !r.exists(system.program) || !r.exists(system.running) {
			continue
		}
		for _, unit := range d.layout.units {
			for _, file := range system.services {
				if !r.exists(fmt.Sprintf(file, unit)) {
					continue
				}
				return service{nodeRoot: nodeRoot, argv: system.argv(system.program, unit)}, nil
			}
		}
	}
	return nil, fmt.Errorf("neither systemd nor OpenRC of this node knows the service %s: restart the runtime by hand", d.layout.units[0])
}

// Restart runs the node's own program.
func (s service) Restart(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, s.argv[0], s.argv[1:]...)
	cmd.Dir = "/"
	// systemctl does nothing where it takes itself to be in a changed root.
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_IGNORE_CHROOT=1"}
	if root := filepath.Clean(s.nodeRoot); root != "/" {
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	}
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if errors.Is(err, syscall.EPERM) {
		return errors.New("only root can restart the runtime of another node root: run as root")
	}
	return fmt.Errorf("%q on the node: %w: %s", s.argv, err, bytes.TrimSpace(out))
}
