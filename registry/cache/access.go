package cache

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

// request is what a client asks, with everything that is needed to answer it
// even after the client has gone.
type request struct {
	target    // its reader is "this credential may read this repository"
	registry  *registry
	disk      *disk
	auth      string      // Authorization, for upstreams
	own       bool        // it was a token of the cache's own
	stranger  bool        // it is a token that did not come by here, or has expired
	token     factKey     // if it is a token
	bearer    bearer      // whom that stands for
	header    http.Header // of the client's request
	pseudonym string      // in Via
	faults    *faults
	limit     *rate.Limiter // of its downloads while no other reader waits; nil: none
}

// about returns the request for d in the same repository.
func (rq *request) about(d digest.Digest) *request {
	next := *rq
	next.tag, next.digest = "", d
	next.member = rq.disk.key.member(rq.host, next.route)
	return &next
}

func (rq *request) question(method string) question {
	q := question{
		method: method, path: rq.path(), filter: rq.filter, ns: rq.registry.host, who: rq.reader,
		small: method == http.MethodHead || rq.kind == kindManifest, digest: rq.digest,
		accept: strings.Join(rq.header["Accept"], ", "), auth: rq.auth,
		via: strings.Join(append(slices.Clip(rq.header["Via"]), "1.1 "+rq.pseudonym), ", "),
	}
	if rq.digest != "" {
		q.avoid = func(up *upstream) *unavailable { return rq.faults.avoid(up, rq.digest) }
	}
	return q
}

// confirm records that the registry gave this client this content.
func (rq *request) confirm() {
	rq.disk.ledger.confirm(rq.reader)
	if rq.digest != "" {
		rq.disk.ledger.confirm(rq.member)
	}
}

// learn takes note of what an upstream's refusal says.
func (rq *request) learn(err error) {
	var no *refusal
	if !errors.As(err, &no) || !no.upstream {
		return
	}
	switch no.status {
	case http.StatusUnauthorized:
		if !rq.own {
			rq.disk.ledger.revoke(rq.reader)
		}
		for _, challenge := range no.challenges {
			if !strings.ContainsAny(challenge, "\r\n") {
				_ = rq.disk.notes.put(rq.challengeKey(), challenge) // without it, less works offline
				break
			}
		}
	case http.StatusForbidden:
		rq.disk.ledger.revoke(rq.reader)
	case http.StatusNotFound:
		if rq.digest != "" {
			rq.disk.ledger.revoke(rq.member)
		}
	}
}

func (rq *request) challengeKey() factKey {
	return rq.disk.key.fact("challenge", rq.registry.host, rq.repo)
}

// allowed reports whether the registry said lately that the reader of t may have
// its content.
func (c *Cache) allowed(l *ledger, t *target) bool {
	return l.fresh(t.reader, c.cfg.AllowedTTL) && l.fresh(t.member, c.cfg.MemberTTL)
}

// allowedOffline is the same for the time in which no upstream can be reached.
func (c *Cache) allowedOffline(rq *request) bool {
	l := rq.disk.ledger
	return l.known(rq.reader, c.cfg.OfflineTTL) && l.known(rq.member, c.cfg.OfflineTTL)
}

// offline turns the unavailability of every upstream into the answer for a
// client about which nothing is known. Where the registry takes credentials,
// they are asked for in its place: without them, the client could not show that
// it is one that had been allowed. As for tokens, see serveToken.
func (rq *request) offline(err error) error {
	var down *unavailable
	if !errors.As(err, &down) || !rq.stranger && (rq.auth != "" || rq.own) {
		return err
	}
	challenge := rq.disk.notes.get(rq.challengeKey())
	if challenge == "" {
		return err
	}
	no := refuse(http.StatusUnauthorized, "unauthorized", "the registry is unreachable; it had asked for credentials")
	no.challenges = []string{challenge}
	return no
}

// permit decides whether the client may have content that is here, asking the
// registry if need be. The error is what to answer instead.
func (c *Cache) permit(ctx context.Context, rq *request) (outcome, error) {
	if c.allowed(rq.disk.ledger, &rq.target) {
		return hitStored, nil
	}
	err := c.check(ctx, rq)
	if err == nil {
		return hitChecked, nil
	}
	var down *unavailable
	if errors.As(err, &down) && c.allowedOffline(rq) {
		return hitOffline, nil
	}
	return outcome{}, rq.offline(err)
}

// check asks the registry whether the client may have the content, once for
// all who ask the same at the same time.
func (c *Cache) check(ctx context.Context, rq *request) error {
	key := string(rq.reader[:]) + string(rq.member[:])
	_, err, _ := c.once.Do("check"+key, func() (any, error) {
		ctx := context.WithoutCancel(ctx) // the others still want to know; the budget ends it
		ans, err := c.asker.ask(ctx, rq.registry.host, rq.question(http.MethodHead), rq.registry.order(), c.cfg.Timeouts.Headers)
		if err != nil {
			rq.learn(err)
			return nil, err
		}
		ans.close()
		rq.confirm()
		return nil, nil
	})
	return err
}

// recent remembers things for a while.
type recent[K comparable] struct {
	mu    sync.Mutex // guards until
	until map[K]time.Time
}

func (r *recent[K]) add(k K, d time.Duration) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.until == nil {
		r.until = make(map[K]time.Time)
	}
	for k, until := range r.until {
		if now.After(until) {
			delete(r.until, k)
		}
	}
	r.until[k] = now.Add(d)
}

func (r *recent[K]) has(k K) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Now().Before(r.until[k])
}

// faults remembers who served wrong bytes.
type faults struct {
	wrong recent[served]
}

// served is a digest that an upstream served, any if it is empty.
type served struct {
	upstream *upstream
	digest   digest.Digest
}

// avoid returns why up should not be asked for d now, nil if it should.
func (f *faults) avoid(up *upstream, d digest.Digest) *unavailable {
	if f.wrong.has(served{up, d}) {
		return &unavailable{"bad-content", fmt.Errorf("%s served wrong bytes for this digest", up.name)}
	}
	return nil
}

// distrust remembers that up served wrong bytes for d.
func (f *faults) distrust(up *upstream, d digest.Digest) {
	f.wrong.add(served{up, d}, badContentMemory)
	f.wrong.add(served{upstream: up}, badContentMemory)
}
