package bucket

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"strings"
	"syscall"
	"time"
)

// kind is what went wrong, by what there is to do about it.
type kind int

const (
	other       kind = iota
	missing          // no such object, no such upload
	condition        // the condition of a Put does not hold
	outside          // the range begins beyond the object's end
	noBucket         // no such bucket, no such account
	denied           // known, but not allowed
	unknown          // the credentials are not accepted
	noIdentity       // no credentials to be had
	region           // the bucket is in another region
	skew             // the clocks differ
	busy             // overloaded, told to slow down
	broken           // 5xx
	unsupported      // the store cannot do it
	authority        // its certificate is signed by no one whom we know
	certificate      // its certificate is not good for another reason
	plain            // http where https is spoken, or the reverse
	name             // no such host
	refused          // nobody listens
	silent           // no answer in time
	cut              // the connection broke
)

// fault is an error, understood.
type fault struct {
	kind kind
	// code is the object store's own word for it, for people: "SlowDown".
	code string
	// again: it may succeed at the next try, which comes no sooner than after.
	again bool
	after time.Duration
}

// remedies are the words that differ among object stores.
type remedies struct {
	field    string // of the configuration that names the bucket: "s3.bucket"
	endpoint string // that it is asked at, for people
	rights   string // that are wanted
	keys     string // the files with credentials
	ambient  string // where credentials are looked for otherwise
	region   string // what to set
}

// describe says what a fault is, and what to do about it.
func (r remedies) describe(f fault) string {
	switch f.kind {
	case noBucket:
		return fmt.Sprintf("there is no such bucket at %s (%s): create it, or correct %s", r.endpoint, f.code, r.field)
	case denied:
		return fmt.Sprintf("access denied (%s): allow %s to whoever the credentials belong to, or correct them (%s)", f.code, r.rights, r.keys)
	case unknown:
		return fmt.Sprintf("the credentials are not accepted (%s): correct them (%s)", f.code, r.keys)
	case noIdentity:
		return fmt.Sprintf("there are no credentials (%s): set credentials to a directory with %s, or provide %s", f.code, r.keys, r.ambient)
	case region:
		return fmt.Sprintf("the bucket is elsewhere (%s): %s", f.code, r.region)
	case skew:
		return fmt.Sprintf("the clocks of this machine and of %s differ too much (%s): set this one right, by NTP for example", r.endpoint, f.code)
	case busy:
		return fmt.Sprintf("%s is overloaded or still starting (%s): wait, give it more capacity, or ask less of it", r.endpoint, f.code)
	case broken:
		return fmt.Sprintf("%s has a fault (%s): look at its log or its status page", r.endpoint, f.code)
	case unsupported:
		return fmt.Sprintf("%s cannot do what is needed (%s): use another object store, or a newer release of it", r.endpoint, f.code)
	case authority:
		return fmt.Sprintf("the certificate of %s is signed by an authority unknown here: put the authority's certificate into a file and set caFile to it", r.endpoint)
	case certificate:
		return fmt.Sprintf("the certificate of %s is not good (%s): renew or correct it, or correct the endpoint", r.endpoint, f.code)
	case plain:
		return fmt.Sprintf("%s speaks plain HTTP where TLS is expected, or the reverse: correct http:// or https:// of the endpoint", r.endpoint)
	case name:
		return fmt.Sprintf("the host cannot be found (%s): correct the endpoint, or the DNS", f.code)
	case refused:
		return fmt.Sprintf("nobody listens at %s: start the object store, or correct the endpoint", r.endpoint)
	case silent:
		return fmt.Sprintf("%s does not answer in time: see whether a network policy, a firewall or a proxy lies between", r.endpoint)
	case cut:
		return fmt.Sprintf("the connection to %s broke, again and again (%s): look at its log, and at proxies and load balancers between", r.endpoint, f.code)
	}
	return fmt.Sprintf("%s: the log of %s may say more; correct the endpoint, its http:// or https:// too, if no object store answers there", f.code, r.endpoint)
}

// network classifies what the way to an object store brings about. It shows no
// address, for one may hold a signature.
func network(err error) fault {
	var (
		inner    *url.Error
		dns      *net.DNSError
		unknownA x509.UnknownAuthorityError
		invalid  x509.CertificateInvalidError
		hostname x509.HostnameError
		verify   *tls.CertificateVerificationError
		record   tls.RecordHeaderError
		timeout  interface{ Timeout() bool }
	)
	if errors.As(err, &inner) {
		err = inner.Err
	}
	switch {
	case errors.As(err, &unknownA):
		return fault{kind: authority}
	case errors.As(err, &invalid):
		return fault{kind: certificate, code: invalid.Error()}
	case errors.As(err, &hostname):
		return fault{kind: certificate, code: hostname.Error()}
	case errors.As(err, &verify):
		return fault{kind: certificate, code: verify.Err.Error()}
	case errors.As(err, &record), strings.Contains(err.Error(), "HTTP response to HTTPS client"), strings.Contains(err.Error(), "malformed HTTP response"):
		return fault{kind: plain}
	case errors.As(err, &dns):
		return fault{kind: name, code: dns.Error(), again: dns.Temporary() || dns.Timeout()}
	case errors.Is(err, syscall.ECONNREFUSED):
		return fault{kind: refused, again: true}
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return fault{kind: silent, again: true}
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE),
		errors.Is(err, net.ErrClosed), strings.Contains(err.Error(), "server closed idle connection"), strings.Contains(err.Error(), "connection broken"):
		return fault{kind: cut, code: err.Error(), again: true}
	}
	return fault{code: err.Error()}
}

const (
	// tries is how often one thing is asked for.
	tries = 6
	// patience is how long after its beginning it is asked for once more.
	patience = 15 * time.Second
	// firstPause doubles with each try, up to longestPause.
	firstPause   = 200 * time.Millisecond
	longestPause = 3 * time.Second
)

// try carries act out, and again when it may succeed then. The pauses differ, so
// that replicas that failed together do not come back together.
func try(ctx context.Context, classify func(error) fault, act func() error) error {
	start := time.Now()
	pause := firstPause
	for n := 1; ; n++ {
		err := ctx.Err()
		if err == nil {
			err = act()
		}
		if err == nil {
			return nil
		}
		f := classify(err)
		wait := max(pause/2+rand.N(pause), f.after)
		if ctx.Err() != nil || !f.again || n == tries || time.Since(start)+wait > patience {
			return err
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return err
		}
		pause = min(2*pause, longestPause)
	}
}
