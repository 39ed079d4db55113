package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/connected-registry/connected-registry/storage"
	"github.com/opencontainers/go-digest"
)

// store keeps blobs as files named by their digest, under
//
//	blobs/<algorithm>/<2 hex>/<hex>     verified; sealed (package storage) a while after it came in
//	partial/<algorithm>-<hex>           the beginning of one
//	partial/<algorithm>-<hex>.state     where it can be continued from
//
// The file system is the truth: a blob is there if its file opens and its seal
// holds. The index in memory serves eviction only, and is rebuilt from the
// directory in the background. Access times are set explicitly, so that the
// order of use survives a restart on any mount.
type store struct {
	dir     string
	maxSize int64 // 0: unbounded
	minFree int64
	log     *slog.Logger
	metrics *metrics
	free    func() (int64, error) // bytes free on the file system

	// pending counts the bytes of running downloads that are promised but do
	// not take up disk space yet.
	pending atomic.Int64

	mu       sync.Mutex // guards everything below
	index    map[digest.Digest]*entry
	oldest   entry                  // sentinel of the ring: next is the oldest, prev the newest
	total    int64                  // bytes of all entries
	count    int                    // blobs, without partials
	reserved int64                  // bytes of running downloads
	writing  map[digest.Digest]bool // files of partial that are open
	checking map[digest.Digest]*check
	fresh    map[digest.Digest]fresh // verified, without a seal yet
	closing  bool
	checks   sync.WaitGroup
}

// entry is a file of the store, in the order of use.
type entry struct {
	digest     digest.Digest
	size       int64
	used       int64 // Unix seconds of the last use recorded on disk
	asked      int64 // Unix seconds when it was last read from the beginning
	hashed     int64 // Unix seconds when it was last hashed, 0 if not since the start
	readers    int32 // open handles; such an entry is not evicted
	partial    bool
	prev, next *entry
}

// check is the verification of a file whose seal is missing.
type check struct {
	done   chan struct{}
	err    error
	cancel context.CancelFunc
}

// errBusy reports a blob that is still being verified.
var errBusy = errors.New("stored content is still being verified")

func newStore(dir string, maxSize, minFree int64, log *slog.Logger, m *metrics) (*store, error) {
	for _, sub := range []string{"blobs", "partial"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, err
		}
	}
	s := &store{
		dir: dir, maxSize: maxSize, minFree: minFree, log: log, metrics: m,
		free:     func() (int64, error) { return diskFree(dir) },
		index:    make(map[digest.Digest]*entry),
		writing:  make(map[digest.Digest]bool),
		checking: make(map[digest.Digest]*check),
		fresh:    make(map[digest.Digest]fresh),
	}
	s.oldest.prev, s.oldest.next = &s.oldest, &s.oldest
	return s, nil
}

func (s *store) blobPath(d digest.Digest) string {
	hex := d.Encoded()
	return filepath.Join(s.dir, "blobs", d.Algorithm().String(), hex[:2], hex)
}

func (s *store) partialPath(d digest.Digest) string {
	return filepath.Join(s.dir, "partial", d.Algorithm().String()+"-"+d.Encoded())
}

// blob is an open, verified file of the store. It cannot be evicted until it
// is closed.
type blob struct {
	*os.File
	size  int64
	store *store
	entry *entry
}

func (b *blob) Close() error {
	b.store.mu.Lock()
	b.entry.readers--
	b.store.mu.Unlock()
	return b.File.Close()
}

// open returns the blob of d. Errors: fs.ErrNotExist if it is not stored, or
// was and turned out to be damaged; errBusy if verifying it takes longer than
// patience; else what reading the disk reported.
func (s *store) open(ctx context.Context, d digest.Digest, patience time.Duration) (*blob, error) {
	for {
		f, err := os.Open(s.blobPath(d))
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				s.dropMissing(d)
			}
			return nil, err
		}
		fi, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if s.trusted(fi, d) {
			e := s.use(d, fi.Size(), f)
			return &blob{File: f, size: fi.Size(), store: s, entry: e}, nil
		}
		f.Close()
		if err := s.verify(ctx, d, patience); err != nil {
			return nil, err
		}
	}
}

// has reports whether there is a file for d, right or not.
func (s *store) has(d digest.Digest) bool {
	_, err := os.Lstat(s.blobPath(d))
	return err == nil
}

// doubtful reports whether a blob that is about to be read from the beginning
// was so a moment ago. containerd keeps what it gets, so it asks twice when
// the bytes were wrong: a seal does not tell of a decayed medium. What was
// hashed of late is not doubted.
func (s *store) doubtful(d digest.Digest) bool {
	now := time.Now().Unix()
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.index[d]
	if e == nil {
		return false
	}
	again := now-e.asked < int64(doubtWindow/time.Second)
	e.asked = now
	return again && now-e.hashed >= int64(doubtEvery/time.Second)
}

