package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	stopGrace    = 10 * time.Second
	restartDelay = time.Second
)

// Init is process 1: it lays the machine out as spec says and serves until
// SIGTERM or, while not detached, until the lifeline ends. It returns only
// then or when the machine cannot be laid out.
func Init(spec Spec) error {
	unix.CloseOnExec(LifelineFD)
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGCHLD)

	// Before the root changes: the path is the host's.
	if err := os.Remove(spec.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", spec.Socket)
	if err != nil {
		return fmt.Errorf("listening for control: %w", err)
	}
	if err := setup(spec); err != nil {
		return err
	}

	m := &manager{services: map[string]*service{}}
	lifeline := make(chan struct{})
	go func() {
		os.NewFile(LifelineFD, "lifeline").Read(make([]byte, 1))
		close(lifeline)
	}()
	go m.serve(listener)
	for {
		select {
		case <-lifeline:
			if !m.detached() {
				return errors.New("the process that started this machine is gone")
			}
			lifeline = nil
		case s := <-signals:
			if s == syscall.SIGTERM {
				return nil
			}
			m.reap()
		}
	}
}

// Pause is the process that holds a pod's namespaces: it reaps until SIGTERM.
func Pause() {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	for s := range signals {
		if s != syscall.SIGCHLD {
			return
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

// manager runs the services. Only reap waits for children, since a second
// waiter could take another's.
type manager struct {
	mu       sync.Mutex // guards everything below, and forking against reaping
	services map[string]*service
	detach   bool
}

type service struct {
	Service
	pid     int           // 0: not running
	gone    chan struct{} // closed when pid was reaped
	stopped bool          // do not start again
	exits   int
}

func (m *manager) detached() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.detach
}

func (m *manager) reap() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for {
		pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if pid <= 0 || err != nil {
			return
		}
		for _, s := range m.services {
			if s.pid == pid {
				m.ended(s)
			}
		}
	}
}

// ended notes that s is gone and, unless it was stopped, starts it again soon.
func (m *manager) ended(s *service) {
	s.pid = 0
	close(s.gone)
	if s.stopped {
		return
	}
	s.exits++
	time.AfterFunc(restartDelay, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if s.pid == 0 && !s.stopped && m.services[s.Name] == s {
			// A program that cannot be started now could not a second ago
			// either; Start reported that.
			_ = m.spawn(s)
		}
	})
}

// spawn starts s in a session of its own. The caller holds mu.
func (m *manager) spawn(s *service) error {
	log, err := os.OpenFile(s.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	pid, err := syscall.ForkExec(s.Args[0], s.Args, &syscall.ProcAttr{
		Dir:   "/",
		Env:   s.Env,
		Files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("starting %s: %w", s.Args[0], err)
	}
	s.pid, s.gone = pid, make(chan struct{})
	return nil
}

func (m *manager) start(req Service) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(req.Args) == 0 || req.Name == "" {
		return errors.New("a service needs a name and a program")
	}
	if s := m.services[req.Name]; s != nil && s.pid != 0 {
		return fmt.Errorf("%s is running already", req.Name)
	}
	s := &service{Service: req}
	if err := m.spawn(s); err != nil {
		return err
	}
	m.services[req.Name] = s
	return nil
}

func (m *manager) stop(name string) error {
	m.mu.Lock()
	s := m.services[name]
	if s == nil {
		m.mu.Unlock()
		return fmt.Errorf("%s was never started", name)
	}
	s.stopped = true
	pid, gone := s.pid, s.gone
	m.mu.Unlock()
	if pid == 0 {
		return nil
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	select {
	case <-gone:
		return nil
	case <-time.After(stopGrace):
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	<-gone
	return nil
}

func (m *manager) list() []Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]Status, 0, len(m.services))
	for _, s := range m.services {
		all = append(all, Status{Name: s.Name, PID: s.pid, Exits: s.exits})
	}
	slices.SortFunc(all, func(a, b Status) int { return strings.Compare(a.Name, b.Name) })
	return all
}

func (m *manager) serve(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			var req request
			if err := json.NewDecoder(conn).Decode(&req); err != nil {
				return
			}
			// The asker sees a lost answer as its own error.
			_ = json.NewEncoder(conn).Encode(m.answer(req))
		}()
	}
}

func (m *manager) answer(req request) response {
	var err error
	switch req.Op {
	case opStart:
		err = m.start(req.Service)
	case opStop:
		err = m.stop(req.Service.Name)
	case opDetach:
		m.mu.Lock()
		m.detach = true
		m.mu.Unlock()
	case opList:
	default:
		err = fmt.Errorf("unknown operation %q", req.Op)
	}
	if err != nil {
		return response{Error: err.Error()}
	}
	return response{Services: m.list()}
}
