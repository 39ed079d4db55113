package replicas

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"syscall"
	"testing"
	"time"
)

// noticeTime is how long it takes until a Service no longer names a replica that
// has died: the kubelet looks once a second, and the rest follows at once.
const noticeTime = time.Second

// service is what a Service with its kube-proxy is to clients. A new connection
// goes to any of the replicas that are taken for ready, whether it lives or not,
// and stays there.
type service struct {
	health *http.Client

	mu    sync.Mutex
	ready map[string]bool // by address; guarded by mu
}

func newService() *service {
	return &service{
		health: &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}},
		ready:  make(map[string]bool),
	}
}

// look keeps the Service in step with a replica until ctx ends. It is added when
// it answers that it is ready, and taken away noticeTime after it does not.
func (s *service) look(ctx context.Context, address, health string) {
	for ctx.Err() == nil {
		ready := s.isReady(ctx, health)
		if !ready {
			wait(ctx, noticeTime)
		}
		s.set(address, ready)
		wait(ctx, 100*time.Millisecond)
	}
}

func (s *service) isReady(ctx context.Context, health string) bool {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+health+"/readyz", nil)
	if err != nil {
		return false
	}
	answer, err := s.health.Do(r)
	if err != nil {
		return false
	}
	answer.Body.Close()
	return answer.StatusCode == http.StatusOK
}

func (s *service) set(address string, ready bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready[address] = ready
}

// all reports whether so many replicas are ready.
func (s *service) all(n int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ready := range s.ready {
		if ready {
			n--
		}
	}
	return n <= 0
}

// dial connects to one of the replicas, whatever address it is given. What
// becomes of the connection is between the client and the kernel, as it is with
// kube-proxy, which only rewrites addresses.
func (s *service) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	s.mu.Lock()
	var ready []string
	for address, ok := range s.ready {
		if ok {
			ready = append(ready, address)
		}
	}
	s.mu.Unlock()
	if len(ready) == 0 {
		return nil, fmt.Errorf("the Service has no endpoint: %w", syscall.ECONNREFUSED)
	}
	var d net.Dialer
	return d.DialContext(ctx, network, ready[rand.IntN(len(ready))])
}

// listen makes the Service reachable at an address, for programs of others. A
// connection that ends on one side ends in the same way on the other; one that
// would be refused is reset.
func (s *service) listen(t *testing.T) (address string) {
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var relays sync.WaitGroup
	relays.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			relays.Go(func() { s.relay(ctx, client.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		relays.Wait()
	})
	return l.Addr().String()
}

func (s *service) relay(ctx context.Context, client *net.TCPConn) {
	defer client.Close()
	conn, err := s.dial(ctx, "tcp", "")
	if err != nil {
		_ = client.SetLinger(0)
		return
	}
	replica := conn.(*net.TCPConn)
	defer replica.Close()
	defer context.AfterFunc(ctx, func() { client.Close(); replica.Close() })()
	var both sync.WaitGroup
	both.Go(func() { pass(client, replica) })
	both.Go(func() { pass(replica, client) })
	both.Wait()
}

// pass copies one direction, and passes its end on.
func pass(to, from *net.TCPConn) {
	_, err := io.Copy(to, from)
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		_ = to.SetLinger(0)
		_ = from.SetLinger(0)
		to.Close()
		from.Close()
		return
	}
	_ = to.CloseWrite()
}

// wait returns after d, or when ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
