package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/connected-registry/connected-registry/registry"
	"github.com/connected-registry/connected-registry/registry/auth"
	"github.com/connected-registry/connected-registry/storage"
)

// parentOptions say how the link to the parent behaves.
type parentOptions struct {
	ResetAfter int64 // bytes after which each connection is reset; 0: never
	PerSecond  int64 // bytes that it carries in a second; 0: any number
}

// parentCounts are what a parent was asked for since it was asked last.
type parentCounts struct {
	Requests  int64 // of all kinds
	Manifests int64 // of these, for manifests
	Bodies    int64 // of these, with the manifest in the answer
	Blobs     int64 // bytes of blobs that were sent
}

// countsPath is where a parent tells its counts and begins anew.
const countsPath = "/counts"

// serveParent is a registry that counts what it is asked for, over a link that
// may be bad.
func serveParent(ctx context.Context, l net.Listener, root, options string) error {
	var o parentOptions
	if err := json.Unmarshal([]byte(options), &o); err != nil {
		return err
	}
	store, err := storage.Open(ctx, storage.Config{Root: root})
	if err != nil {
		return err
	}
	defer store.Close()
	authority, err := auth.New(auth.Config{
		AnonymousPull: func() bool { return true },
		Hosts:         func() []string { return []string{l.Addr().String()} },
	})
	if err != nil {
		return err
	}
	server, err := registry.New(registry.Config{Store: store, Auth: authority})
	if err != nil {
		return err
	}
	if o != (parentOptions{}) {
		link := &badLink{Listener: l, options: o}
		if o.PerSecond > 0 {
			link.limiter = rate.NewLimiter(rate.Limit(o.PerSecond), linkPiece)
		}
		l = link
	}
	h := http.Server{Handler: &countingHandler{next: server.Handler()}, ReadHeaderTimeout: time.Minute}
	stop := context.AfterFunc(ctx, func() { h.Close() })
	defer stop()
	if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

type countingHandler struct {
	next                               http.Handler
	requests, manifests, bodies, blobs atomic.Int64
}

func (h *countingHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == countsPath {
		json.NewEncoder(w).Encode(parentCounts{h.requests.Swap(0), h.manifests.Swap(0), h.bodies.Swap(0), h.blobs.Swap(0)})
		return
	}
	h.requests.Add(1)
	switch {
	case strings.Contains(r.URL.Path, "/manifests/"):
		h.manifests.Add(1)
		if r.Method == http.MethodGet {
			h.bodies.Add(1)
		}
	case strings.Contains(r.URL.Path, "/blobs/"):
		w = &countingWriter{w, &h.blobs}
	}
	h.next.ServeHTTP(w, r)
}

// countingWriter lets files go out without passing through the program.
type countingWriter struct {
	http.ResponseWriter
	bytes *atomic.Int64
}

func (w *countingWriter) Write(b []byte) (int, error) {
	n, err := w.ResponseWriter.Write(b)
	w.bytes.Add(int64(n))
	return n, err
}

func (w *countingWriter) ReadFrom(r io.Reader) (int64, error) {
	n, err := io.Copy(w.ResponseWriter, r)
	w.bytes.Add(n)
	return n, err
}

func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// badLink resets connections, or carries little.
type badLink struct {
	net.Listener
	options parentOptions
	limiter *rate.Limiter // nil: none
}

// linkPiece is how many bytes a limited link carries at once.
const linkPiece = 16 << 10

func (l *badLink) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	tcp := c.(*net.TCPConn)
	// What a kill finds on its way counts as sent, and is lost.
	if err := tcp.SetWriteBuffer(linkPiece); err != nil {
		return nil, err
	}
	return &badConn{TCPConn: tcp, link: l, left: l.options.ResetAfter}, nil
}

type badConn struct {
	*net.TCPConn
	link *badLink
	mu   sync.Mutex
	left int64 // bytes until the reset, if there is to be one; guarded by mu
}

var errReset = errors.New("the link broke")

func (c *badConn) Write(b []byte) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(b) > 0 {
		piece := b[:min(len(b), linkPiece)]
		if c.link.options.ResetAfter > 0 {
			if c.left <= 0 {
				return n, c.reset()
			}
			piece = piece[:min(int64(len(piece)), c.left)]
		}
		if c.link.limiter != nil {
			if err := c.link.limiter.WaitN(context.Background(), len(piece)); err != nil {
				return n, err
			}
		}
		m, err := c.TCPConn.Write(piece)
		n, b, c.left = n+m, b[m:], c.left-int64(m)
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// ReadFrom keeps the kernel from taking a short cut past Write.
func (c *badConn) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{c}, r)
}

// reset breaks the connection once everything that was sent has arrived, so that
// it is not the reset that loses bytes which count as sent.
func (c *badConn) reset() error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	for range 1000 {
		queued := 0
		if err := raw.Control(func(fd uintptr) { queued, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }); err != nil || queued == 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return errors.Join(errReset, c.SetLinger(0), c.Close())
}

// counts asks a parent what it was asked for since the last time.
func (p *process) counts() (c parentCounts, err error) {
	resp, err := http.Get("http://" + p.addr + countsPath)
	if err != nil {
		return c, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&c); err != nil {
		return c, fmt.Errorf("reading a parent's counts: %w", err)
	}
	return c, nil
}
