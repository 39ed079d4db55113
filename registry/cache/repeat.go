package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"net"
	"net/http"
	"sync"
	"time"
)

// A client that asks for the same manifest again sends the same bytes. Of the time
// that the answer takes, most goes into what package http does for any request.
// So what a request asked for that was answered from memory is remembered by the
// hash of its head, and the same head is answered on the spot from then on, with
// the same bytes, for as long as nobody has to be asked. Nothing is parsed for
// that: package http has accepted every head that is remembered.

const (
	// maxRepeats is how many heads are remembered, in about 512 KiB.
	maxRepeats = 1024

	// maxRepeatBody bounds the manifests that are answered with so, since each
	// connection keeps room for one.
	maxRepeatBody = 32 << 10

	// renewEvery is how much sooner than idleTimeout a connection may be closed.
	renewEvery = time.Second
)

// headSum stands for the head of a request, of which nothing else is kept: it may
// hold a credential.
type headSum [sha256.Size]byte

// repeat is what a request for a manifest asked for, and by what right.
type repeat struct {
	target
	method string
	token  factKey // if it bore one
	bearer bearer  // whom the token stood for
}

// repeats are the requests that may be answered on the spot.
type repeats struct {
	mu     sync.RWMutex // guards byHead
	byHead map[headSum]*repeat
}

func (r *repeats) get(head headSum) *repeat {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.byHead[head]
}

func (r *repeats) put(head headSum, what *repeat) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byHead == nil || len(r.byHead) >= maxRepeats {
		r.byHead = make(map[headSum]*repeat) // what is hot is back at once
	}
	r.byHead[head] = what
}

// remember has requests like r, which asked for m and may have it, answered on
// the spot, if that can be.
func (rq *request) remember(r *http.Request, m *manifest) {
	conn, _ := r.Context().Value(repeatConnKey{}).(*repeatConn)
	if conn == nil || !conn.whole || r.Body != http.NoBody || r.Close || !r.ProtoAtLeast(1, 1) ||
		rq.stranger || len(m.body) > maxRepeatBody {
		return
	}
	rq.disk.repeats.put(conn.head, &repeat{rq.target, r.Method, rq.token, rq.bearer})
}

// repeated returns the manifest that a request asked for if it can be served
// without asking anybody; nil if not.
func (c *Cache) repeated(d *disk, r *repeat) *manifest {
	if reg, err := c.registryFor(r.ns); err != nil || reg.host != r.host {
		return nil
	}
	if r.bearer != (bearer{}) {
		if now, ok := d.bearers.get(r.token); !ok || now != r.bearer {
			return nil
		}
	}
	if !c.allowed(d.ledger, &r.target) {
		return nil
	}
	m := c.manifests.get(r.digest)
	if m != nil {
		d.store.touch(r.digest)
	}
	return m
}

// answer writes what ServeHTTP would, byte for byte, to a request with a head
// that is remembered. It returns false if the request wants more than that; the
// error is that of writing.
func (c *Cache) answer(to *repeatConn) (done bool, err error) {
	if !c.enter() {
		return false, nil
	}
	defer c.requests.Done()
	d := c.disk.Load()
	r := d.repeats.get(to.head)
	if r == nil {
		return false, nil
	}
	m := c.repeated(d, r)
	if m == nil {
		return false, nil
	}
	now := time.Now()
	to.renew(now)
	to.out = m.appendHeader(to.out[:0], hitStored, now)
	header := len(to.out)
	if r.method != http.MethodHead {
		to.out = append(to.out, m.body...)
	}
	c.metrics.answered(kindManifest, hitStored)
	n, err := to.TCPConn.Write(to.out)
	if n > header {
		c.metrics.sent(hitStored, int64(n-header))
	}
	return err == nil, err
}

// appendHeader appends what package http makes of the header that writeManifest
// sets.
func (m *manifest) appendHeader(b []byte, how outcome, now time.Time) []byte {
	b = append(b, "HTTP/1.1 200 OK\r\nCache-Status: "...)
	b = append(b, how.header[0]...)
	b = append(b, "\r\nContent-Length: "...)
	b = append(b, m.header.length[0]...)
	b = append(b, "\r\nContent-Type: "...)
	b = append(b, m.header.mediaType[0]...)
	b = append(b, "\r\nDocker-Content-Digest: "...)
	b = append(b, m.header.digest[0]...)
	b = append(b, "\r\nDate: "...)
	b = now.UTC().AppendFormat(b, http.TimeFormat)
	return append(b, "\r\n\r\n"...)
}

