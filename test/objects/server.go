package objects

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// patience is how long a server may take to start: other work may share the
// processors.
const patience = 2 * time.Minute

// Server is an object store that runs.
type Server struct {
	URL string // where it is asked
	CA  string // a file with the authority of its certificate; empty: plain HTTP

	command func() *exec.Cmd
	ready   func() error
	cmd     *exec.Cmd
	done    chan struct{}
	output  *bytes.Buffer
}

// start starts the program and waits until it answers.
func (s *Server) start(ctx context.Context) error {
	s.output = new(bytes.Buffer)
	s.cmd, s.done = s.command(), make(chan struct{})
	s.cmd.Stdout, s.cmd.Stderr = s.output, s.output
	// It ends with this process, however that ends.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // which must outlive the program
		defer runtime.UnlockOSThread()
		err := s.cmd.Start()
		started <- err
		if err == nil {
			s.cmd.Wait() //nolint:errcheck // how it ended is seen in what it wrote
			close(s.done)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := s.ready()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("%s does not answer: %w", s.cmd.Path, err), s.Close())
		case <-s.done:
			return fmt.Errorf("%s ended:\n%s", s.cmd.Path, s.output)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Kill ends the server as a crash does.
func (s *Server) Kill() {
	s.cmd.Process.Kill() //nolint:errcheck // it may be gone already
	<-s.done
}

// grace is how long a server may take to end, though connections stay open.
const grace = 10 * time.Second

// Stop asks the server to end, and waits a while.
func (s *Server) Stop() {
	s.cmd.Process.Signal(syscall.SIGTERM) //nolint:errcheck // it may be gone already
	select {
	case <-s.done:
	case <-time.After(grace):
		s.Kill()
	}
}

// Restart starts a server that was killed, at the same address with the same data.
func (s *Server) Restart(ctx context.Context) error { return s.start(ctx) }

// Close ends the server.
func (s *Server) Close() error {
	s.Kill()
	return nil
}

// newClient asks a server that may go away: each time over a new connection. Roots
// are those that sign for it, nil for plain HTTP.
func newClient(roots *x509.CertPool) *http.Client {
	return &http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true},
	}
}

// makeBuckets makes directories of buckets, where a server keeps them as such.
func makeBuckets(data string, names []string) error {
	for _, name := range names {
		if err := os.MkdirAll(filepath.Join(data, name), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// answers is ready when url answers with the status.
func answers(client *http.Client, url string, status int) func() error {
	return func() error {
		r, err := client.Get(url)
		if err != nil {
			return err
		}
		defer r.Body.Close()
		if r.StatusCode != status {
			return fmt.Errorf("%s answers %s", url, r.Status)
		}
		return nil
	}
}

// freeAddress is a loopback address that nobody listens at.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// tool compiles the program that the module in a directory beside this file pins
// as a tool; the go command keeps it in its build cache.
func tool(module, name string) (string, error) {
	_, file, _, _ := runtime.Caller(0)
	cmd := exec.Command("go", "tool", "-C", filepath.Join(filepath.Dir(file), module), "-n", name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", name, err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), nil
}
