package machine

import (
	"context"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs a manager as process 1 does, without a machine around it.
func serve(t *testing.T) Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "socket")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{services: map[string]*service{}}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGCHLD)
	done := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-signals:
				m.reap()
			case <-done:
				return
			}
		}
	}()
	served := make(chan struct{})
	go func() {
		defer close(served)
		m.serve(listener)
	}()
	c := Client{Socket: socket}
	t.Cleanup(func() {
		for _, s := range m.list() {
			if err := c.Stop(context.Background(), s.Name); err != nil {
				t.Error(err)
			}
		}
		listener.Close()
		<-served
		signal.Stop(signals)
		close(done)
		<-ended
	})
	return c
}

func start(t *testing.T, c Client, script string) (log string) {
	t.Helper()
	log = filepath.Join(t.TempDir(), "log")
	err := c.Start(t.Context(), Service{Name: "s", Args: []string{"/bin/sh", "-c", script}, Env: []string{"WORD=hello"}, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return log
}

func eventually(t *testing.T, c Client, what string, ok func(Status) bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		all, err := c.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(all) == 1 && ok(all[0]) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %+v", what, all)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestServiceRuns(t *testing.T) {
	c := serve(t)
	log := start(t, c, "echo $WORD; echo aside >&2; exec sleep 1000")
	deadline := time.Now().Add(10 * time.Second)
	for {
		data, err := os.ReadFile(log)
		if err == nil && string(data) == "hello\naside\n" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("log %q, %v", data, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := c.Start(t.Context(), Service{Name: "s", Args: []string{"/bin/true"}, Log: log}); err == nil || !strings.Contains(err.Error(), "running already") {
		t.Errorf("starting it twice: %v", err)
	}
	if err := c.Stop(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	eventually(t, c, "stopped", func(s Status) bool { return s.PID == 0 && s.Exits == 0 })
	if err := c.Stop(t.Context(), "s"); err != nil {
		t.Errorf("stopping it again: %v", err)
	}
	if err := c.Start(t.Context(), Service{Name: "s", Args: []string{"/bin/sleep", "1000"}, Log: log}); err != nil {
		t.Errorf("starting it again: %v", err)
	}
}

func TestServiceIsRestarted(t *testing.T) {
	c := serve(t)
	start(t, c, "exec sleep 1000")
	all, err := c.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	first := all[0].PID
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, c, "restarted", func(s Status) bool { return s.PID != 0 && s.PID != first && s.Exits == 1 })
}

func TestRefusals(t *testing.T) {
	c := serve(t)
	for name, s := range map[string]Service{
		"no program":         {Name: "x"},
		"no such program":    {Name: "x", Args: []string{"/no/such/program"}, Log: filepath.Join(t.TempDir(), "log")},
		"no place for a log": {Name: "x", Args: []string{"/bin/true"}, Log: "/no/such/directory/log"},
	} {
		if err := c.Start(t.Context(), s); err == nil {
			t.Errorf("%s: was accepted", name)
		}
	}
	if err := c.Stop(t.Context(), "x"); err == nil {
		t.Error("stopping what was never started was accepted")
	}
	if _, err := c.do(t.Context(), request{Op: "nonsense"}); err == nil {
		t.Error("an unknown operation was accepted")
	}
}
