package storage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
)

// scrubFile remembers how far scrubbing has come, so that a store which takes
// days to read is read to its end.
const scrubFile = "scrub.json"

// Scrubbed says what scrubbing read.
type Scrubbed struct {
	Blobs    int
	Bytes    int64
	Corrupt  int  // blobs that were set aside; see Store.Damaged
	Finished bool // everything has been read since it was last begun
}

type scrubState struct {
	After digest.Digest `json:"after"` // the last blob that was read
}

// scrub hashes stored blobs, whatever their seals say, from where it stopped last
// on, at up to rate bytes per second, until it has seen all or ctx ends.
func (s *Store) scrub(ctx context.Context, rate int64) (Scrubbed, error) {
	var sum Scrubbed
	file := filepath.Join(s.root, scrubFile)
	var state scrubState
	if content, err := os.ReadFile(file); err == nil {
		_ = json.Unmarshal(content, &state) // from the beginning, then
	}
	saved := time.Now()
	pace := newPacer(ctx, rate)
	c := &collection{store: s}
	err := c.eachBlob(ctx, s.path(blobsRoot), func(d digest.Digest) error {
		if d <= state.After { // both in the order of the directories
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, corrupt, err := s.scrubBlob(ctx, d, pace)
		if err != nil {
			return err
		}
		sum.Blobs++
		sum.Bytes += n
		if corrupt {
			sum.Corrupt++
		}
		state.After = d
		if time.Since(saved) > time.Minute {
			saved = time.Now()
			return s.putState(file, state)
		}
		return nil
	})
	if err == nil {
		sum.Finished = true
		return sum, ignoreAbsent(os.Remove(file))
	}
	if state.After != "" {
		err = errors.Join(err, s.putState(file, state))
	}
	if ctx.Err() == nil {
		return sum, fmt.Errorf("scrubbing: %w", err)
	}
	return sum, nil // its time is up; it goes on next time
}

// scrubBlob hashes one blob. What is corrupt is set aside.
func (s *Store) scrubBlob(ctx context.Context, d digest.Digest, pace func(n int)) (size int64, corrupt bool, err error) {
	path := s.path(blobPath(d))
	if err := sweepTemporary(filepath.Dir(path)); err != nil {
		return 0, false, err
	}
	f, err := os.Open(path)
	if err != nil {
		return 0, false, ignoreAbsent(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return 0, false, err
	}
	dropCache(f)
	err = hashFile(ctx, f, d, pace)
	switch {
	case errors.Is(err, ErrCorrupt):
		if err := s.quarantine(d, path, f); !errors.Is(err, fs.ErrNotExist) {
			return 0, false, err
		}
		return fi.Size(), true, nil
	case errors.Is(err, errUnstable):
		return 0, false, nil // not at rest: it is hashed by whoever reads it
	}
	return fi.Size(), false, err
}

// putState replaces a small file in one step. Losing it in a power failure costs
// some work and nothing else.
func (s *Store) putState(file string, v any) error {
	content, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Join(s.root, usageDir), ".new-*")
	if err != nil {
		return err
	}
	_, err = tmp.Write(content)
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), file)
	}
	if err != nil {
		os.Remove(tmp.Name())
	}
	return err
}

// newPacer returns a function that, told of bytes that were read, waits for as
// long as keeps them below rate bytes per second.
func newPacer(ctx context.Context, rate int64) func(n int) {
	begun, read := time.Now(), int64(0)
	return func(n int) {
		read += int64(n)
		due := time.Duration(float64(read) / float64(rate) * float64(time.Second))
		if early := due - time.Since(begun); early > 10*time.Millisecond {
			sleep(ctx, early)
		}
	}
}
