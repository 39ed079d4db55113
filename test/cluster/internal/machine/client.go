package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// Client talks to process 1 of a machine.
type Client struct {
	// Socket is the path of the control socket on the host.
	Socket string
}

// Start starts a service. Starting one that runs is an error.
func (c Client) Start(ctx context.Context, s Service) error {
	_, err := c.do(ctx, request{Op: opStart, Service: s})
	return err
}

// Stop ends a service: SIGTERM, then SIGKILL after ten seconds. It returns
// when the process is gone. The processes that the service had started live
// on, as containers do when containerd is restarted.
func (c Client) Stop(ctx context.Context, name string) error {
	_, err := c.do(ctx, request{Op: opStop, Service: Service{Name: name}})
	return err
}

// List returns the services, those that were stopped included, by name.
func (c Client) List(ctx context.Context) ([]Status, error) {
	r, err := c.do(ctx, request{Op: opList})
	return r.Services, err
}

// Detach makes the machine outlive the process that started it.
func (c Client) Detach(ctx context.Context) error {
	_, err := c.do(ctx, request{Op: opDetach})
	return err
}

// Wait returns when the machine answers.
func (c Client) Wait(ctx context.Context) error {
	for {
		_, err := c.List(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w: %w", c.Socket, ctx.Err(), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (c Client) do(ctx context.Context, req request) (response, error) {
	var resp response
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.Socket)
	if err != nil {
		return resp, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()

	if err := json.NewEncoder(conn).Encode(req); err != nil {
		return resp, fmt.Errorf("asking %s to %s: %w", c.Socket, req.Op, err)
	}
	if err := json.NewDecoder(conn).Decode(&resp); err != nil {
		return resp, fmt.Errorf("answer of %s to %s: %w", c.Socket, req.Op, err)
	}
	if resp.Error != "" {
		return resp, errors.New(resp.Error)
	}
	return resp, nil
}
