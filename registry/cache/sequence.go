package cache

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// containerd downloads several layers of an image at once and unpacks them one
// after the other, in the manifest's order. Downloads that share a link evenly
// all end late. So where it is the link that limits them, the layer that is
// unpacked first goes ahead of the others, and unpacking begins earlier; all
// bytes together take as long as before.
//
// Where something else is the limit, a rate that the registry has for each
// connection or a processor, going ahead would cost time: so it is tried for a
// moment, and goes on only as long as all downloads together bring as much as
// when they share.

// sequence is the downloads of one image's layers from one registry. While it
// leads, all but the first of them hold back.
type sequence struct {
	pace *pace

	mu      sync.Mutex // guards everything below
	places  []*place   // in the manifest's order
	leads   bool
	until   time.Time     // when what leads is compared with sharing anew
	after   time.Time     // when the next stretch to measure may begin
	from    time.Time     // when it began; zero: not yet
	bytes   int64         // read in this stretch
	unread  int64         // had come in at its beginning and was not read
	shared  float64       // bytes per second when all share
	changed chan struct{} // closed when another place may go ahead
}

// place is one download in a sequence. Those without one, nil, hold back for
// nobody.
type place struct {
	sequence *sequence
	position int
	conn     syscall.RawConn // that it reads from; nil: unknown
	key      sequenceKey
	cache    *Cache
}

type sequenceKey struct {
	registry *registry
	manifest digest.Digest
}

// pace remembers for a registry that going ahead cost time there.
type pace struct {
	mu    sync.Mutex // guards everything below
	again time.Time
	wait  time.Duration
}

// next is when going ahead may be tried.
func (p *pace) next() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.again
}

// tried takes note of what going ahead was worth.
func (p *pace) tried(good bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if good {
		p.wait = 0
		return
	}
	p.wait = min(max(aheadRetry, 4*p.wait), mostAheadRetry)
	p.again = time.Now().Add(p.wait)
}

// takePlace joins the other downloads of the image that rq's blob is a layer of:
// of the manifest used last. The place is nil if there is none, or nobody waits
// for the blob.
func (c *Cache) takePlace(rq *request) *place {
	if rq.patient() {
		return nil
	}
	manifest, position := c.manifests.layer(rq.digest)
	if manifest == "" {
		return nil
	}
	p := &place{position: position, key: sequenceKey{rq.registry, manifest}, cache: c}
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.sequences[p.key]
	if s == nil {
		s = &sequence{pace: &rq.registry.pace, changed: make(chan struct{})}
		c.sequences[p.key] = s
	}
	p.sequence = s
	s.change(func() {
		at, _ := slices.BinarySearchFunc(s.places, p, func(a, b *place) int { return cmp.Compare(a.position, b.position) })
		s.places = slices.Insert(s.places, at, p)
	})
	return p
}

// leave ends the place.
func (p *place) leave() {
	if p == nil {
		return
	}
	c, s := p.cache, p.sequence
	c.mu.Lock()
	defer c.mu.Unlock()
	s.change(func() { s.places = slices.DeleteFunc(s.places, func(other *place) bool { return other == p }) })
	if len(s.places) == 0 {
		delete(c.sequences, p.key)
	}
}

// change has others come or go: who goes ahead is another then, and what is
// measured begins anew.
func (s *sequence) change(places func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	alone := len(s.places) < 2
	places()
	if alone {
		s.leads = false
	}
	s.measure()
	s.wake()
}

func (s *sequence) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// measure has a stretch measured as soon as the downloads have settled and going
// ahead may be tried.
func (s *sequence) measure() {
	s.from, s.after = time.Time{}, time.Now().Add(aheadSettle)
	if !s.leads {
		s.after = later(s.after, s.pace.next())
	}
}

// begin begins a stretch.
func (s *sequence) begin(now time.Time) {
	s.from, s.bytes, s.unread = now, 0, s.backlog()
}

// backlog is what has come in and was not read: while downloads hold back, the
// kernel goes on for a while, and what it takes in is not lost.
func (s *sequence) backlog() (n int64) {
	for _, p := range s.places {
		if p.conn != nil {
			n += int64(unread(p.conn))
		}
	}
	return n
}

// share has nobody hold back.
func (s *sequence) share() {
	s.leads = false
	s.measure()
	s.wake()
}

// went takes note of n bytes more, read from conn, and returns when the rest, of
// so many bytes, may be read: at once, or after holding back for those that go
// ahead. A rest that comes at one go is not worth that.
func (p *place) went(ctx context.Context, conn syscall.RawConn, n int, rest int64) {
	if p == nil {
		return
	}
	s := p.sequence
	s.mu.Lock()
	p.conn = conn
	s.compare(int64(n))
	holdBack, changed := s.leads && s.places[0] != p && rest > fillChunk, s.changed
	s.mu.Unlock()
	if !holdBack {
		return
	}
	timer := time.NewTimer(mostHeldBack)
	defer timer.Stop()
	select {
	case <-changed:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// compare adds n bytes to what is measured and, at the end of a stretch, decides
// how to go on. s.mu is held.
func (s *sequence) compare(n int64) {
	now := time.Now()
	if len(s.places) < 2 || now.Before(s.after) {
		return
	}
	if s.from.IsZero() {
		s.begin(now)
		return
	}
	s.bytes += n
	took := now.Sub(s.from)
	if took < s.stretch() {
		return
	}
	came := s.bytes + s.backlog() - s.unread
	rate := float64(came) / took.Seconds()
	switch {
	case !s.leads && came < aheadSample:
		if took > longestStretch { // too slow to tell
			s.measure()
		}
	case !s.leads:
		s.leads, s.shared, s.until = true, rate, now.Add(aheadFor)
		s.measure()
	case rate < asFast*s.shared:
		s.pace.tried(false)
		s.share()
	case now.After(s.until):
		s.share()
	default:
		s.pace.tried(true)
		s.begin(now)
	}
}

// stretch is how long it takes to tell how fast it goes. s.mu is held.
func (s *sequence) stretch() time.Duration {
	if !s.leads {
		return aheadStretch
	}
	return max(aheadStretch, time.Duration(aheadSample/s.shared*float64(time.Second)))
}

// layer returns the manifest that has d among its layers, and at which place: of
// those that were used last, the latest. "" if there is none.
func (mc *manifestCache) layer(d digest.Digest) (manifest digest.Digest, place int) {
	for _, m := range mc.latest(sequenceMemory) {
		if !bytes.Contains(m.body, []byte(d)) {
			continue
		}
		var refers struct{ Layers []ocispec.Descriptor }
		if json.Unmarshal(m.body, &refers) != nil {
			continue
		}
		at := slices.IndexFunc(refers.Layers, func(l ocispec.Descriptor) bool { return l.Digest == d })
		if at >= 0 {
			return m.digest, at
		}
	}
	return "", 0
}

// latest returns up to n manifests, the one used last first.
func (mc *manifestCache) latest(n int) (all []*manifest) {
	mc.mu.Lock()
	defer mc.mu.Unlock()
	for e := mc.used.Front(); e != nil && len(all) < n; e = e.Next() {
		all = append(all, e.Value.(*manifest))
	}
	return all
}
