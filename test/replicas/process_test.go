package replicas

import (
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

// process is one that does not outlive the test's, however that ends.
type process struct {
	*os.Process
	stopped <-chan struct{}
	err     *error // of its end, once stopped is closed
}

func start(cmd *exec.Cmd) (*process, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started, stopped, ended := make(chan error), make(chan struct{}), new(error)
	go func() {
		// The signal comes when the thread that started the process ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			*ended = cmd.Wait()
			close(stopped)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return &process{cmd.Process, stopped, ended}, nil
}

func (p *process) kill() {
	_ = p.Kill()
	<-p.stopped
}

// terminate asks a process to end, and waits until it has.
func (p *process) terminate(t *testing.T) {
	t.Helper()
	_ = p.Signal(syscall.SIGTERM)
	select {
	case <-p.stopped:
	case <-time.After(time.Minute):
		p.kill()
		t.Errorf("process %d did not end when it was told to", p.Pid)
	}
}

const tailSize = 64 << 10

// tail keeps the last of what processes print.
type tail struct {
	mu sync.Mutex
	b  []byte // guarded by mu
}

func (l *tail) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, p...)
	if len(l.b) > 2*tailSize {
		l.b = append([]byte(nil), l.b[len(l.b)-tailSize:]...)
	}
	return len(p), nil
}

func (l *tail) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b)
}
