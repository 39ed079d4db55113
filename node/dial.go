package node

import (
	"context"
	"net"
)

// dialUnix dials a socket by its path, whatever name grpc asks for. A path
// longer than a socket's address may be is left to the kernel to refuse.
func dialUnix(path string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
}
