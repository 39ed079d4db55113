package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	startTime = 15 * time.Second // by when a server must listen
	stopTime  = 8 * time.Second
	// clockTick is the unit of CPU time in /proc (USER_HZ).
	clockTick = 10 * time.Millisecond
)

// process is a server under test.
type process struct {
	cmd   *exec.Cmd
	addr  string
	log   string // the file its output goes to
	ended chan error
}

// start runs a server. Its address is either known before, or the first line
// that it prints.
func start(addr, log string, name string, args ...string) (*process, error) {
	out, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p := &process{cmd: exec.Command(name, args...), addr: addr, log: log, ended: make(chan error, 1)}
	p.cmd.Stderr = out
	// A killed benchmark leaves no server behind.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stdout io.ReadCloser
	if addr == "" {
		if stdout, err = p.cmd.StdoutPipe(); err != nil {
			return nil, err
		}
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", filepath.Base(name), err)
	}
	if stdout != nil {
		line, err := bufio.NewReader(stdout).ReadString('\n')
		if err != nil {
			p.cmd.Wait()
			return nil, p.died(errors.New("it ended before it served"))
		}
		p.addr = strings.TrimSpace(line)
	}
	go func() { p.ended <- p.cmd.Wait() }()
	if err := p.untilListening(); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

func (p *process) untilListening() error {
	for deadline := time.Now().Add(startTime); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("tcp", p.addr)
		if err == nil {
			return conn.Close()
		}
		select {
		case err := <-p.ended:
			p.ended <- err
			return p.died(err)
		default:
		}
		if time.Now().After(deadline) {
			return p.died(fmt.Errorf("not listening on %s within %v", p.addr, startTime))
		}
	}
}

func (p *process) died(why error) error {
	said, _ := os.ReadFile(p.log)
	said = said[max(0, len(said)-1000):]
	return fmt.Errorf("%s: %w: %s", filepath.Base(p.cmd.Path), why, bytes.TrimSpace(said))
}

// stop ends the process, by force if it has to.
func (p *process) stop() {
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(stopTime):
		p.cmd.Process.Kill()
		<-p.ended
	}
}

// cpu is the processor time that the process and its children, nginx's workers,
// have taken.
func (p *process) cpu() (time.Duration, error) {
	var total time.Duration
	for _, pid := range family(p.cmd.Process.Pid) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, err
		}
		// The second field, the name, may hold anything: count from its end.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		for _, field := range fields[11:13] { // utime, stime
			ticks, err := strconv.ParseInt(field, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("reading /proc/%d/stat: %w", pid, err)
			}
			total += time.Duration(ticks) * clockTick
		}
	}
	return total, nil
}

func family(pid int) []int {
	all := []int{pid}
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return all
	}
	for _, field := range strings.Fields(string(children)) {
		if child, err := strconv.Atoi(field); err == nil {
			all = append(all, family(child)...)
		}
	}
	return all
}

// forgetPeak makes peak begin anew.
func (p *process) forgetPeak() error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.cmd.Process.Pid), []byte("5"), 0)
}

// peak is the most memory that was resident since forgetPeak, in bytes.
func (p *process) peak() (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kb << 10, err
		}
	}
	return 0, errors.New("/proc does not tell how much memory a process has used")
}

// untilIdle returns when the process has done nothing for a while.
func (p *process) untilIdle() error {
	const pause = 300 * time.Millisecond
	last := time.Duration(-1)
	for range 100 {
		now, err := p.cpu()
		if err != nil || now-last < clockTick && last >= 0 {
			return err
		}
		last = now
		time.Sleep(pause)
	}
	return p.died(errors.New("it does not come to rest"))
}

// freeAddress is an address that nobody listens on, for servers that do not say
// which one they took.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// build builds a program with the flags that releases are built with.
func build(ctx context.Context, dir, out, pkg string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-C", dir, "-trimpath", "-ldflags", "-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w: %s", pkg, err, bytes.TrimSpace(said))
	}
	return nil
}
