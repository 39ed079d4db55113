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
	// Denied requests are logged at this rate, in lines per second, after a
	// burst: anybody can make them, and the log must not fill the disk.
	denialRate  = 2
	denialBurst = 100
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

// denials bounds what the log says about denied requests.
type denials struct {
	lines  *rate.Limiter
	unsaid atomic.Int64
}

func newDenials() *denials { return &denials{lines: rate.NewLimiter(denialRate, denialBurst)} }

// say reports whether one more may be logged, and how many were not since the
// last that was.
func (d *denials) say() (unsaid int64, ok bool) {
	if !d.lines.Allow() {
		d.unsaid.Add(1)
		return 0, false
	}
	return d.unsaid.Swap(0), true
}
