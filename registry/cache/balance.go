package cache

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// health is what is known of how an upstream answers.
type health struct {
	mu     sync.Mutex    // guards everything below
	mean   time.Duration // moving, of the time until an answer's headers; 0: unknown
	spread time.Duration // moving, of its deviation from the mean
	last   time.Time     // of the last answer
	bad    time.Time     // asked after others until then
	asking int           // requests without headers yet
	credit float64       // requests that may be asked twice
}

const (
	// hedgeShare is how many requests may be asked a second time for each that
	// is asked once, and hedgeCredit how many of these can be saved up.
	hedgeShare  = 0.1
	hedgeCredit = 10
)

func (h *health) begin() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asking++
	h.credit = min(h.credit+hedgeShare, hedgeCredit)
	return time.Now()
}

// end takes note of an answer's headers, or of their absence, to a request of
// which began tells.
func (h *health) end(began time.Time, answered bool) {
	took := time.Since(began)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asking--
	if answered {
		h.last = time.Now()
	}
	if h.mean == 0 {
		h.mean, h.spread = took, took/2
		return
	}
	h.spread += ((took - h.mean).Abs() - h.spread) / 4
	h.mean += (took - h.mean) / 8
}

// answeredSince tells whether an answer came after t.
func (h *health) answeredSince(t time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.last.After(t)
}

func (h *health) failed(until time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.bad = until
}

// cost is the time that an answer is to be waited for. Who is not known yet is
// tried first, who failed a moment ago last.
func (h *health) cost() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if time.Now().Before(h.bad) {
		return math.MaxInt64
	}
	return h.mean * time.Duration(1+h.asking)
}

// usual is the time within which nearly every answer comes.
func (h *health) usual() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mean + 4*h.spread
}

// spend takes the credit for one request that is asked a second time.
func (h *health) spend() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.credit < 1 {
		return false
	}
	h.credit--
	return true
}

// replicas are the ways to one upstream: its endpoints, if they are known, and
// last the address that stands for all of them.
type replicas []*upstream

// choose returns the better one of two endpoints that chance picked, so that no
// herd of nodes runs to the same; then the best of the others, and at last the
// common address.
func (r replicas) choose() []*upstream {
	if len(r) < 3 {
		return r
	}
	endpoints := slices.Clone(r[:len(r)-1])
	i := rand.IntN(len(endpoints))
	j := (i + 1 + rand.IntN(len(endpoints)-1)) % len(endpoints)
	if endpoints[j].health.cost() < endpoints[i].health.cost() {
		i = j
	}
	first := endpoints[i]
	endpoints = slices.Delete(endpoints, i, i+1)
	second := slices.MinFunc(endpoints, func(a, b *upstream) int {
		return cmp.Compare(a.health.cost(), b.health.cost())
	})
	common := r[len(r)-1]
	if first.health.cost() == math.MaxInt64 {
		return []*upstream{common, second, first}
	}
	return []*upstream{first, second, common}
}
