package syncer

import (
	"maps"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// checks remembers, over synchronisations, when the referrers of a manifest were
// last asked for. Those of an image that is new here are asked for with it;
// signatures that are added later are found when an hour has passed.
type checks struct {
	mu    sync.Mutex
	times map[string]time.Time // by repository@digest
}

const checkEvery = time.Hour

func newChecks() *checks { return &checks{times: make(map[string]time.Time)} }

// due reports whether it is time to ask again, or the image has changed, and
// takes it that this is done then.
func (c *checks) due(repository string, d digest.Digest, changed bool, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := repository + "@" + d.String()
	if last, ok := c.times[key]; ok && !changed && now.Sub(last) < checkEvery {
		return false
	}
	c.times[key] = now
	return true
}

// forget makes a manifest due again.
func (c *checks) forget(repository string, d digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.times, repository+"@"+d.String())
}

// clear makes everything due again.
func (c *checks) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.times)
}

// expire drops what is due anyway, so that memory is bounded by what there is to
// remember for an hour.
func (c *checks) expire(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.times, func(_ string, last time.Time) bool { return now.Sub(last) >= checkEvery })
}
