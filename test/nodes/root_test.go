package nodes

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/node"
)

// root is the file system of a node, in which its containerd runs as if it were
// all there is.
type root struct {
	dir     string
	argv    []string // containerd's, inside
	socket  string   // inside
	process *os.Process
	stopped <-chan struct{}
}

// newRoot makes a node of the files in layout, by their path, with an
// executable at the path where the distribution has it. The directory's name is
// short, since sockets in it have addresses of 108 bytes at most.
func newRoot(t *testing.T, layout map[string]string, executable, at string) *root {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "n")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &root{dir: dir}
	for name, text := range layout {
		r.write(t, name, text)
	}
	r.write(t, at, "")
	data, err := os.ReadFile(executable)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, at), data, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, at), 0o755); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *root) write(t *testing.T, name, text string) {
	t.Helper()
	name = filepath.Join(r.dir, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// configuration is every file below the directories that hold configuration.
func (r *root) configuration(t *testing.T) map[string]string {
	t.Helper()
	tree := map[string]string{}
	for _, top := range []string{"etc", "var/lib/rancher/k3s/agent/etc", "var/lib/connected-registry"} {
		err := filepath.WalkDir(filepath.Join(r.dir, top), func(name string, e fs.DirEntry, err error) error {
			if os.IsNotExist(err) {
				return nil
			}
			if err != nil {
				return err
			}
			rel, _ := filepath.Rel(r.dir, name)
			if e.IsDir() {
				tree[rel] = "directory"
				return nil
			}
			data, err := os.ReadFile(name)
			tree[rel] = string(data)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return tree
}

// command is a program inside the root, with nothing inherited.
func (r *root) command(argv ...string) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, argv...)
	cmd.Env = []string{enterVariable + "=" + r.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if uid := os.Geteuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	return cmd, nil
}

// enter becomes argv inside dir, with the kernel's file systems at hand. The
// mounts are in a namespace of their own, and go with the process.
func enter(dir string, argv []string) error {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	for _, name := range []string{"/proc", "/dev", "/sys"} {
		if err := os.MkdirAll(dir+name, 0o755); err != nil {
			return err
		}
		if err := syscall.Mount(name, dir+name, "", syscall.MS_BIND|syscall.MS_REC, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", name, err)
		}
	}
	if err := syscall.Chroot(dir); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	return syscall.Exec(argv[0], argv, []string{"PATH=/usr/bin"})
}

// start starts containerd and waits until it answers.
func (r *root) start(ctx context.Context) error {
	cmd, err := r.command(r.argv...)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(r.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	started, stopped := make(chan error), make(chan struct{})
	go func() {
		// The process is to end with the thread that started it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
		close(stopped)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("starting containerd: %w: run as root with CAP_SYS_ADMIN, or as a user who may create user namespaces", err)
	}
	r.process, r.stopped = cmd.Process, stopped
	return r.answers(ctx)
}

func (r *root) answers(ctx context.Context) error {
	rt, err := node.Connect(r.dir + r.socket)
	if err != nil {
		return err
	}
	defer rt.Close()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := rt.Answers(ctx); err != nil {
		log, _ := os.ReadFile(filepath.Join(r.dir, "log"))
		lines := strings.Split(string(log), "\n")
		return fmt.Errorf("%w\n%s", err, strings.Join(lines[max(0, len(lines)-30):], "\n"))
	}
	return nil
}

func (r *root) stop() {
	if r.process == nil {
		return
	}
	_ = r.process.Signal(syscall.SIGTERM)
	select {
	case <-r.stopped:
	case <-time.After(30 * time.Second):
		_ = r.process.Kill()
		<-r.stopped
	}
	r.process = nil
}

// Restart is what the node's init system would do.
func (r *root) Restart(ctx context.Context) error {
	r.stop()
	return r.start(ctx)
}

// pull has the node's containerd pull an image.
func (r *root) pull(ctx context.Context, image string) error {
	rt, err := node.Connect(r.dir + r.socket)
	if err != nil {
		return err
	}
	defer rt.Close()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return rt.Pull(ctx, image)
}
