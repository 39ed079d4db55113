package standalone

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
)

// Listen takes the TCP address that flag gives, host:port. Errors name the flag
// and what to do.
func Listen(ctx context.Context, addr, flag string) (net.Listener, error) {
	if err := CheckAddress(addr, flag); err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	if err == nil {
		return l, nil
	}
	remedy := "give another address"
	var noName *net.DNSError
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		remedy = "stop what uses it or give another address"
	case errors.Is(err, syscall.EADDRNOTAVAIL), errors.As(err, &noName):
		remedy = "give an address that this machine has, or :PORT for all of them"
	case errors.Is(err, syscall.EACCES):
		remedy = "give a port that this user may take, above 1023 as a rule"
	}
	return nil, fmt.Errorf("taking the address for %s: %w: %s", flag, err, remedy)
}

// CheckAddress says what is wrong with the form of the address that flag gives.
func CheckAddress(addr, flag string) error {
	_, port, err := net.SplitHostPort(addr)
	if err == nil {
		_, err = net.DefaultResolver.LookupPort(context.Background(), "tcp", port) // asks no one else
	}
	if err != nil {
		return fmt.Errorf("%s %q is no address: write HOST:PORT, as in 127.0.0.1:5443", flag, addr)
	}
	return nil
}
