package replicas

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// attempts is how often docker transfers a layer at most.
	attempts = 5
	// pause comes before the second attempt, twice as long before the third, and
	// so on, as docker does with five seconds.
	pause = time.Second
)

// patience makes things again that failed because a connection broke.
type patience struct {
	needed atomic.Int64 // how often something was made again
}

// try calls do, which is to begin anew each time. An error that is not about the
// connection ends it at once.
func (p *patience) try(ctx context.Context, what string, do func() error) error {
	var all []error
	for n := 1; ; n++ {
		err := do()
		if err == nil {
			return nil
		}
		all = append(all, err)
		if n == attempts || !broken(err) {
			return fmt.Errorf("%s, attempt %d: %w", what, n, errors.Join(all...))
		}
		p.needed.Add(1)
		wait(ctx, time.Duration(n)*pause)
	}
}

// broken reports whether an error tells of a connection that was refused or
// broke, as when a replica dies, and of nothing that a registry answered.
func broken(err error) bool {
	for _, kind := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, kind) {
			return true
		}
	}
	// Wrapped as text: by the HTTP/2 transport and by containerd's API, which says
	// that it has cancelled a piece of a layer when the connection of another broke.
	for _, text := range []string{"failed to copy: context canceled", "connection refused", "connection reset by peer", "unexpected EOF", ": EOF", "client connection lost", "client connection force closed",
		"server closed idle connection", "broken pipe", "use of closed network connection", "client conn not usable", "client conn could not be established", "write on closed"} {
		if strings.Contains(err.Error(), text) {
			return true
		}
	}
	return false
}
