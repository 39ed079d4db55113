package cache

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync/atomic"
	"time"
)

// registry is one registry that the cache answers for.
type registry struct {
	host      string
	cfg       Registry
	upstreams []replicas // one for each of cfg.Upstreams
	tokens    atomic.Pointer[tokenService]
	pace      pace
}

// order returns whom to ask, one after the other.
func (reg *registry) order() []*upstream {
	var order []*upstream
	for _, r := range reg.upstreams {
		order = append(order, r.choose()...)
	}
	return order
}

func (reg *registry) closeIdle() {
	for _, r := range reg.upstreams {
		for _, up := range r {
			up.transport.CloseIdleConnections()
		}
	}
}

// upstream is one server of a registry, or the address of several.
type upstream struct {
	base      *url.URL
	name      string // for people
	group     int    // those of one registry with the same group have the same content
	namespace string
	anonymous bool
	peer      string // this node's name, if the upstream is another node
	transport *http.Transport
	client    *http.Client
	health    health
	silences  silences
}

func newRegistry(host string, cfg Registry, t Timeouts, log *slog.Logger) (*registry, error) {
	reg := &registry{host: host, cfg: cfg}
	for i, u := range cfg.Upstreams {
		base, err := u.parse()
		if err != nil {
			return nil, err
		}
		var group replicas
		ca := &authorities{path: u.CAFile, log: log}
		for _, address := range append(slices.Clip(u.Endpoints), hostPort(base)) {
			up := &upstream{base: base, name: base.Host, group: i, namespace: u.Namespace, anonymous: u.WithoutCredentials}
			if address != hostPort(base) {
				up.name = address
			}
			if up.namespace == "" {
				up.namespace = host
			}
			up.transport = newTransport(base, address, ca, t)
			up.client = &http.Client{Transport: up.transport, CheckRedirect: checkRedirect}
			group = append(group, up)
		}
		reg.upstreams = append(reg.upstreams, group)
	}
	return reg, nil
}

// newTransport speaks HTTP/1.1 only: each transfer then has a connection of its
// own, and none waits for another's flow control. It uses no proxy: upstreams
// are near, and what is not can be reached by containerd itself. The server of
// base is reached at address.
func newTransport(base *url.URL, address string, ca *authorities, t Timeouts) *http.Transport {
	dialer := &net.Dialer{Timeout: t.Dial, KeepAlive: 15 * time.Second}
	where := func(addr string) string {
		if addr == hostPort(base) {
			return address
		}
		return addr
	}
	return &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, where(addr))
		},
		DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, t.Dial)
			defer cancel()
			host, _, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			// Redirects lead to object stores, which have certificates of
			// their own: there the system's authorities count as well.
			pool, err := ca.pool(addr != hostPort(base))
			if err != nil {
				return nil, err
			}
			d := tls.Dialer{NetDialer: dialer, Config: &tls.Config{
				RootCAs: pool, ServerName: host, MinVersion: tls.VersionTLS12,
			}}
			return d.DialContext(ctx, network, where(addr))
		},
		DisableCompression:  true, // digests are of the bytes as they are
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     90 * time.Second,
		ReadBufferSize:      64 << 10,
	}
}

func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// checkRedirect keeps the client's credentials at the server they were meant
// for. The http package alone would also pass them to subdomains.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) > 5 {
		return errors.New("more than 5 redirects")
	}
	first := via[0].URL
	if first.Scheme == "https" && req.URL.Scheme != "https" {
		return errors.New("redirected from https to http")
	}
	if req.URL.Scheme != first.Scheme || hostPort(req.URL) != hostPort(first) {
		req.Header.Del("Authorization")
	}
	return nil
}
