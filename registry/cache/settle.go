package cache

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"time"

	"github.com/connected-registry/connected-registry/storage"
	"github.com/opencontainers/go-digest"
)

// A blob that has just come in is not flushed to the disk and sealed at once:
// containerd is about to flush the same bytes on the same disk, and a pull would
// take twice its time. Until then it is trusted while its file stays as it was
// written, by this process only. After a crash it bears no seal, and is hashed
// before it is used.

// fresh is a verified file that is not sealed yet.
type fresh struct {
	size    int64
	modTime time.Time
	at      time.Time // when it came in
}

const (
	// settleAfter is when a blob is flushed and sealed: by then the kernel has
	// written most of it of its own accord.
	settleAfter = 45 * time.Second

	// settleEvery is how often is looked, and settleGrace how long at the end.
	settleEvery = 5 * time.Second
	settleGrace = time.Second
)

// trust makes the file f, which is verified content of d, count as sealed as long
// as nobody writes to it.
func (s *store) trust(f *os.File, d digest.Digest) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fresh[d] = fresh{fi.Size(), fi.ModTime(), time.Now()}
	return nil
}

// trusted reports whether fi, of an open file, is that of verified content of d.
func (s *store) trusted(fi fs.FileInfo, d digest.Digest) bool {
	if storage.Sealed(fi, d) {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	known, ok := s.fresh[d]
	return ok && fi.Mode().IsRegular() && fi.Size() == known.size && fi.ModTime().Equal(known.modTime)
}

// settle seals what has come in until ctx ends.
func (s *store) settle(ctx context.Context) {
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.sealBefore(ctx, time.Now().Add(-settleAfter))
		case <-ctx.Done():
			return
		}
	}
}

// settleLast seals in a moment what it can of the rest.
func (s *store) settleLast() {
	ctx, cancel := context.WithTimeout(context.Background(), settleGrace)
	defer cancel()
	s.sealBefore(ctx, time.Now())
}

func (s *store) sealBefore(ctx context.Context, t time.Time) {
	var due []digest.Digest
	s.mu.Lock()
	for d, f := range s.fresh {
		if !f.at.After(t) {
			due = append(due, d)
		}
	}
	s.mu.Unlock()
	for _, d := range due {
		if ctx.Err() != nil {
			return
		}
		if err := s.seal(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			_ = s.discard(d, s.blobPath(d), err)
		}
		s.mu.Lock()
		delete(s.fresh, d)
		s.mu.Unlock()
	}
}

func (s *store) seal(d digest.Digest) error {
	f, err := os.Open(s.blobPath(d))
	if err != nil {
		return err // evicted meanwhile, or not renamed yet
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || storage.Sealed(fi, d) || !s.trusted(fi, d) {
		return err // what was written to is hashed when it is used
	}
	return storage.Seal(f, d)
}
