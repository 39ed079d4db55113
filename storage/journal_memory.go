package storage

import (
	"slices"
	"sync"
)

// maxEntries is how many entries of the journal are remembered: some megabytes.
const maxEntries = 10_000

// entryMemory remembers entries of the journal. While the parent cannot be reached,
// the same ones are looked at every second, and what one says does not change.
type entryMemory struct {
	mu      sync.Mutex
	entries map[string]Entry // by ID; guarded by mu
}

func (m *entryMemory) get(id string) (e Entry, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok = m.entries[id]
	return e, ok
}

func (m *entryMemory) put(e Entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.entries == nil {
		m.entries = make(map[string]Entry)
	}
	if len(m.entries) < maxEntries {
		m.entries[e.ID] = e
	}
}

// keep forgets the entries that are not among the notes with these names, sorted.
func (m *entryMemory) keep(names []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id := range m.entries {
		_, settled := slices.BinarySearch(names, id+journalSuffix)
		_, pending := slices.BinarySearch(names, id+pendingSuffix)
		if !settled && !pending {
			delete(m.entries, id)
		}
	}
}
