package syncer

import (
	"time"

	"golang.org/x/time/rate"
)

// bandwidth bounds what all transfers together bring in a second. nil: nothing.
type bandwidth struct{ limiter *rate.Limiter }

// newBandwidth allows so many bytes per second. 0: any number.
func newBandwidth(bytes int64) *bandwidth {
	if bytes == 0 {
		return nil
	}
	// A twentieth of a second at once is little enough for the link that is
	// shared, and a limit below that is not worth the precision.
	return &bandwidth{rate.NewLimiter(rate.Limit(bytes), int(max(bytes/20, 4<<10)))}
}

// most is how many bytes may be read at once.
func (b *bandwidth) most() int64 {
	if b == nil {
		return 1 << 30
	}
	return int64(b.limiter.Burst())
}

// take says how long a transfer has to wait that has just read so many bytes, most
// at most.
func (b *bandwidth) take(bytes int) time.Duration {
	if b == nil || bytes == 0 {
		return 0
	}
	return b.limiter.ReserveN(time.Now(), bytes).Delay()
}
