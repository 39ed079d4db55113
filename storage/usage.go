package storage

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// usageDir holds how many bytes are stored: base.json as they were counted last,
// by a walk over everything, and one note for each process with what it has added
// since, by the minute, so that nobody writes to another's. The sum is right
// but for what was deleted since, what came while it was counted, which may count
// twice, what a crash took from a process's own, and the last seconds of the
// others; each count puts that right.
const usageDir = "usage"

const (
	usageBase    = "base.json"
	usageSave    = time.Second      // how often a process writes its own, on a directory
	usageSaveFar = 10 * time.Second // the same on an object store
	usageTimeout = 5 * time.Second  // for how long it tries to
)

// Usage is how many bytes are stored.
type Usage struct {
	// Total is of all distinct content.
	Total int64 `json:"total"`
	// Repositories is of each repository's distinct content, by name. What two
	// of them share counts for both.
	Repositories map[string]int64 `json:"repositories"`
	// Counted is when the count began that this is based on.
	Counted time.Time `json:"counted"`
}

// growth is what was added, by minute of the Unix epoch and repository; "" is
// the total.
type growth map[int64]map[string]int64

// ledger keeps the usage of a Store. Its lock is held for no longer than a sum takes:
// neither while what is on the storage is read, or counted, nor while it is written.
type ledger struct {
	store *Store
	name  string        // of this process's note
	every time.Duration // how often that is written; others' are believed for twice that

	loading chan struct{} // holds a value while somebody reads base and others
	saving  sync.Mutex    // held while this process's note is written: the last to come is the latest

	mu     sync.Mutex
	own    growth      // guarded by mu
	dirty  bool        // own is not in the file; guarded by mu
	saved  time.Time   // guarded by mu
	later  *time.Timer // will save it, nil: nothing waits for that; guarded by mu
	base   Usage       // guarded by mu
	others []growth    // guarded by mu
	read   time.Time   // when base and others were; guarded by mu
}

func newLedger(s *Store, every time.Duration) *ledger {
	var id [8]byte
	rand.Read(id[:])
	return &ledger{store: s, every: every, own: make(growth), loading: make(chan struct{}, 1), name: hex.EncodeToString(id[:]) + ".json"}
}

// Used returns how many bytes a repository and the whole store take, from
// figures that are kept as content comes: asking costs a few small files every
// few seconds at most, or a walk over the store if nobody has counted yet.
func (s *Store) Used(ctx context.Context, repository string) (ofRepository, total int64, err error) {
	if err := s.usage.refresh(ctx); err != nil {
		return 0, 0, fmt.Errorf("finding out how much is stored: %w", err)
	}
	ofRepository, total = s.usage.sum(repository)
	return max(ofRepository, 0), max(total, 0), nil
}

func (l *ledger) sum(repository string) (ofRepository, total int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ofRepository, total = l.base.Repositories[repository], l.base.Total
	since := l.base.Counted.Unix() / 60
	for _, g := range append(l.others, l.own) {
		for minute, added := range g {
			if minute >= since {
				ofRepository += added[repository]
				total += added[""]
			}
		}
	}
	return ofRepository, total
}

// refresh reads what is on the storage, if that was a while ago. One at a time
// does, and the others wait for it.
func (l *ledger) refresh(ctx context.Context) error {
	if l.fresh() {
		return nil
	}
	select {
	case l.loading <- struct{}{}:
		defer func() { <-l.loading }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if l.fresh() {
		return nil
	}
	base, err := l.readBase(ctx)
	if err != nil {
		return err
	}
	others, err := l.readOthers(ctx)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.base, l.others, l.read = base, others, time.Now()
	return nil
}

func (l *ledger) fresh() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Since(l.read) <= 2*l.every
}

// readBase reads what was counted last, or counts.
func (l *ledger) readBase(ctx context.Context) (base Usage, err error) {
	content, err := l.store.medium.readNote(ctx, usageDir+"/"+usageBase)
	if err == nil && json.Unmarshal(content, &base) == nil {
		return base, nil
	}
	if ignoreAbsent(err) != nil {
		return base, err
	}
	l.reset(ctx)
	return l.store.count(ctx)
}

// readOthers reads what other processes have added.
func (l *ledger) readOthers(ctx context.Context) (others []growth, err error) {
	medium := l.store.medium
	notes, err := medium.listNotes(ctx, usageDir)
	for _, n := range notes {
		if n.name == usageBase || n.name == l.name || !strings.HasSuffix(n.name, ".json") {
			continue
		}
		var g growth
		if content, err := medium.readNote(ctx, usageDir+"/"+n.name); err == nil && json.Unmarshal(content, &g) == nil {
			others = append(others, g)
		}
	}
	return others, err
}