// verify hashes the file of d, once however many ask, and removes it if it is
// wrong: then the error is fs.ErrNotExist. errBusy: that takes longer than
// patience.
func (s *store) verify(ctx context.Context, d digest.Digest, patience time.Duration) error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return errBusy
	}
	c := s.checking[d]
	if c == nil {
		background, cancel := context.WithCancel(context.WithoutCancel(ctx))
		c = &check{done: make(chan struct{}), cancel: cancel}
		s.checking[d] = c
		s.checks.Go(func() {
			defer cancel()
			c.err = s.reverify(background, d)
			s.mu.Lock()
			delete(s.checking, d)
			s.mu.Unlock()
			close(c.done)
		})
	}
	s.mu.Unlock()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-c.done:
		return c.err
	case <-timer.C:
		return errBusy
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *store) reverify(ctx context.Context, d digest.Digest) error {
	path := s.blobPath(d)
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err = storage.Verify(ctx, f, d); errors.Is(err, storage.ErrCorrupt) {
		s.metrics.corrupt.WithLabelValues("store").Inc()
		return s.discard(d, path, err)
	}
	if err != nil {
		return err
	}
	if fi, err := f.Stat(); err != nil || !storage.Sealed(fi, d) {
		// Not ours to mark, so that every use would hash it again.
		return s.discard(d, path, errors.New("it cannot be sealed"))
	}
	s.hashedNow(d)
	return nil
}

func (s *store) discard(d digest.Digest, path string, why error) error {
	s.log.Warn("a stored blob was removed and will be fetched again", "digest", d, "reason", why)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing a damaged blob: %w", err)
	}
	s.dropMissing(d)
	return fs.ErrNotExist
}

// use moves d to the newest place, entering it if need be, and takes a handle.
func (s *store) use(d digest.Digest, size int64, f *os.File) *entry {
	now := time.Now()
	s.mu.Lock()
	e := s.enter(d, size, 0)
	s.toFront(e)
	e.readers++
	record := e.due(now)
	s.mu.Unlock()
	if record {
		// The zero time leaves the seal alone. If this does not work, the order
		// of use is lost at a restart, no more.
		_ = os.Chtimes(f.Name(), now, time.Time{})
	}
	return e
}

// touch marks d as used, without opening it.
func (s *store) touch(d digest.Digest) {
	now := time.Now()
	s.mu.Lock()
	e := s.index[d]
	record := false
	if e != nil && !e.partial {
		s.toFront(e)
		record = e.due(now)
	}
	s.mu.Unlock()
	if record {
		_ = os.Chtimes(s.blobPath(d), now, time.Time{})
	}
}

// due reports whether the use of e at now is to be recorded on disk.
func (e *entry) due(now time.Time) bool {
	if (now.Unix()-e.used < int64(touchEvery/time.Second)) && now.Unix() >= e.used {
		return false
	}
	e.used = now.Unix()
	return true
}

// enter returns the entry of a stored blob. s.mu is held.
func (s *store) enter(d digest.Digest, size, used int64) *entry {
	e := s.index[d]
	if e == nil {
		e = &entry{digest: d, used: used}
		s.index[d] = e
		s.count++
		s.link(e, &s.oldest)
	} else if e.partial {
		e.partial = false
		s.count++
	}
	s.total += size - e.size
	e.size = size
	return e
}

// link puts e before next in the ring. s.mu is held.
func (s *store) link(e, next *entry) {
	e.prev, e.next = next.prev, next
	e.prev.next, e.next.prev = e, e
}

func unlink(e *entry) {
	e.prev.next, e.next.prev = e.next, e.prev
	e.prev, e.next = nil, nil
}

func (s *store) toFront(e *entry) {
	unlink(e)
	s.link(e, &s.oldest)
}

// remove takes e out of the index. s.mu is held.
func (s *store) remove(e *entry) {
	delete(s.index, e.digest)
	unlink(e)
	s.total -= e.size
	if !e.partial {
		s.count--
	}
}

// dropMissing takes a blob whose file has gone out of the index. An entry with
// open handles stays until they are closed and it is looked for again.
func (s *store) dropMissing(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.index[d]; e != nil && !e.partial && e.readers == 0 {
		s.remove(e)
	}
}

// scan enters the blobs on disk into the index, oldest use first.
func (s *store) scan(ctx context.Context) error {
	found, err := s.list(ctx)
	if err != nil {
		return fmt.Errorf("listing the store: %w", err)
	}
	slices.SortFunc(found, func(a, b *entry) int { return int(a.used - b.used) })
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range slices.Backward(found) { // each before all others, so the oldest last
		if s.index[e.digest] == nil {
			s.index[e.digest] = e
			s.total += e.size
			s.count++
			s.link(e, s.oldest.next)
		}
	}
	return nil
}

func (s *store) list(ctx context.Context) ([]*entry, error) {
	var found []*entry
	root := filepath.Join(s.dir, "blobs")
	algorithms, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	for _, alg := range algorithms {
		fans, _ := os.ReadDir(filepath.Join(root, alg.Name())) // not a directory: not ours
		for _, fan := range fans {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			files, _ := os.ReadDir(filepath.Join(root, alg.Name(), fan.Name()))
			for _, f := range files {
				d := digest.Digest(alg.Name() + ":" + f.Name())
				if d.Validate() != nil || d.Encoded()[:2] != fan.Name() {
					continue
				}
				fi, err := f.Info()
				if err != nil || !fi.Mode().IsRegular() {
					continue
				}
				found = append(found, &entry{digest: d, size: fi.Size(), used: accessTime(fi)})
			}
		}
	}
	return found, nil
}

// close ends the verifications under way.
func (s *store) close() {
	s.mu.Lock()
	s.closing = true
	for _, c := range s.checking {
		c.cancel()
	}
	s.mu.Unlock()
	s.checks.Wait()
}

// usage is what the store holds.
func (s *store) usage() (bytes int64, blobs int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total, s.count
}
