package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	neturl "net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/connected-registry/connected-registry/trust"
)

// probeCommand asks a registry whether it serves, as helm test does.
func probeCommand() *cobra.Command {
	var p probe
	cmd := &cobra.Command{
		Use:   "probe --host HOST --port PORT {--ca FILE | --plain-http}",
		Short: "Ask a registry whether it serves, over a chain that verifies",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.run(cmd.Context(), cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.StringVar(&p.host, "host", "", "name or address of the registry")
	f.StringVar(&p.port, "port", "443", "its port")
	f.StringVar(&p.ca, "ca", "", "file with the CA certificates in PEM; empty for the system's")
	f.BoolVar(&p.plainHTTP, "plain-http", false, "ask over HTTP")
	f.DurationVar(&p.wait, "wait", time.Minute, "how long to ask again until it serves")
	return cmd
}

type probe struct {
	host, port, ca string
	plainHTTP      bool
	wait           time.Duration
}

func (p *probe) run(ctx context.Context, stdout io.Writer) error {
	if err := p.validate(); err != nil {
		return err
	}
	client, scheme := &http.Client{Timeout: 10 * time.Second}, "http"
	if !p.plainHTTP {
		scheme = "https"
		pool, err := p.pool()
		if err != nil {
			return err
		}
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true}
		defer transport.CloseIdleConnections()
		client.Transport = transport
	}
	url := scheme + "://" + net.JoinHostPort(p.host, p.port) + "/v2/"
	ctx, cancel := context.WithTimeout(ctx, p.wait)
	defer cancel()
	for {
		err := ask(ctx, client, url)
		if err == nil {
			fmt.Fprintln(stdout, url, "serves")
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("asking %s for %s: %w", url, p.wait, p.explain(err))
		case <-time.After(time.Second):
		}
	}
}

func (p *probe) validate() error {
	port, err := strconv.ParseUint(p.port, 10, 16)
	switch {
	case p.host == "":
		return errors.New("--host is missing: give the registry's name or address")
	case net.ParseIP(p.host) == nil && strings.ContainsAny(p.host, ":/@ "):
		return fmt.Errorf("--host %q is neither a name nor an address: leave out https://, and give the port with --port", p.host)
	case err != nil || port == 0:
		return fmt.Errorf("--port %s is no port: give a number up to 65535", p.port)
	case p.wait <= 0:
		return fmt.Errorf("--wait %s leaves no time to ask: give more, 10s for example", p.wait)
	}
	return nil
}

// pool returns nil for the system's certificates.
func (p *probe) pool() (*x509.CertPool, error) {
	if p.ca == "" {
		return nil, nil
	}
	data, err := os.ReadFile(p.ca)
	if err != nil {
		return nil, fmt.Errorf("reading the CA: %w: give a file with its certificates with --ca", err)
	}
	if bytes.Contains(data, []byte("PRIVATE KEY")) {
		return nil, fmt.Errorf("%s %w", p.ca, trust.ErrPrivateKey)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s holds no certificate: give a file with those of the CA, in PEM, with --ca", p.ca)
	}
	return pool, nil
}

// ask succeeds when a registry answers, be it only that it wants credentials.
func ask(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		if wrapped, ok := errors.AsType[*neturl.Error](err); ok {
			err = wrapped.Err // the URL is said once
		}
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusUnauthorized {
		return status{resp.StatusCode, "it answers " + resp.Status}
	}
	const version = "registry/2.0"
	if got := resp.Header.Get("Docker-Distribution-Api-Version"); got != version {
		return status{resp.StatusCode, fmt.Sprintf("it is no registry, since Docker-Distribution-Api-Version is %q", got)}
	}
	return nil
}

// status is an answer that no registry gives that serves.
type status struct {
	code int
	text string
}

func (s status) Error() string { return s.text }

// explain adds to why a registry did not answer what to do.
func (p *probe) explain(err error) error {
	var (
		code      status
		unknownCA x509.UnknownAuthorityError
		otherName x509.HostnameError
		badCert   x509.CertificateInvalidError
		noTLS     tls.RecordHeaderError
		noName    *net.DNSError
	)
	remedy := "see that it runs, and that nothing between stops the connection"
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		err = errors.New("it does not answer")
	case errors.As(err, &code) && code.code == http.StatusBadRequest && p.plainHTTP:
		remedy = "leave --plain-http out if it speaks TLS"
	case errors.As(err, &code) && (code.code == http.StatusOK || code.code == http.StatusUnauthorized):
		remedy = "correct --host and --port"
	case errors.As(err, &code):
		remedy = "see the log of its replicas, or correct --host and --port"
	case errors.As(err, &unknownCA):
		remedy = "give the CA that its certificate comes from with --ca"
	case errors.As(err, &otherName):
		remedy = "give a name that its certificate holds with --host"
	case errors.As(err, &badCert):
		remedy = "renew its certificate, or set the clock of this machine"
	case errors.As(err, &noTLS), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		remedy = "correct --port, or add --plain-http if it speaks no TLS"
	case errors.As(err, &noName), errors.Is(err, syscall.ECONNREFUSED):
		remedy = "see that it runs, and correct --host and --port"
	}
	return fmt.Errorf("%w: %s", err, remedy)
}
