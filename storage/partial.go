package storage

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// partialDir holds content that is on its way in, beside the tree: one file with
// the bytes where they belong, one that says which of them are there.
const partialDir = "partial"

const stateSuffix = ".state"

// ErrBusy is wrapped by the error for a Partial or an upload that somebody else
// writes to, here or on another machine.
var ErrBusy = errors.New("it is being written by another")

// Partial is content on its way into the store. It comes in chunks, which may be
// written at once by one goroutine each, in any order; the digest is computed in
// order behind them. What is written stays when the process dies, and is found by
// whoever opens the same digest next, on whichever machine: each chunk is
// recorded with a checksum of what is there of it, so that bytes which a power
// failure took are found missing then and not when all the rest has come.
//
// It lies in a directory, and takes no more space than the content itself, which is
// renamed into place there.
type Partial struct {
	store  *Store
	digest digest.Digest
	size   int64
	chunk  int64 // bytes of every chunk but the last

	data, state *os.File

	mu     sync.Mutex
	more   sync.Cond // marks have changed, or closed has
	marks  []mark    // guarded by mu; one goroutine at a time changes each
	closed bool      // guarded by mu

	hash    hash.Hash
	hashed  chan struct{} // closed when hash has seen all, or will see no more
	hashErr error         // to be read when hashed is closed
}

// A chunk's mark is saved when so many bytes have come since, or so much time
// has passed: what a kill can cost.
const (
	saveBytes = 64 << 10
	saveTime  = 50 * time.Millisecond
)

// OpenPartial opens the content of d, of size bytes, for writing in chunks of the
// given size, or of the size that it was begun with. It reads, and compares with
// their checksums, the bytes that are there from before. The caller closes it.
//
// Errors: ErrBusy, and what the file system reported.
func (s *Store) OpenPartial(d digest.Digest, size, chunk int64) (*Partial, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", d, err)
	}
	if size < 0 || chunk < 1 {
		return nil, fmt.Errorf("content %s of %d bytes in chunks of %d", d, size, chunk)
	}
	if s.root == "" {
		return nil, fmt.Errorf("content %s: a directory is needed to receive it in", d)
	}
	chunk = max(chunk, size/maxChunks+1)
	data, err := s.lockPartial(d)
	if err != nil {
		return nil, err
	}
	state, err := os.OpenFile(data.Name()+stateSuffix, os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		data.Close()
		return nil, err
	}
	p := &Partial{store: s, digest: d, size: size, chunk: chunk, data: data, state: state, hash: d.Algorithm().Hash(), hashed: make(chan struct{})}
	p.more.L = &p.mu
	if err := p.recall(); err != nil {
		data.Close()
		state.Close()
		return nil, err
	}
	go p.follow()
	return p, nil
}

func (s *Store) partialPath(d digest.Digest) string {
	return filepath.Join(s.root, partialDir, d.Algorithm().String()+"-"+d.Encoded())
}

// lockPartial opens the file for d for this process alone, where the file system
// has locks.
func (s *Store) lockPartial(d digest.Digest) (*os.File, error) {
	path := s.partialPath(d)
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o666)
		if errors.Is(err, fs.ErrNotExist) { // Root may be lost while content is elsewhere
			if err = os.MkdirAll(filepath.Dir(path), 0o777); err == nil {
				f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o666)
			}
		}
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("content %s: %w", d, ErrBusy)
		}
		// Whoever had it before may have put it in its place meanwhile.
		mine, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if now, err := os.Stat(path); err == nil && os.SameFile(mine, now) {
			return f, nil
		}
		f.Close()
	}
}

const bufferSize = 256 << 10

// length is how many bytes a chunk has when it is whole.
func (p *Partial) length(chunk int) int64 {
	return min(p.chunk, p.size-int64(chunk)*p.chunk)
}

// Chunks is how many chunks there are.
func (p *Partial) Chunks() int { return len(p.marks) }

// Missing says which part of a chunk is missing: length bytes from offset on,
// counted from the beginning of the content. 0: the chunk is whole.
func (p *Partial) Missing(chunk int) (offset, length int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.marks[chunk].n
	return int64(chunk)*p.chunk + n, p.length(chunk) - n
}

// Present is how many bytes are there.
func (p *Partial) Present() (n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.marks {
		n += m.n
	}
	return n
}

