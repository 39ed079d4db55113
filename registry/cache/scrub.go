package cache

import (
	"context"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"time"

	"github.com/connected-registry/connected-registry/storage"
	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

// scrub reads stored blobs again, slowly and one after the other, until ctx
// ends: a seal tells of every change that was made, but not of a medium that has
// decayed. What is wrong goes, and is fetched again when it is asked for.
func (s *store) scrub(ctx context.Context) {
	runtime.LockOSThread() // and never unlocked: the thread ends with its priority
	idlePriority()
	limit := rate.NewLimiter(scrubRate, scrubChunk)
	buf := make([]byte, scrubChunk)
	for rest(ctx, scrubDelay) {
		began := time.Now()
		for _, d := range s.notHashedSince(began.Add(-scrubEvery)) {
			if ctx.Err() != nil {
				return
			}
			s.scrubOne(ctx, d, limit, buf)
		}
		if !rest(ctx, scrubEvery-time.Since(began)) {
			return
		}
	}
}

// rest returns false when ctx ended.
func rest(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// notHashedSince lists blobs in random order, so that restarts leave none out
// for ever.
func (s *store) notHashedSince(t time.Time) []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []digest.Digest
	for d, e := range s.index {
		if !e.partial && e.hashed < t.Unix() {
			all = append(all, d)
		}
	}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

// scrubOne leaves the order of use as it is.
func (s *store) scrubOne(ctx context.Context, d digest.Digest, limit *rate.Limiter, buf []byte) {
	f, err := os.Open(s.blobPath(d))
	if err != nil {
		return // evicted meanwhile
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !storage.Sealed(fi, d) {
		return // verified when it is used
	}
	forget(f) // what counts is what the disk says
	hash := d.Algorithm().Hash()
	for {
		if limit.WaitN(ctx, len(buf)) != nil {
			return
		}
		n, err := io.ReadFull(f, buf)
		hash.Write(buf[:n])
		if err == nil {
			continue
		}
		if err != io.EOF && err != io.ErrUnexpectedEOF {
			s.log.Warn("a stored blob cannot be read", "digest", d, "error", err)
			return
		}
		break
	}
	forget(f) // nobody asked for it
	if digest.NewDigest(d.Algorithm(), hash) != d {
		_ = s.verify(ctx, d, time.Hour) // reads it once more, and removes it
		return
	}
	s.hashedNow(d)
}

func (s *store) hashedNow(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.index[d]; e != nil {
		e.hashed = time.Now().Unix()
	}
}
