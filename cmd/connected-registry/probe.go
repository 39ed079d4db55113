package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/spf13/cobra"
)

// probeCommand asks a registry whether it serves, as helm test does.
func probeCommand() *cobra.Command {
	var p probe
	cmd := &cobra.Command{
		Use:   "probe --host HOST --port PORT {--ca FILE | --plain-http}",
		Short: "Ask a registry whether it serves, over a chain that verifies",
		Args:  cobra.NoArgs,
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
	if p.host == "" {
		return errors.New("--host is missing: give the registry's name or address")
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
			return fmt.Errorf("asking %s for %s: %w", url, p.wait, err)
		case <-time.After(time.Second):
		}
	}
}

// pool returns nil for the system's certificates.
func (p *probe) pool() (*x509.CertPool, error) {
	if p.ca == "" {
		return nil, nil
	}
	data, err := os.ReadFile(p.ca)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s holds no certificate", p.ca)
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
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusUnauthorized {
		return fmt.Errorf("it answers %s", resp.Status)
	}
	const version = "registry/2.0"
	if got := resp.Header.Get("Docker-Distribution-Api-Version"); got != version {
		return fmt.Errorf("it is no registry: Docker-Distribution-Api-Version is %q", got)
	}
	return nil
}