// Write appends to what is there of a chunk. One goroutine at a time writes to
// the same chunk. What does not fit the chunk is refused.
func (p *Partial) Write(chunk int, b []byte) error {
	p.mu.Lock()
	m := p.marks[chunk]
	p.mu.Unlock()
	if int64(len(b)) > p.length(chunk)-m.n {
		return fmt.Errorf("writing %s: %d bytes for the %d that chunk %d lacks", p.digest, len(b), p.length(chunk)-m.n, chunk)
	}
	if _, err := p.data.WriteAt(b, int64(chunk)*p.chunk+m.n); err != nil {
		return err
	}
	m.n += int64(len(b))
	m.sum = crc32.Update(m.sum, castagnoli, b)
	now := time.Now()
	var err error
	if m.n-m.saved >= saveBytes || now.Sub(m.when) >= saveTime || m.n == p.length(chunk) {
		m.saved, m.when = m.n, now
		err = p.save(chunk, m)
	}
	p.mu.Lock()
	p.marks[chunk] = m
	p.mu.Unlock()
	p.more.Broadcast()
	return err
}

// follow hashes what is there, in order, as it comes.
func (p *Partial) follow() {
	defer close(p.hashed)
	buf := make([]byte, min(bufferSize, max(p.size, 1)))
	for at := int64(0); at < p.size; {
		end := p.await(at)
		if end == at {
			return
		}
		for at < end {
			n, err := p.data.ReadAt(buf[:min(end-at, int64(len(buf)))], at)
			if n == 0 {
				p.hashErr = shortened(err)
				return
			}
			p.hash.Write(buf[:n])
			at += int64(n)
		}
	}
}

// shortened is why bytes that were written cannot be read.
func shortened(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// await returns how far the content is there without a gap once that is further
// than at. It is at when nothing more will come.
func (p *Partial) await(at int64) (end int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		for i := at / p.chunk; i < int64(len(p.marks)); i++ {
			end = i*p.chunk + p.marks[i].n
			if p.marks[i].n < p.length(int(i)) {
				break
			}
		}
		if p.closed {
			return at
		}
		if end > at {
			return end
		}
		p.more.Wait()
	}
}

// Commit verifies the content against its digest, seals it and puts it where it
// belongs, durably; then it closes the Partial. After an error that is still
// open, for Discard or Close.
//
// Errors: one that wraps ErrCorrupt when it is not the content of the digest,
// io.ErrUnexpectedEOF when some is missing; the cause of ctx; what the file system
// reported.
func (p *Partial) Commit(ctx context.Context) error {
	if p.Present() < p.size {
		return fmt.Errorf("content %s: %w", p.digest, io.ErrUnexpectedEOF)
	}
	select {
	case <-p.hashed:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if p.hashErr != nil {
		return p.hashErr
	}
	if actual := digest.NewDigest(p.digest.Algorithm(), p.hash); actual != p.digest {
		return fmt.Errorf("%w: expected %s, got %s", ErrCorrupt, p.digest, actual)
	}
	if err := p.store.medium.takeBlob(ctx, p.digest, p.data); err != nil {
		return err
	}
	p.store.usage.add(ctx, "", p.size)
	os.Remove(p.state.Name()) // without its data it says nothing
	return p.Close()
}

// Discard closes the Partial and throws away what is there of it.
func (p *Partial) Discard() error {
	// The lock is held until the files are gone.
	err := errors.Join(os.Remove(p.state.Name()), os.Remove(p.data.Name()))
	return errors.Join(err, p.Close())
}

// Close keeps what is there for whoever opens the Partial next. It may be called
// again.
func (p *Partial) Close() error {
	p.mu.Lock()
	again := p.closed
	p.closed = true
	marks := slices.Clone(p.marks)
	p.mu.Unlock()
	if again {
		return nil
	}
	p.more.Broadcast()
	<-p.hashed
	var err error
	for i, m := range marks {
		if m.saved < m.n {
			err = errors.Join(err, p.save(i, m))
		}
	}
	return errors.Join(err, p.state.Close(), p.data.Close())
}

// RemovePartials throws away what was begun and nobody has open. It returns how
// many bytes that frees.
func (s *Store) RemovePartials() (freed int64, err error) {
	if s.root == "" {
		return 0, nil
	}
	entries, err := os.ReadDir(filepath.Join(s.root, partialDir))
	err = ignoreAbsent(err)
	for _, e := range entries {
		name, _ := strings.CutSuffix(e.Name(), stateSuffix)
		algorithm, hex, _ := strings.Cut(name, "-")
		d := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), hex)
		if d.Validate() != nil {
			continue // none of ours
		}
		f, lockErr := s.lockPartial(d)
		if errors.Is(lockErr, ErrBusy) {
			continue
		}
		if lockErr != nil {
			err = errors.Join(err, lockErr)
			continue
		}
		if fi, statErr := f.Stat(); statErr == nil {
			freed += fi.Size()
		}
		for _, file := range []string{f.Name() + stateSuffix, f.Name()} {
			if rmErr := os.Remove(file); !errors.Is(rmErr, fs.ErrNotExist) {
				err = errors.Join(err, rmErr)
			}
		}
		f.Close()
	}
	return freed, err
}
