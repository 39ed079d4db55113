package bucket

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
	"time"
)

// pace is how long an answer may take to begin, once all was sent.
type pace time.Duration

const (
	quick   pace = pace(10 * time.Second) // most things
	steady  pace = pace(time.Minute)      // a part, which may have to reach a disk
	lengthy pace = pace(5 * time.Minute)  // what the store does with large objects by itself

	// stall is how long nothing may come, or be taken, in the midst of a body.
	stall = 30 * time.Second
)

type paceKey struct{}

// at makes the requests of ctx go at a pace other than quick.
func at(ctx context.Context, p pace) context.Context {
	return context.WithValue(ctx, paceKey{}, p)
}

// transport sends requests so that none hangs.
type transport map[pace]*http.Transport

func newTransport(caFile string) (transport, error) {
	roots, err := rootsWith(caFile)
	if err != nil {
		return nil, err
	}
	t := transport{}
	for _, p := range []pace{quick, steady, lengthy} {
		t[p] = &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           dial(readPatience(p)),
			TLSClientConfig:       &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout:   5 * time.Second,
			ResponseHeaderTimeout: time.Duration(p),
			ExpectContinueTimeout: time.Second,
			MaxIdleConnsPerHost:   64,
			IdleConnTimeout:       stall,
			WriteBufferSize:       64 << 10,
			ReadBufferSize:        64 << 10,
			DisableCompression:    true,
			Protocols:             new(http.Protocols),
		}
		t[p].Protocols.SetHTTP1(true) // one stalled connection stalls one request
	}
	return t, nil
}

// readPatience is how long nothing may come: a little more than what else may
// end a request first, and says better why.
func readPatience(p pace) time.Duration { return max(stall, time.Duration(p)) + time.Second }

func rootsWith(caFile string) (*x509.CertPool, error) {
	if caFile == "" {
		return nil, nil //nolint:nilnil // the system's
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("caFile: %w: set it to a file with the certificates of the object store's authority", err)
	}
	if bytes.Contains(pem, []byte("PRIVATE KEY")) {
		return nil, errors.New("caFile: " + caFile + " holds a private key: leave certificates alone there, and replace that key if others could read it")
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool()
	}
	if !roots.AppendCertsFromPEM(pem) {
		return nil, errors.New("caFile: " + caFile + " holds no certificate: it must be PEM, of one or more authorities")
	}
	return roots, nil
}

// RoundTrip implements [http.RoundTripper].
func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	p, ok := r.Context().Value(paceKey{}).(pace)
	if !ok {
		p = quick
	}
	return t[p].RoundTrip(r)
}

// dial connects, to what breaks when it stalls.
func dial(patience time.Duration) func(context.Context, string, string) (net.Conn, error) {
	d := &net.Dialer{Timeout: 5 * time.Second}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := d.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &conn{c, patience}, nil
	}
}

// conn gives up when nothing moves. A read is pending while a request is
// written, so that writing gives it more time.
type conn struct {
	net.Conn
	patience time.Duration // for what is read
}

func (c *conn) Read(p []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.patience)); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

func (c *conn) Write(p []byte) (int, error) {
	now := time.Now()
	if err := errors.Join(c.SetWriteDeadline(now.Add(stall)), c.SetReadDeadline(now.Add(c.patience))); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}
