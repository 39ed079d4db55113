package auth

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

// Failed logins are limited for each name together with the address it is tried
// from, so that guessing at a name from one machine locks out neither the name's
// owner elsewhere nor other names behind the same address; and, much wider, for
// each address, which bounds the work that it can cause. A password that is
// known to be right is never held up.
var (
	pairLimit    = rate{burst: 5, refill: 5 * time.Second}
	addressLimit = rate{burst: 60, refill: time.Second}
)

// maxBuckets bounds the memory that failing logins can take.
const maxBuckets = 16384

// rate allows a burst, and then one in every refill.
type rate struct {
	burst  int
	refill time.Duration
}

// limiter counts failures.
type limiter struct {
	mu      sync.Mutex
	buckets map[bucketKey]bucket // guarded by mu
}

// bucketKey is a name and an address, or an address alone.
type bucketKey struct {
	name    string
	address netip.Prefix
	pair    bool
}

// bucket is when the last failure allowed will have been paid off: the generic
// cell rate algorithm.
type bucket struct{ until time.Time }

func newLimiter() *limiter { return &limiter{buckets: make(map[bucketKey]bucket)} }

// take counts a login before it is looked at, as if it had failed, and returns
// zero; or returns how long it must wait, and counts nothing. That it counts
// beforehand bounds what many at the same time can cause.
func (l *limiter) take(name, remote string, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	pair, address := keys(name, remote)
	if wait := max(l.buckets[pair].wait(pairLimit, now), l.buckets[address].wait(addressLimit, now)); wait > 0 {
		return wait
	}
	l.makeRoom(now)
	l.buckets[pair] = l.buckets[pair].add(pairLimit, now)
	l.buckets[address] = l.buckets[address].add(addressLimit, now)
	return 0
}

// refund takes back what take counted for a login that turned out right.
func (l *limiter) refund(name, remote string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	pair, address := keys(name, remote)
	l.buckets[pair] = l.buckets[pair].sub(pairLimit)
	l.buckets[address] = l.buckets[address].sub(addressLimit)
}

// makeRoom forgets what has been paid off, and if that is not enough, anything,
// a quarter at a time so that it is seldom needed.
func (l *limiter) makeRoom(now time.Time) {
	if len(l.buckets) < maxBuckets-1 {
		return
	}
	for key, b := range l.buckets {
		if !b.until.After(now) {
			delete(l.buckets, key)
		}
	}
	for key := range l.buckets {
		if len(l.buckets) < maxBuckets*3/4 {
			return
		}
		delete(l.buckets, key)
	}
}

func (b bucket) wait(r rate, now time.Time) time.Duration {
	full := now.Add(time.Duration(r.burst-1) * r.refill)
	return max(0, b.until.Sub(full))
}

func (b bucket) add(r rate, now time.Time) bucket {
	if b.until.Before(now) {
		b.until = now
	}
	return bucket{b.until.Add(r.refill)}
}

func (b bucket) sub(r rate) bucket { return bucket{b.until.Add(-r.refill)} }

// keys are the buckets of a name and an address. IPv6 addresses count by /64,
// which is what one machine commonly has.
func keys(name, remote string) (pair, address bucketKey) {
	prefix := origin(remote)
	return bucketKey{name, prefix, true}, bucketKey{"", prefix, false}
}

// origin is what of a client's address counts; the zero Prefix when remote is no
// address.
func origin(remote string) netip.Prefix {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		host = remote
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return netip.Prefix{}
	}
	ip = ip.Unmap().WithZone("")
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	prefix, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return prefix
}