// add counts bytes that have come into a repository, or into the store for "".
func (l *ledger) add(ctx context.Context, repository string, bytes int64) {
	if bytes != 0 && l.note(repository, bytes) {
		l.save(ctx)
	}
}

// note takes note of bytes, and reports whether it is time to write.
func (l *ledger) note(repository string, bytes int64) (due bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	minute := time.Now().Unix() / 60
	if l.own[minute] == nil {
		l.own[minute] = make(map[string]int64)
		since := l.base.Counted.Unix() / 60
		for old := range l.own {
			if old < since {
				delete(l.own, old)
			}
		}
	}
	l.own[minute][repository] += bytes
	l.dirty = true
	since := time.Since(l.saved)
	if since > l.every {
		l.saved = time.Now() // by this one
		return true
	}
	if l.later == nil {
		l.later = time.AfterFunc(l.every-since, l.saveLate)
	}
	return false
}

// saveLate writes what nobody has written who came after.
func (l *ledger) saveLate() {
	l.mu.Lock()
	closed := l.later == nil
	l.later = nil
	l.mu.Unlock()
	if !closed {
		l.save(context.Background())
	}
}

// save writes the note of this process, if it says anything new.
func (l *ledger) save(ctx context.Context) {
	l.saving.Lock()
	defer l.saving.Unlock()
	l.mu.Lock()
	content, err := json.Marshal(l.own)
	dirty := l.dirty
	l.saved, l.dirty = time.Now(), false
	l.mu.Unlock()
	if !dirty {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), usageTimeout)
	defer cancel()
	if err == nil {
		err = l.store.medium.writeNote(ctx, usageDir+"/"+l.name, content, false)
	}
	if err != nil {
		l.store.log.Warn("growth of the store is not seen by other replicas until the next count", "error", err)
		l.mu.Lock()
		defer l.mu.Unlock()
		l.dirty = true
	}
}

func (l *ledger) close() {
	l.mu.Lock()
	if l.later != nil {
		l.later.Stop()
		l.later = nil
	}
	l.mu.Unlock()
	l.save(context.Background())
}

// recount counts everything and starts the figures anew from there.
func (s *Store) recount(ctx context.Context) (Usage, error) {
	s.usage.reset(ctx)
	u, err := s.count(ctx)
	if err != nil {
		return u, fmt.Errorf("counting what is stored: %w", err)
	}
	s.usage.reread()
	return u, s.forgetUsage(ctx, u.Counted.Add(-2*time.Minute))
}

// forgetUsage removes the notes of processes that are gone.
func (s *Store) forgetUsage(ctx context.Context, then time.Time) error {
	notes, err := s.medium.listNotes(ctx, usageDir)
	for _, n := range notes {
		if saved, modErr := n.modified(); modErr == nil && !saved.After(then) {
			err = errors.Join(err, s.medium.removeNote(ctx, usageDir+"/"+n.name))
		}
	}
	return err
}

// reset forgets what this process added: it is about to be counted.
func (l *ledger) reset(ctx context.Context) {
	l.mu.Lock()
	l.own, l.dirty = make(growth), true
	l.mu.Unlock()
	l.save(ctx)
}

// reread has the next question answered from what is on the storage.
func (l *ledger) reread() {
	l.loading <- struct{}{} // whoever reads it now may read what was there before
	defer func() { <-l.loading }()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.read = time.Time{}
}

// count walks over everything and leaves the result on the storage.
func (s *Store) count(ctx context.Context) (Usage, error) {
	u := Usage{Repositories: make(map[string]int64), Counted: time.Now()}
	sizes := make(map[digest.Digest]int64)
	for b, err := range s.medium.blobs(ctx, true) {
		if err != nil {
			return u, err
		}
		if _, twice := sizes[b.digest]; !twice {
			sizes[b.digest] = b.size
			u.Total += b.size
		}
	}
	names, err := s.medium.repositories(ctx)
	if err != nil {
		return u, err
	}
	for _, name := range names {
		held := make(map[digest.Digest]bool)
		for _, dir := range []string{"/_layers", "/_manifests/revisions"} {
			links, err := s.medium.links(ctx, repositoriesRoot+name+dir)
			if err != nil {
				return u, err
			}
			for _, l := range links {
				if !held[l.target] {
					held[l.target] = true
					u.Repositories[name] += sizes[l.target]
				}
			}
		}
	}
	return u, s.putState(ctx, usageDir+"/"+usageBase, u)
}
