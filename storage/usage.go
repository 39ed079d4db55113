package storage

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// usageDir holds how many bytes are stored: base.json as they were counted last,
// by a walk over everything, and one file for each process with what it has added
// since, by the minute, so that nobody writes to another's file. The sum is right
// but for what was deleted since, what a crash took from a process's file, and
// the last seconds of the others; each count puts that right.
const usageDir = "usage"

const (
	usageBase    = "base.json"
	usageRefresh = 2 * time.Second // for how long others' figures are believed
	usageSave    = time.Second     // how often a process writes its own
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

// ledger keeps the usage of a Store.
type ledger struct {
	store *Store
	file  string // of this process

	mu     sync.Mutex
	own    growth    // guarded by mu
	dirty  bool      // own is not in the file; guarded by mu
	saved  time.Time // guarded by mu
	base   Usage     // guarded by mu
	others []growth  // guarded by mu
	read   time.Time // when base and others were; guarded by mu
}

func newLedger(s *Store) *ledger {
	var id [8]byte
	rand.Read(id[:])
	return &ledger{store: s, own: make(growth), file: filepath.Join(s.root, usageDir, hex.EncodeToString(id[:])+".json")}
}

// Used returns how many bytes a repository and the whole store take, from
// figures that are kept as content comes: asking costs a few small files every
// two seconds at most, or a walk over the store if nobody has counted yet.
func (s *Store) Used(ctx context.Context, repository string) (ofRepository, total int64, err error) {
	l := s.usage
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.read) > usageRefresh {
		if err := l.load(ctx); err != nil {
			return 0, 0, fmt.Errorf("finding out how much is stored: %w", err)
		}
	}
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
	return max(ofRepository, 0), max(total, 0), nil
}

// load reads what is on the storage. mu is held.
func (l *ledger) load(ctx context.Context) error {
	dir := filepath.Join(l.store.root, usageDir)
	content, err := os.ReadFile(filepath.Join(dir, usageBase))
	if err != nil || json.Unmarshal(content, &l.base) != nil {
		if ignoreAbsent(err) != nil {
			return err
		}
		l.own = make(growth) // which the count will find
		l.save()
		if l.base, err = l.store.count(ctx); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	l.others = nil
	for _, e := range entries {
		file := filepath.Join(dir, e.Name())
		if e.Name() == usageBase || file == l.file || !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		var g growth
		if content, err := os.ReadFile(file); err == nil && json.Unmarshal(content, &g) == nil {
			l.others = append(l.others, g)
		}
	}
	l.read = time.Now()
	return nil
}

// add counts bytes that have come into a repository, or into the store for "".
func (l *ledger) add(repository string, bytes int64) {
	if bytes == 0 {
		return
	}
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
	if time.Since(l.saved) > usageSave {
		l.save()
	}
}

// save writes the file of this process. mu is held.
func (l *ledger) save() {
	l.saved = time.Now()
	if err := l.store.putState(l.file, l.own); err != nil {
		l.store.log.Warn("growth of the store is not seen by other replicas until the next count", "error", err)
		return
	}
	l.dirty = false
}

func (l *ledger) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dirty {
		l.save()
	}
}

// recount counts everything and starts the figures anew from there.
func (s *Store) recount(ctx context.Context) (Usage, error) {
	s.usage.reset()
	u, err := s.count(ctx)
	if err != nil {
		return u, fmt.Errorf("counting what is stored: %w", err)
	}
	s.usage.reread()
	// The files of processes that are gone.
	_, err = s.sweepFiles(usageDir, "", u.Counted.Add(-2*time.Minute))
	return u, err
}

// reset forgets what this process added: it is about to be counted.
func (l *ledger) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.own = make(growth)
	l.save()
}

// reread has the next question answered from what is on the storage.
func (l *ledger) reread() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.read = time.Time{}
}

// count walks over everything and leaves the result on the storage.
func (s *Store) count(ctx context.Context) (Usage, error) {
	u := Usage{Repositories: make(map[string]int64), Counted: time.Now()}
	sizes := make(map[digest.Digest]int64)
	c := &collection{store: s}
	for _, root := range []string{s.limboPath(blobsRoot), s.path(blobsRoot)} {
		err := c.eachBlob(ctx, root, func(d digest.Digest) error {
			_, size, err := statFile(filepath.Join(root, strings.TrimPrefix(blobPath(d), blobsRoot)))
			if _, twice := sizes[d]; err == nil && !twice {
				sizes[d] = size
				u.Total += size
			}
			return ignoreAbsent(err)
		})
		if err != nil {
			return u, err
		}
	}
	names, err := s.allRepositories()
	if err != nil {
		return u, err
	}
	for name := range names {
		held := make(map[digest.Digest]bool)
		for _, dir := range []string{"/_layers", "/_manifests/revisions"} {
			links, err := s.links(repositoriesRoot + name + dir)
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
	return u, s.putState(filepath.Join(s.root, usageDir, usageBase), u)
}
