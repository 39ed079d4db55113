package cache

import (
	"net/url"
	"sync"
)

// target is what a URL asks for, with the facts that an answer depends on.
type target struct {
	route
	host   string  // the registry that the facts are about
	reader factKey // "anybody may read this repository"
	member factKey // of a digest: "this content is of this repository"
}

// targets remembers what the URLs asked for last mean, so that a request that
// comes over and over costs neither parsing nor hashing. It holds nothing of
// any credential.
type targets struct {
	mu    sync.RWMutex // guards byURL
	byURL map[requestURL]*target
}

type requestURL struct{ path, query string }

const (
	// maxTargets bounds how many are remembered, and maxTargetQuery the length
	// of their queries, so that all of them take less than 2 MiB.
	maxTargets     = 2048
	maxTargetQuery = 256
)

// get returns nil for a URL that is not remembered.
func (t *targets) get(u *url.URL) *target {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byURL[requestURL{u.Path, u.RawQuery}]
}

// put remembers what u, which parseRoute has accepted, means.
func (t *targets) put(u *url.URL, what *target) {
	if len(u.RawQuery) > maxTargetQuery {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byURL == nil || len(t.byURL) >= maxTargets {
		t.byURL = make(map[requestURL]*target) // what is hot is back at once
	}
	t.byURL[requestURL{u.Path, u.RawQuery}] = what
}

// target returns what u asks for and of which registry. The error is a refusal.
func (c *Cache) target(d *disk, u *url.URL) (*target, *registry, error) {
	t := d.targets.get(u)
	if t == nil {
		rt, err := parseRoute(u)
		if err != nil {
			return nil, nil, err
		}
		t = &target{route: rt}
	}
	reg, err := c.registryFor(t.ns)
	if err != nil || t.host == reg.host || t.kind == kindPing {
		return t, reg, err
	}
	t = &target{route: t.route, host: reg.host, reader: d.key.reader(reg.host, t.repo, "")}
	if t.digest != "" {
		t.member = d.key.member(reg.host, t.route)
	}
	d.targets.put(u, t)
	return t, reg, nil
}
