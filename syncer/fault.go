package syncer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// fault is why the parent did not give what it was asked for. Its message is one
// line that names the parent, the thing and, where there is one, the remedy.
type fault struct {
	message string
	// status is the HTTP status behind it, 0 when there was no usable answer.
	status int
	// temporary faults are worth another attempt, after the time given if it is
	// not 0.
	temporary bool
	after     time.Duration
	// unreachable: nothing came back at all.
	unreachable bool
	// down: whatever else is asked of the parent would fare the same.
	down  bool
	cause error
}

func (f *fault) Error() string { return f.message }
func (f *fault) Unwrap() error { return f.cause }

// isNotFound reports whether the parent said that there is no such thing.
func isNotFound(err error) bool {
	f, ok := errors.AsType[*fault](err)
	return ok && f.status == http.StatusNotFound
}

// isUnreachable reports whether nothing came back from the parent.
func isUnreachable(err error) bool {
	f, ok := errors.AsType[*fault](err)
	return ok && f.unreachable
}

// errRedirect and its kin are returned by the redirect policy; see
// parent.redirect.
type errRedirect struct{ why string }

func (e errRedirect) Error() string { return e.why }

// errStalled ends a transfer that makes no progress.
var errStalled = errors.New("no progress")

// unreachable says why a request got no answer. who is the host that was asked.
func unreachable(who, what string, limits limits, err error) *fault {
	f := &fault{unreachable: true, temporary: true, cause: err}
	var (
		unknownCA x509.UnknownAuthorityError
		otherName x509.HostnameError
		badCert   x509.CertificateInvalidError
		noTLS     tls.RecordHeaderError
		noName    *net.DNSError
		timeout   net.Error
	)
	switch redirect, isRedirect := errors.AsType[errRedirect](err); {
	case isRedirect:
		f.unreachable, f.temporary = false, false
		f.message = fmt.Sprintf("%s, asked for %s, %s", who, what, redirect.why)
	case errors.As(err, &unknownCA):
		f.temporary = false
		f.message = fmt.Sprintf("%s has a certificate from a CA that is not trusted: put that CA's certificate into the Secret that spec.parent.caSecretRef names", who)
	case errors.As(err, &otherName):
		f.temporary = false
		f.message = fmt.Sprintf("%s has a certificate for another name: %s: correct spec.parent.endpoint or the certificate", who, oneLine(otherName.Error()))
	case errors.As(err, &badCert):
		f.temporary = false
		f.message = fmt.Sprintf("%s has a certificate that is not valid: %s: renew it, or set the clock of this machine", who, oneLine(badCert.Error()))
	case errors.As(err, &noTLS), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		f.temporary = false
		f.message = fmt.Sprintf("%s does not speak TLS: set spec.parent.insecure if it is meant to speak plain HTTP", who)
	case errors.As(err, &noName):
		f.temporary = !noName.IsNotFound
		f.message = fmt.Sprintf("%s cannot be resolved: check spec.parent.endpoint and the name service", who)
	case errors.Is(err, syscall.ECONNREFUSED):
		f.message = fmt.Sprintf("%s refuses connections: is it running, and is spec.parent.endpoint its port?", who)
	case errors.As(err, &timeout) && timeout.Timeout():
		f.message = fmt.Sprintf("%s does not answer (waited up to %s): check the network and the firewall between", who, max(limits.dial, limits.header))
	default:
		f.message = fmt.Sprintf("%s cannot be reached: %s", who, oneLine(innermost(err).Error()))
	}
	return f
}

// innermost strips the layers that repeat the method and the URL.
func innermost(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}

