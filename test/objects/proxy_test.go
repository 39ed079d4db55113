package objects

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// fault does something to a request instead of handing it on as it is.
type fault func(p *proxy, w http.ResponseWriter, r *http.Request)

// proxy stands between us and an object store, and does what is to be feared.
type proxy struct {
	URL     string
	forward *httputil.ReverseProxy

	mu    sync.Mutex
	next  fault
	match func(*http.Request) bool
	times int // that are left
	seen  int // faults done
}

// startProxy runs one until the test ends. keepHost is for stores that sign by it.
func startProxy(t *testing.T, upstream string, keepHost bool) *proxy {
	t.Helper()
	u, err := url.Parse(upstream)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 16}
	p := &proxy{forward: &httputil.ReverseProxy{
		Transport: transport,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = u.Scheme, u.Host
			r.Out.Host = u.Host
			if keepHost {
				r.Out.Host = r.In.Host
			}
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { reset(w) },
	}}
	s := httptest.NewServer(p)
	t.Cleanup(func() {
		s.Close()
		transport.CloseIdleConnections()
	})
	p.URL = s.URL + u.Path
	return p
}

// inject does a fault to the next requests that match.
func (p *proxy) inject(times int, f fault, match func(*http.Request) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next, p.match, p.times, p.seen = f, match, times, 0
}

// faults is how many were done since inject.
func (p *proxy) faults() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	f := p.next
	if p.times == 0 || !p.match(r) {
		f = nil
	} else {
		p.times--
		p.seen++
	}
	p.mu.Unlock()
	if f == nil {
		p.forward.ServeHTTP(w, r)
		return
	}
	f(p, w, r)
}

// reset ends a connection at once.
func reset(w http.ResponseWriter) {
	c, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if c, ok := c.(*net.TCPConn); ok {
		c.SetLinger(0) //nolint:errcheck // then it is closed in order
	}
	c.Close()
}

// refuse resets without handing on.
func refuse(_ *proxy, w http.ResponseWriter, _ *http.Request) { reset(w) }

// lose hands the request on, and loses the answer.
func lose(p *proxy, w http.ResponseWriter, r *http.Request) {
	p.forward.ServeHTTP(httptest.NewRecorder(), r)
	reset(w)
}

// damage changes a byte near the end of what is sent.
func damage(p *proxy, w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		reset(w)
		return
	}
	if i := bytes.Index(body, []byte("precious")); i >= 0 {
		body[i] ^= 1
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	p.forward.ServeHTTP(w, r)
}

// cut breaks the connection in the midst of the answer's body.
func cut(p *proxy, w http.ResponseWriter, r *http.Request) {
	answer := httptest.NewRecorder()
	p.forward.ServeHTTP(answer, r)
	c, out, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	body := answer.Body.Bytes()
	out.WriteString("HTTP/1.1 " + strconv.Itoa(answer.Code) + " OK\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n") //nolint:errcheck // Flush tells
	answer.Header().Del("Content-Length")
	answer.Header().Write(out)      //nolint:errcheck // Flush tells
	out.WriteString("\r\n")         //nolint:errcheck // Flush tells
	out.Write(body[:len(body)*2/3]) //nolint:errcheck // Flush tells
	out.Flush()                     //nolint:errcheck // the next try shows it
	c.Close()
}

// overloaded answers as each of the object stores does.
func overloaded(_ *proxy, w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body) //nolint:errcheck // of no interest
	switch {
	case r.Header.Get("X-Ms-Version") != "":
		w.Header().Set("X-Ms-Error-Code", "ServerBusy")
		w.WriteHeader(http.StatusServiceUnavailable)
	case strings.HasPrefix(r.Header.Get("Authorization"), "Bearer"):
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusTooManyRequests)
		io.WriteString(w, `{"error": {"code": 429, "message": "slow", "errors": [{"reason": "rateLimitExceeded"}]}}`) //nolint:errcheck // seen by who asks
	default:
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(http.StatusServiceUnavailable)
		io.WriteString(w, `<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>`) //nolint:errcheck // seen by who asks
	}
}

// swallow never answers.
func swallow(_ *proxy, _ http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body) //nolint:errcheck // of no interest
	<-r.Context().Done()
}

func all(*http.Request) bool { return true }

func reads(r *http.Request) bool  { return r.Method == http.MethodGet || r.Method == http.MethodHead }
func writes(r *http.Request) bool { return !reads(r) }

var errUnseen = errors.New("the fault was never met")
