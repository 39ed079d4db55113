package containerd

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/connected-registry/connected-registry/registry/cache"
)

// startProcess starts cmd and returns a channel that is closed when it has
// exited. The process does not outlive the test's, however that ends.
func startProcess(cmd *exec.Cmd) (<-chan struct{}, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started, stopped := make(chan error), make(chan struct{})
	go func() {
		// The signal comes when the thread that started the process ends, so
		// that thread is kept until the process has gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
			close(stopped)
		}
	}()
	return stopped, <-started
}

// cacheProcessVariable makes the test executable a node cache instead: its
// value is a cacheProcessConfig in JSON.
const cacheProcessVariable = "CONTAINERD_TEST_CACHE"

type cacheProcessConfig struct {
	Dir        string   // where it stores
	DiskSize   int64    // of a disk of its own for Dir, in bytes; 0: it has none
	Registries []string // hosts to answer for
	Upstream   string   // URL
}

// runCacheProcess prints the cache's address and serves until it is killed.
func runCacheProcess(encoded string) error {
	var config cacheProcessConfig
	if err := json.Unmarshal([]byte(encoded), &config); err != nil {
		return err
	}
	if config.DiskSize > 0 {
		if err := os.MkdirAll(config.Dir, 0o700); err != nil {
			return err
		}
		// In the mount namespace that this process was started in.
		if err := syscall.Mount("disk", config.Dir, "tmpfs", 0, fmt.Sprintf("size=%d", config.DiskSize)); err != nil {
			return fmt.Errorf("mounting a small disk: %w", err)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	registries := map[string]cache.Registry{}
	for _, host := range config.Registries {
		registries[host] = cache.Registry{Upstreams: []cache.Upstream{{URL: config.Upstream}}}
	}
	c, err := cache.New(cache.Config{
		Dir:        config.Dir,
		Registries: registries,
		Listener:   listener,
		Logger:     slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr())
	return c.Run(context.Background())
}

// cacheProcess is a node cache in a process of its own, to be killed.
type cacheProcess struct {
	host    string // host:port
	process *os.Process
	stopped <-chan struct{}
}

func startCacheProcess(t *testing.T, config cacheProcessConfig) *cacheProcess {
	t.Helper()
	encoded, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = []string{cacheProcessVariable + "=" + string(encoded)}
	cmd.Stderr = t.Output()
	if config.DiskSize > 0 {
		cmd.SysProcAttr = isolation()
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stdout = w
	c := &cacheProcess{}
	c.stopped, err = startProcess(cmd)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	c.process = cmd.Process
	t.Cleanup(c.kill)
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		t.Fatalf("the cache said nothing: %v", err)
	}
	c.host = strings.TrimSpace(line)
	return c
}

// kill ends the process at once, as kill -9 does, and waits until it has gone.
// It may be called again.
func (c *cacheProcess) kill() {
	_ = c.process.Kill()
	<-c.stopped
}
