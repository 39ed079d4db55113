package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/connected-registry/connected-registry/test/cluster/internal/machine"
	"golang.org/x/sys/unix"
)

// boot starts a machine, which has no network yet, and returns its process 1.
// The machine's entry in the state must exist; boot completes it.
func (c *Cluster) boot(ctx context.Context, number int, spec machine.Spec) (process, error) {
	if err := c.lifeline.open(); err != nil {
		return process{}, err
	}
	spec.Socket = c.manager(spec.Hostname).Socket
	data, err := json.MarshalIndent(spec, "", "  ")
	if err != nil {
		return process{}, err
	}
	file := c.path("machines", spec.Hostname+".json")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return process{}, err
	}
	if err := os.WriteFile(file, data, 0o644); err != nil {
		return process{}, err
	}
	cmd, err := c.initCommand(number, file, spec.Hostname)
	if err != nil {
		return process{}, err
	}
	err = cmd.Start()
	cmd.Stdout.(*os.File).Close()
	if err != nil {
		return process{}, fmt.Errorf("starting the machine %s: %w", spec.Hostname, err)
	}
	ended := make(chan struct{})
	c.waits.Go(func() {
		defer close(ended)
		_ = cmd.Wait() // machines end by being killed
	})
	p, err := identify(cmd.Process.Pid)
	if err != nil {
		return process{}, c.bootError(spec.Hostname, err)
	}
	c.machine(number).Process = p
	if err := c.store.write(c.state); err != nil {
		return process{}, err
	}
	waiting, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-ended:
			cancel()
		case <-waiting.Done():
		}
	}()
	if err := (machine.Client{Socket: spec.Socket}).Wait(waiting); err != nil {
		return process{}, c.bootError(spec.Hostname, err)
	}
	return p, nil
}

func (c *Cluster) bootError(name string, err error) error {
	return fmt.Errorf("starting the machine %s: %w\n%s", name, err, tail(filepath.Join(c.Logs(), name, "machine.log")))
}

// initCommand is process 1 of a machine. A node starts from the mounts of the
// control plane's machine, where the tmpfs is that holds what the nodes write.
func (c *Cluster) initCommand(number int, spec, name string) (*exec.Cmd, error) {
	args := []string{"unshare", "--mount", "--propagation", "private", "--",
		c.programs.path("machine", "machine"), "init", spec}
	if number > 0 {
		args = append([]string{
			"nsenter", "--target", strconv.Itoa(c.machine(0).Process.PID), "--mount", "--",
		}, args...)
	}
	logs := filepath.Join(c.Logs(), name)
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(logs, "machine.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{c.lifeline.end} // machine.LifelineFD
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
	}
	return cmd, nil
}

// lifeline is the pipe that ties machines to this process: each has the end,
// and the kernel lets go of our side of it when this process ends.
type lifeline struct{ end, ours *os.File }

func (l *lifeline) open() (err error) {
	if l.end == nil {
		l.end, l.ours, err = os.Pipe()
	}
	return err
}

func (l *lifeline) close() {
	if l.end != nil {
		l.end.Close()
		l.ours.Close()
	}
	*l = lifeline{}
}

// machine returns the state of a machine; the caller holds mu.
func (c *Cluster) machine(number int) *machineState {
	for i := range c.state.Machines {
		if c.state.Machines[i].Number == number {
			return &c.state.Machines[i]
		}
	}
	return &machineState{}
}

// environment is what services run with.
func environment() []string {
	return []string{
		"PATH=" + binDir + "/kubernetes:" + binDir + "/containerd:" + binDir + "/runc:" + binDir + "/addons:" + binDir + "/machine:" +
			"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root",
	}
}

// checkDir refuses a directory on an overlay, on which containerd could not
// stack its own.
func checkDir(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("looking at the file system of %s: %w", dir, err)
	}
	if st.Type == unix.OVERLAYFS_SUPER_MAGIC {
		return fmt.Errorf("%s is on an overlay: choose a directory on a disk or a tmpfs, with Dir, -dir or XDG_CACHE_HOME", dir)
	}
	return nil
}