// repeatListener gives an http.Server connections that answer repeated requests
// before the server sees them. The server has to be set up by serveRepeats.
type repeatListener struct {
	net.Listener
	cache *Cache
}

func (l repeatListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if tcp, ok := conn.(*net.TCPConn); ok {
		return &repeatConn{TCPConn: tcp, cache: l.cache, awaits: true}, nil
	}
	return conn, err
}

type repeatConnKey struct{}

// serveRepeats makes srv, which serves a repeatListener, tell its connections
// when it awaits a request, and requests their connection.
func serveRepeats(srv *http.Server) {
	srv.ConnState = func(conn net.Conn, state http.ConnState) {
		if c, ok := conn.(*repeatConn); ok && state == http.StateIdle {
			c.nextRequest()
		}
	}
	srv.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		return context.WithValue(ctx, repeatConnKey{}, conn)
	}
}

// repeatConn is a connection of an http.Server. While the server awaits a request
// on it, Read answers those that are repeated, and returns with the first that is
// not. That works for as long as the server is given one request at a time, head
// alone. Once anything else has come, the connection is the server's for good.
//
// The first request of a connection is always given to the server, for which it
// is idle from then on, and closed without delay when the server shuts down.
//
// To see a client leave, the server reads a byte ahead while it serves a request.
// It may get the first one of the next request, which is the server's then.
//
// The fields belong to the goroutine that serves the connection, but for ahead,
// which the one that reads ahead sets before the server awaits a request again.
type repeatConn struct {
	*net.TCPConn
	cache *Cache

	awaits  bool      // the server awaits a request
	served  bool      // it has served one
	whole   bool      // what it was given last was one head
	head    headSum   // of that
	ahead   []byte    // what it has read of the next one
	more    bool      // it was given something else
	renewed time.Time // when the deadline was set
	out     []byte
}

// Read implements net.Conn.
func (c *repeatConn) Read(p []byte) (int, error) {
	if !c.awaits {
		n, err := c.TCPConn.Read(p)
		if len(p) == 1 && c.whole {
			c.ahead = append(c.ahead, p[:n]...)
		} else if n > 0 {
			c.more = true
		}
		return n, err
	}
	for {
		n, err := c.TCPConn.Read(p)
		request := p[:n]
		if len(c.ahead) > 0 {
			request = append(c.ahead, request...)
		}
		if c.whole = isHead(request); c.whole {
			c.head = sha256.Sum256(request)
		}
		if c.whole && c.served && len(c.ahead) == 0 {
			if done, err := c.cache.answer(c); err != nil {
				return 0, err
			} else if done {
				continue
			}
		}
		c.awaits, c.ahead, c.more = false, nil, false
		return n, err
	}
}

// nextRequest is called when the server has served a request, and before it
// sets the deadline for the next.
func (c *repeatConn) nextRequest() {
	c.whole = c.whole && !c.more
	c.awaits, c.served = c.whole, true
	c.renewed = time.Now()
}

// renew gives the client idleTimeout for its next request, as the server does.
func (c *repeatConn) renew(now time.Time) {
	if now.Sub(c.renewed) >= renewEvery {
		c.renewed = now
		_ = c.SetReadDeadline(now.Add(idleTimeout)) // the connection has failed, as Read will tell
	}
}

// isHead reports whether b is the head of one request and nothing else: whether
// its first blank line is its end (RFC 9112, section 2.1; package http takes
// lines without a carriage return as well). What begins with one is none: it is
// taken for a head after a POST alone.
func isHead(b []byte) bool {
	return bytes.HasSuffix(b, []byte("\r\n\r\n")) && bytes.Index(b, []byte("\n\r\n")) == len(b)-3 &&
		!bytes.Contains(b, []byte("\n\n")) && b[0] != '\r' && b[0] != '\n'
}
