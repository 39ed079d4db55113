package registry

import (
	"net"
	"net/http"
	"sync"
)

// silentConns are the connections on which no request has begun: spares that
// clients open beside the one they use. http.Server.Shutdown takes them for busy
// for five seconds.
type silentConns struct {
	mu    sync.Mutex
	conns map[net.Conn]bool
}

func newSilentConns() *silentConns {
	return &silentConns{conns: make(map[net.Conn]bool)}
}

// track is the server's ConnState hook.
func (s *silentConns) track(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if state == http.StateNew {
		s.conns[c] = true
	} else {
		delete(s.conns, c)
	}
}

func (s *silentConns) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.Close()
	}
}