// refusal says what a status other than success means. what is the thing that
// was asked for, known whether there were credentials to send.
func refusal(who, what string, resp *http.Response, known bool) *fault {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	code := resp.StatusCode
	f := &fault{status: code, after: retryAfter(resp.Header, time.Now())}
	verb, rights := "read", "content/read and metadata/read"
	if r := resp.Request; r != nil && r.Method != http.MethodGet && r.Method != http.MethodHead {
		verb, rights = "change", "content/write, content/delete and metadata/write"
	}
	switch {
	case code == http.StatusUnauthorized && !known:
		f.message = fmt.Sprintf("%s wants credentials for %s (401): name them in spec.parent.credentialsSecretRef", who, what)
	case code == http.StatusUnauthorized:
		f.message = fmt.Sprintf("%s refused the credentials for %s (401): check the Secret that holds them, and what they may %s", who, what, verb)
	case code == http.StatusForbidden && !known:
		f.message = fmt.Sprintf("%s does not let anonymous clients %s %s (403): name credentials in spec.parent.credentialsSecretRef", who, verb, what)
	case code == http.StatusForbidden:
		f.message = fmt.Sprintf("%s does not let these credentials %s %s (403): grant them %s", who, verb, what, rights)
	case code == http.StatusNotFound:
		f.message = fmt.Sprintf("%s has no %s (404)", who, what)
	case code == http.StatusTooManyRequests:
		f.temporary = true
		f.message = fmt.Sprintf("%s limits how much may be asked of it (429), asked for %s: a schedule with fewer runs asks less", who, what)
	case code == http.StatusBadRequest && strings.Contains(string(body), "HTTP request to an HTTPS server"):
		f.message = fmt.Sprintf("%s speaks TLS: leave out spec.parent.insecure", who)
	case code == http.StatusRequestTimeout || code >= 500:
		f.temporary = code != http.StatusNotImplemented && code != http.StatusHTTPVersionNotSupported
		f.message = fmt.Sprintf("%s answered %d for %s%s: see its log, and what lies between", who, code, what, detail(resp.Header, body))
	default:
		f.message = fmt.Sprintf("%s answered %d for %s%s", who, code, what, detail(resp.Header, body))
	}
	return f
}

// maxErrorBody bounds what is read of an error's body.
const maxErrorBody = 16 << 10

// detail is the first error of an OCI error body, or what was sent in its place.
func detail(h http.Header, body []byte) string {
	if message := ociError(body); message != "" {
		return ": " + message
	}
	if isHTML(h) {
		return ": a web page, not a registry's answer"
	}
	return ""
}

func isHTML(h http.Header) bool {
	mediaType, _, _ := mime.ParseMediaType(h.Get("Content-Type"))
	return mediaType == "text/html" || mediaType == "application/xhtml+xml"
}

// unusable says that an answer is not what the distribution specification
// allows.
func unusable(who, what, format string, args ...any) *fault {
	return &fault{message: fmt.Sprintf("%s gave a wrong answer for %s: %s", who, what, fmt.Sprintf(format, args...))}
}

// interrupted says that a body broke off. ctx is that of the transfer alone.
func interrupted(ctx context.Context, who, what string, limits limits, err error) *fault {
	f := &fault{temporary: true, cause: err}
	switch {
	case errors.Is(context.Cause(ctx), errStalled):
		f.message = fmt.Sprintf("%s sends %s too slowly: less than %d bytes in %s", who, what, limits.stallBytes, limits.stall)
	case errors.Is(err, context.DeadlineExceeded):
		f.message = fmt.Sprintf("%s did not finish its answer for %s within %s", who, what, limits.answer)
	default:
		f.message = fmt.Sprintf("%s broke off while sending %s: %s", who, what, oneLine(innermost(err).Error()))
	}
	return f
}

// retryAfter reads the header of that name (RFC 9110, section 10.2.3), 0 when it
// is not there or not in the future.
func retryAfter(h http.Header, now time.Time) time.Duration {
	value := h.Get("Retry-After")
	if seconds, err := strconv.ParseUint(value, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(at.Sub(now), 0)
	}
	return 0
}

// oneLine makes one line of text from elsewhere, of a length that a log bears.
func oneLine(s string) string {
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f }), " ")
	if len(s) > 300 {
		s = strings.ToValidUTF8(s[:300], "") + "…"
	}
	return s
}
