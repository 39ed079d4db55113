package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// errNoSpace reports that a blob cannot be stored within the bounds.
var errNoSpace = errors.New("no room within the size and free-space limits")

// reserve makes room for a download of size bytes, evicting what was not used
// for longest. Each reserve is followed by one release.
func (s *store) reserve(size int64) error {
	free, err := s.free()
	if err != nil {
		return fmt.Errorf("asking for free disk space: %w", err)
	}
	victims, err := s.planRoom(size, free)
	for _, v := range victims {
		s.delete(v)
	}
	return err
}

// planRoom reserves size bytes and takes what has to go for them out of the
// index. It takes nothing when even that would not be enough.
func (s *store) planRoom(size, free int64) ([]*entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	excess := s.pending.Load() + size + s.minFree - free
	if s.maxSize > 0 {
		excess = max(excess, s.total+s.reserved+size-s.maxSize)
	}
	victims, freed := s.leastUsed(excess)
	if freed < excess {
		return nil, errNoSpace
	}
	for _, v := range victims {
		s.remove(v)
	}
	s.reserved += size
	s.pending.Add(size)
	return victims, nil
}

// leastUsed lists entries to evict for n bytes. s.mu is held.
func (s *store) leastUsed(n int64) (victims []*entry, freed int64) {
	for e := s.oldest.next; e != &s.oldest && freed < n; e = e.next {
		if e.readers == 0 {
			victims = append(victims, e)
			freed += e.size
		}
	}
	return victims, freed
}

// delete removes the files of an entry that has left the index.
func (s *store) delete(e *entry) {
	path := s.blobPath(e.digest)
	if e.partial {
		path = s.partialPath(e.digest)
		os.Remove(path + stateSuffix)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("cannot remove an evicted blob", "digest", e.digest, "error", err)
		return
	}
	s.metrics.evicted.Inc()
	s.metrics.evictedBytes.Add(float64(e.size))
}

// trim evicts until the bounds hold again, as far as it can.
func (s *store) trim() {
	free, err := s.free()
	if err != nil {
		s.log.Warn("cannot ask for free disk space", "error", err)
		return
	}
	s.mu.Lock()
	excess := s.pending.Load() + s.minFree - free
	if s.maxSize > 0 {
		excess = max(excess, s.total+s.reserved-s.maxSize)
	}
	victims, _ := s.leastUsed(excess)
	for _, v := range victims {
		s.remove(v)
	}
	s.mu.Unlock()
	for _, v := range victims {
		s.delete(v)
	}
}
