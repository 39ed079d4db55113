package registry

import (
	"context"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

const (
	// maxUploads bounds memory: each takes a buffer and the state of a hash.
	maxUploads = 64
	// admitTime is how long an upload waits for its turn. Clients wait longer.
	admitTime = 10 * time.Second
	// Requests that were denied, and those that failed, are logged at this rate
	// each, in lines per second, after a burst: anybody can make them, a storage
	// that is full or gone fails all, and the log must not fill the disk.
	logRate  = 2
	logBurst = 100
)

// admit waits until one more upload may be served. done is called at its end.
func (s *Server) admit(ctx context.Context) (done func(), err error) {
	timer := time.NewTimer(admitTime)
	defer timer.Stop()
	select {
	case s.uploads <- struct{}{}:
		return func() { <-s.uploads }, nil
	case <-ctx.Done():
	case <-timer.C:
	}
	return nil, errTooManyUploads
}

// bounded holds one kind of log line to logRate.
type bounded struct {
	lines  *rate.Limiter
	unsaid atomic.Int64
}

func newBounded() *bounded { return &bounded{lines: rate.NewLimiter(logRate, logBurst)} }

// say reports whether one more may be logged, and how many were not since the
// last that was.
func (b *bounded) say() (unsaid int64, ok bool) {
	if !b.lines.Allow() {
		b.unsaid.Add(1)
		return 0, false
	}
	return b.unsaid.Swap(0), true
}
