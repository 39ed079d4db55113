package cache

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"
)

// judge tells a usable response from a refusal and from a failure.
func judge(up *upstream, resp *http.Response, q question) error {
	status := resp.StatusCode
	fail := func(cause, format string, args ...any) error {
		return &unavailable{cause, fmt.Errorf(up.name+" "+format, args...)}
	}
	switch {
	case status == http.StatusOK, status == http.StatusPartialContent && (q.from > 0 || q.ranges != ""):
		if e := resp.Header.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
			return fail("encoding", "encoded the content although asked not to")
		}
		return nil
	case status == http.StatusUnauthorized:
		no := refuse(status, "unauthorized", "the registry asks for credentials")
		no.upstream, no.from = true, up
		if !up.anonymous { // else the credentials would go where they are not meant
			no.challenges = resp.Header.Values("WWW-Authenticate")
		}
		return no
	case status == http.StatusForbidden, status == http.StatusUnavailableForLegalReasons:
		no := refuse(http.StatusForbidden, "denied", "the registry denies access")
		no.upstream = true
		return no
	case status == http.StatusNotFound, status == http.StatusGone:
		no := refuse(http.StatusNotFound, "not-found", "the registry does not have it")
		no.upstream, no.referral = true, resp.Header.Get(peerHeader)
		return no
	case status == http.StatusRequestedRangeNotSatisfiable && q.ranges != "":
		no := refuse(status, "range", "the range lies outside of the content")
		no.upstream = true
		return no
	case status == http.StatusRequestedRangeNotSatisfiable && q.from > 0:
		return fail("range", "answered 416: %w", errRange)
	case status == http.StatusTooManyRequests:
		return fail("rate-limited", "answered 429")
	default:
		return fail("status", "answered %d", status)
	}
}

// transportError classifies what kept a response from coming. The URL that the
// http package puts into its errors is left out: after a redirect it may bear
// a signature.
func transportError(ctx context.Context, up *upstream, err error) *unavailable {
	var inURL *url.Error
	if errors.As(err, &inURL) {
		err = inURL.Err
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	cause := "connection"
	var timeout net.Error
	var cert *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	var alert tls.AlertError
	switch {
	case errors.Is(err, errSlowHeaders), errors.Is(err, errDown), errors.As(err, &timeout) && timeout.Timeout():
		cause = "timeout"
	case errors.As(err, &cert), errors.As(err, &record), errors.As(err, &alert), errors.Is(err, errAuthorities):
		cause = "tls"
	}
	return &unavailable{cause, fmt.Errorf("%s: %w", up.name, err)}
}

// errAuthorities reports a CA bundle that was never readable.
var errAuthorities = errors.New("no usable CA bundle")

// body is the body of an answer under watch: whoever waits for it gets at least
// MinRate × Stall bytes in every Stall of waiting, or errStalled. The time
// between the reads does not count.
type body struct {
	*answer
	timer  *time.Timer
	stall  time.Duration
	quota  int64
	waited time.Duration // of the current stretch
	got    int64         // in the current stretch
	count  func(n int)
}

// tlsRecord is the most bytes that a TLS record takes (RFC 8446, section 5.2).
const tlsRecord = 5 + 1<<14 + 256

// rawConn returns what is below conn; nil if it cannot be told.
func rawConn(conn net.Conn) syscall.RawConn {
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn()
	}
	plain, ok := conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := plain.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// watch watches the body of ans, of which the first stretch may take as long as
// patience, at most Stall.
func (a *asker) watch(ans *answer, patience time.Duration) *body {
	quota := func(d time.Duration) int64 { return int64(d.Seconds() * float64(a.timeouts.MinRate)) }
	stall := a.timeouts.Stall
	patience = min(max(patience, stallMargin), stall)
	b := &body{answer: ans, stall: stall, quota: quota(stall), waited: stall - patience, got: quota(stall - patience)}
	b.timer = time.AfterFunc(time.Hour, func() { ans.cancel(errStalled) })
	b.timer.Stop()
	received := a.metrics.fetched
	if ans.upstream.peer != "" {
		received = a.metrics.fromPeers
	}
	b.count = func(n int) { received.Add(float64(n)) }
	return b
}

func (b *body) Read(p []byte) (int, error) {
	began := time.Now()
	b.timer.Reset(b.stall - b.waited)
	n, err := b.Body.Read(p)
	// TLS hands over a record at a time: take along what is here already.
	for n < len(p) && err == nil && b.conn != nil && unread(b.conn) >= tlsRecord {
		var more int
		more, err = b.Body.Read(p[n:])
		n += more
	}
	b.timer.Stop()
	b.count(n)
	b.waited += time.Since(began)
	if b.got += int64(n); b.got >= b.quota {
		b.got, b.waited = 0, 0
	} else if b.waited >= b.stall && err == nil {
		err = errStalled
	}
	if err != nil && !errors.Is(err, io.EOF) {
		if cause := context.Cause(b.Request.Context()); cause != nil {
			err = cause
		}
	}
	return n, err
}
