package objects

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"strings"
)

// StartFakeGCS starts a fake-gcs-server that has a bucket, in memory.
func StartFakeGCS(ctx context.Context, bucket string) (*Server, error) {
	program, err := tool("fakegcs", "fake-gcs-server")
	if err != nil {
		return nil, err
	}
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	s := &Server{URL: "http://" + address}
	s.command = func() *exec.Cmd {
		return exec.Command(program, "-scheme", "http", "-backend", "memory", "-host", host, "-port", port, "-public-host", address, "-log-level", "error")
	}
	client := newClient(nil)
	s.ready = answers(client, s.URL+"/storage/v1/b?project=test", http.StatusOK)
	if err := s.start(ctx); err != nil {
		return nil, fmt.Errorf("fake-gcs-server: %w", err)
	}
	r, err := client.Post(s.URL+"/storage/v1/b?project=test", "application/json", strings.NewReader(`{"name":"`+bucket+`"}`))
	if err == nil {
		r.Body.Close()
		if r.StatusCode != http.StatusOK {
			err = fmt.Errorf("fake-gcs-server: making the bucket: %s", r.Status)
		}
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}
