package storage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
	var state scrubState
	if content, err := s.medium.readNote(ctx, scrubFile); err == nil {
		_ = json.Unmarshal(content, &state) // from the beginning, then
	}
	saved := time.Now()
	pace := newPacer(ctx, rate)
	err := s.scrubAfter(ctx, state.After, func(d digest.Digest) error {
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
			return s.putState(ctx, scrubFile, state)
		}
		return nil
	})
	if err == nil {
		sum.Finished = true
		return sum, s.medium.removeNote(ctx, scrubFile)
	}
	if state.After != "" {
		err = errors.Join(err, s.putState(context.WithoutCancel(ctx), scrubFile, state))
	}
	if ctx.Err() == nil {
		return sum, fmt.Errorf("scrubbing: %w", err)
	}
	return sum, nil // its time is up; it goes on next time
}

// scrubAfter visits the blobs that come after one.
func (s *Store) scrubAfter(ctx context.Context, after digest.Digest, visit func(d digest.Digest) error) error {
	for b, err := range s.medium.blobs(ctx, false) {
		if err == nil && (b.digest <= after || !b.condemned.IsZero()) {
			continue
		}
		if err == nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if err == nil {
			err = visit(b.digest)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// scrubBlob hashes one blob. What is corrupt is set aside.
func (s *Store) scrubBlob(ctx context.Context, d digest.Digest, pace func(n int)) (size int64, corrupt bool, err error) {
	c, err := s.medium.scrubBlob(ctx, d, pace)
	if err == nil && c.aside != "" {
		_ = s.setAside(ctx, d, c)
	}
	if err != nil {
		return 0, false, ignoreAbsent(err)
	}
	return c.size, c.aside != "", nil
}

// putState replaces a note. Losing it in a power failure costs some work and
// nothing else.
func (s *Store) putState(ctx context.Context, name string, v any) error {
	content, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.medium.writeNote(ctx, name, content, false)
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
