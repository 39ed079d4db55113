package agent

import "time"

const (
	// More than fightLimit rewrites of one registry's files within fightWindow
	// are a fight: an operator's edit makes one or two, another program that
	// wants the same file makes as many as it gets.
	fightLimit  = 5
	fightWindow = 30 * time.Second
	// Each truce is twice as long as the one before, between these; after a
	// peace of twice the last, all is forgotten.
	firstTruce = 5 * time.Second
	longTruce  = 5 * time.Minute
)

// fight notices that somebody else keeps rewriting one registry's files. The
// zero value is peace.
type fight struct {
	rewrites []time.Time
	truce    time.Duration // the last one
	until    time.Time     // its end
}

// rewritten records that files had to be put right at now. If that is once too
// often, a truce begins, and its length is returned; otherwise 0.
func (f *fight) rewritten(now time.Time) time.Duration {
	f.forget(now)
	f.rewrites = append(f.rewrites, now)
	// The first rewrite after a truce shows that the other has not given up.
	if len(f.rewrites) <= fightLimit && f.truce == 0 {
		return 0
	}
	return f.lost(now)
}

// lost begins a truce at once.
func (f *fight) lost(now time.Time) time.Duration {
	f.forget(now)
	f.truce = min(max(firstTruce, 2*f.truce), longTruce)
	f.until = now.Add(f.truce)
	f.rewrites = nil
	return f.truce
}

// resting reports whether a truce is on.
func (f *fight) resting(now time.Time) bool { return now.Before(f.until) }

func (f *fight) forget(now time.Time) {
	for len(f.rewrites) > 0 && now.Sub(f.rewrites[0]) > fightWindow {
		f.rewrites = f.rewrites[1:]
	}
	if f.truce > 0 && now.Sub(f.until) > 2*f.truce {
		f.truce = 0
	}
}
