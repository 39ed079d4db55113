package agent

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/connected-registry/connected-registry/trust"
)

const (
	// settleTime is waited after a change: another program's writes come in
	// bursts, and are then seen as one.
	settleTime = 50 * time.Millisecond
	// checkInterval is for what the watch does not see, such as a mount.
	checkInterval = 10 * time.Second
	// blindInterval takes the place of the watch on a node that has none to
	// spare (fs.inotify limits).
	blindInterval = time.Second
	// A file system that fails is tried again after a wait that doubles
	// between these. The first is short: often it was somebody's change under
	// our hands.
	firstRetry = 100 * time.Millisecond
	longRetry  = time.Minute
)

// Run applies, then keeps the node in that state until ctx ends, and returns
// nil then. It returns an error only if the first attempt could not be carried
// through; a fault that concerns one registry is logged, and the others kept.
func (a *Agent) Run(ctx context.Context) error {
	k := &keeper{Agent: a, once: onceLog{log: a.log}, fights: make(map[string]*fight)}
	if err := k.apply(ctx, time.Now()); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer k.unwatch()
	k.loop(ctx)
	return nil
}

// keeper is the state of one Run.
type keeper struct {
	*Agent
	applied  *desired // the last attempt's
	once     onceLog
	watcher  *watcher // nil if there is none to be had
	certs    string   // the hosts directory as it was found last
	fights   map[string]*fight
	settled  bool // applied was carried out once: from now on, a change is drift
	failures int  // attempts in a row that could not be carried through
}

func (k *keeper) loop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	soon := true // the timer is set for a change that was, or may have been, made
	for {
		var events <-chan fsnotify.Event
		var losses <-chan error
		if k.watcher != nil {
			events, losses = k.watcher.Events, k.watcher.Errors
		}
		select {
		case <-ctx.Done():
			return
		case <-k.news:
			if k.desired.Load() == k.applied {
				continue
			}
			soon = true
			timer.Reset(0)
		case e := <-events:
			if soon || k.failures > 0 || !k.watcher.concerns(e) {
				continue
			}
			soon = true
			timer.Reset(settleTime)
		case <-losses: //nolint:errcheck // whatever was lost, the answer is the same
			// Events were lost: look for ourselves.
			soon = true
			timer.Reset(settleTime)
		case <-timer.C:
			if err := k.apply(ctx, time.Now()); err != nil && ctx.Err() == nil {
				k.once.say(ctx, slog.LevelError, "the node could not be put right", "error", err)
			}
			// What changed in a directory before it was watched went unseen.
			if soon = k.watch() && k.failures == 0; soon {
				timer.Reset(settleTime)
			} else {
				timer.Reset(k.pause(time.Now()))
			}
		}
	}
}

// apply makes one attempt, without what is being fought over. The error is nil
// if that went through, be it with faults that concern one registry.
func (k *keeper) apply(ctx context.Context, now time.Time) error {
	d := k.desired.Load()
	if d != k.applied {
		k.begin(d, now)
	}
	want, held := k.holding(d.want, now)
	result, err := d.store.Apply(ctx, want)
	k.once.begin()
	if result.CertsDir != "" {
		k.certs = result.CertsDir
	}
	if len(result.Changed) > 0 {
		k.log.Info("changed files of the node", "paths", paths(result))
	}
	for _, n := range result.Notes {
		k.once.say(ctx, slog.LevelWarn, n)
	}
	k.countRewrites(result, now)
	k.settled = true
	if ctx.Err() == nil {
		k.report(Report{Config: d.cfg, Err: err, Held: held, Changed: len(result.Changed)})
	}
	faults := trust.OwnerErrors(err)
	for _, f := range faults {
		k.once.say(ctx, slog.LevelError, "part of the node could not be put right", "error", f)
		if f.Owner == trust.SystemTrustOwner {
			// The node's own program takes seconds: do not run it over and over.
			k.fight(f.Owner).lost(now)
		}
	}
	if err == nil || faults != nil {
		k.failures = 0
		return nil
	}
	k.failures++
	return err
}

// begin takes up something new: what it changes on the node is no drift, and a
// truce was about something else.
func (k *keeper) begin(d *desired, now time.Time) {
	k.applied, k.settled = d, false
	for _, f := range k.fights {
		if f.resting(now) {
			f.until = now
		}
	}
}

// holding returns want without what is being fought over, and whose that is.
func (k *keeper) holding(want trust.State, now time.Time) (_ trust.State, held []string) {
	want.Registries = slices.Clone(want.Registries)
	for i, r := range want.Registries {
		if k.fight(r.Hosts.Registry).resting(now) {
			want.Registries[i].Hold = true
			held = append(held, r.Hosts.Registry)
		}
	}
	if k.fight(trust.SystemTrustOwner).resting(now) {
		want.HoldSystemTrust = true
		held = append(held, trust.SystemTrustOwner)
	}
	return want, held
}

// countRewrites looks for fights in what had to be put right.
func (k *keeper) countRewrites(result trust.Result, now time.Time) {
	if !k.settled {
		return
	}
	var owners []string
	for _, c := range result.Changed {
		if !slices.Contains(owners, c.Owner) {
			owners = append(owners, c.Owner)
		}
	}
	for _, owner := range owners {
		if truce := k.fight(owner).rewritten(now); truce > 0 {
			k.log.Warn("another program keeps changing this registry's files, and is let have its way for a while: find it and take the registry out of its configuration, or out of ours",
				"registry", owner, "retry_in", truce)
		}
	}
}

func (k *keeper) fight(owner string) *fight {
	f := k.fights[owner]
	if f == nil {
		f = new(fight)
		k.fights[owner] = f
	}
	return f
}

// pause is the time until the next attempt if nothing happens.
func (k *keeper) pause(now time.Time) time.Duration {
	if k.failures > 0 {
		return min(firstRetry<<min(k.failures-1, 10), longRetry)
	}
	wait := checkInterval
	if k.watcher == nil {
		wait = blindInterval
	}
	for _, f := range k.fights {
		if f.resting(now) {
			wait = min(wait, f.until.Sub(now))
		}
	}
	return wait
}

// watch watches the hosts directory, wherever it is now, and reports whether
// it watches more than before.
func (k *keeper) watch() (grew bool) {
	if k.watcher != nil && !k.watcher.isAt(k.certs) {
		k.unwatch()
	}
	var err error
	if k.watcher == nil {
		k.watcher, err = newWatcher(k.nodeRoot, k.certs)
	}
	if err == nil {
		grew, err = k.watcher.cover()
	}
	if err != nil {
		k.unwatch()
		k.once.say(context.Background(), slog.LevelWarn, "changes on the node are looked for every second, since they cannot be watched: raise fs.inotify.max_user_watches and max_user_instances", "error", err)
		return false
	}
	return grew
}

func (k *keeper) unwatch() {
	if k.watcher != nil {
		_ = k.watcher.Close()
		k.watcher = nil
	}
}

// onceLog repeats nothing from one attempt to the next.
type onceLog struct {
	log           *slog.Logger
	before, since map[string]bool
}

// begin starts a new attempt.
func (o *onceLog) begin() { o.before, o.since = o.since, make(map[string]bool) }

func (o *onceLog) say(ctx context.Context, level slog.Level, msg string, args ...any) {
	key := fmt.Sprint(append([]any{msg}, args...)...)
	if !o.before[key] && !o.since[key] {
		o.log.Log(ctx, level, msg, args...)
	}
	o.since[key] = true
}
