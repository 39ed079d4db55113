package syncer

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// pace is how often a parent may be asked: by what it says itself, with
// Retry-After and the headers of its rate limits, and by the operator's budget. It
// outlives synchronisations. Whoever is too early waits, unless that is longer
// than anybody wants to wait.
type pace struct {
	perHour int // 0: no budget

	mu      sync.Mutex
	recent  []time.Time // of the requests of the last hour, while there is a budget
	paused  time.Time   // nothing is asked before
	spent   time.Time   // nothing that counts for the parent's limit is asked before
	refused error       // what is said instead of waiting until then
	waiting int         // how many requests the budget holds back
	until   time.Time   // the first of them goes on
}

// ready waits until a request may be made, and counts it. The error is the cause
// of ctx, or why waiting makes no sense.
func (p *pace) ready(ctx context.Context, method string) error {
	for {
		wait, err := p.next(time.Now(), method)
		if err != nil {
			return err
		}
		if wait <= 0 {
			return nil
		}
		err = sleep(ctx, wait)
		p.mu.Lock()
		p.waiting--
		p.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// next counts a request if it may be made now, and says how long it has to wait
// otherwise.
func (p *pace) next(now time.Time, method string) (time.Duration, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refused != nil && now.Before(p.paused) {
		return 0, p.refused
	}
	until := p.paused
	if method != http.MethodHead && p.spent.After(until) {
		until = p.spent // Docker Hub, for one, does not count HEAD
	}
	if p.perHour > 0 {
		expired, _ := slices.BinarySearchFunc(p.recent, now.Add(-time.Hour), func(t, limit time.Time) int {
			if t.After(limit) {
				return 1
			}
			return -1
		})
		p.recent = slices.Delete(p.recent, 0, expired)
		if len(p.recent) >= p.perHour {
			if free := p.recent[len(p.recent)-p.perHour].Add(time.Hour); free.After(until) {
				until = free
			}
		}
	}
	wait := until.Sub(now)
	if wait > 0 {
		p.waiting++
		p.until = until
		return wait, nil
	}
	if p.perHour > 0 {
		p.recent = append(p.recent, now)
	}
	return 0, nil
}

// count takes note of a request that was made without waiting.
func (p *pace) count() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.perHour > 0 {
		p.recent = append(p.recent, time.Now())
	}
}

// pause holds all requests back for a while, as the parent asked for.
func (p *pace) pause(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if until := time.Now().Add(d); until.After(p.paused) {
		p.paused, p.refused = until, nil
	}
}

// refuse has every request fail with f for a while, as the parent asked for more
// patience than there is.
func (p *pace) refuse(f *fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	until := time.Now().Add(f.after)
	if !until.After(p.paused) {
		return
	}
	final := *f
	final.temporary, final.after = false, 0
	final.message += "; it is asked again at " + until.UTC().Format(time.RFC3339)
	p.paused, p.refused = until, &final
}

// observe reads what an answer says about the parent's limit.
func (p *pace) observe(h http.Header) {
	wait := spent(h, time.Now())
	if wait <= 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.spent = time.Now().Add(wait)
}

// status says in one line why requests wait, "" when none does. who is the
// parent.
func (p *pace) status(who string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	switch {
	case p.refused != nil && now.Before(p.paused):
		return p.refused.Error()
	case p.waiting == 0 || !now.Before(p.until):
		return ""
	case now.Before(p.paused):
		return fmt.Sprintf("%s asked for a pause until %s", who, p.until.UTC().Format(time.RFC3339))
	case now.Before(p.spent):
		return fmt.Sprintf("%s has granted all the requests that its limit allows; it goes on at %s", who, p.until.UTC().Format(time.RFC3339))
	}
	return fmt.Sprintf("the %d requests an hour of spec.sync.maxRequestsPerHour are used up for %s; it goes on at %s", p.perHour, who, p.until.UTC().Format(time.RFC3339))
}

// waits says in one line for each registry why requests to it wait. Empty: none
// does.
func (s *Syncer) waits() (all []string) {
	for i, p := range s.paces {
		if why := p.status("parent " + s.upstreams[i].Endpoint); why != "" && !slices.Contains(all, why) {
			all = append(all, why)
		}
	}
	return all
}

// maxReset bounds the wait that a parent's headers can cause.
const maxReset = 6 * time.Hour

// spent says for how long a parent's limit is used up, by what its answer says: 0
// when something is left, or nothing is said. Understood are the header fields of
// the IETF's drafts on rate limits, in their older form (RateLimit-Limit,
// -Remaining, -Reset), in which Docker Hub gives a window in place of a reset
// ("100;w=21600"), and in their newer (RateLimit: "name";r=0;t=30), and GitHub's
// (X-RateLimit-*, with the time of day).
func spent(h http.Header, now time.Time) time.Duration {
	if item := h.Get("RateLimit"); item != "" {
		left, ok := parameter(item, "r")
		reset, _ := parameter(item, "t")
		if ok && left == 0 {
			return min(time.Duration(reset)*time.Second, maxReset)
		}
	}
	for _, prefix := range []string{"RateLimit-", "X-RateLimit-"} {
		left, ok := number(h.Get(prefix + "Remaining"))
		if !ok || left > 0 {
			continue
		}
		if reset, ok := number(h.Get(prefix + "Reset")); ok {
			if reset > 1e9 { // a time of day
				return max(min(time.Unix(reset, 0).Sub(now), maxReset), 0)
			}
			return min(time.Duration(reset)*time.Second, maxReset)
		}
		limit, ok := number(h.Get(prefix + "Limit"))
		if window, has := parameter(h.Get(prefix+"Limit"), "w"); ok && has && limit > 0 {
			// The window slides: one more is granted when the oldest leaves it.
			return min(time.Duration(window)*time.Second/time.Duration(limit), maxReset)
		}
	}
	return 0
}

// number is the number that a field begins with.
func number(field string) (int64, bool) {
	value, _, _ := strings.Cut(field, ";")
	n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 40)
	return n, err == nil && n >= 0
}

// parameter is the number that a parameter of a field has.
func parameter(field, name string) (int64, bool) {
	for part := range strings.SplitSeq(field, ";") {
		if value, ok := strings.CutPrefix(strings.TrimSpace(part), name+"="); ok {
			return number(value)
		}
	}
	return 0, false
}
