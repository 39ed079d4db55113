package main

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"

	"golang.org/x/time/rate"
)

// gigabit is what the network of a node carries, in bytes per second, where it
// is no better than usual.
const gigabit = 1e9 / 8

// wire passes connections on to an address, what comes back at a fixed rate for
// all together.
type wire struct {
	addr     string
	to       string
	limit    *rate.Limiter
	listener net.Listener

	mu    sync.Mutex // guards conns
	conns map[net.Conn]struct{}
	all   sync.WaitGroup
}

func startWire(to string, perSecond float64) (*wire, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	w := &wire{
		addr: l.Addr().String(), to: to, listener: l, conns: make(map[net.Conn]struct{}),
		limit: rate.NewLimiter(rate.Limit(perSecond), wireChunk),
	}
	w.all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			w.all.Go(func() { w.carry(conn) })
		}
	})
	return w, nil
}

const wireChunk = 128 << 10

// carry lives until either end closes.
func (w *wire) carry(conn net.Conn) {
	defer w.keep(conn)()
	// What has passed the wire is at the other end.
	_ = conn.(*net.TCPConn).SetWriteBuffer(wireChunk)
	server, err := net.Dial("tcp", w.to)
	if err != nil {
		return
	}
	defer w.keep(server)()
	w.all.Go(func() {
		_, _ = io.Copy(server, conn)
		server.Close()
	})
	buf := make([]byte, wireChunk)
	for {
		n, err := server.Read(buf)
		if n > 0 {
			err = errors.Join(err, w.limit.WaitN(context.Background(), n))
			_, broken := conn.Write(buf[:n])
			err = errors.Join(err, broken)
		}
		if err != nil {
			return
		}
	}
}

// keep has stop close a connection, until it is told that it is not needed.
func (w *wire) keep(conn net.Conn) (done func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns[conn] = struct{}{}
	return func() {
		conn.Close()
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.conns, conn)
	}
}

func (w *wire) stop() {
	w.listener.Close()
	w.mu.Lock()
	for conn := range w.conns {
		conn.Close()
	}
	w.mu.Unlock()
	w.all.Wait()
}
