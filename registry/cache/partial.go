package cache

import (
	"context"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// partial is a blob that is being written. Its bytes count as reserved in the
// store until it ends in exactly one of commit, suspend and abandon.
type partial struct {
	*os.File
	store   *store
	digest  digest.Digest
	size    int64 // of the whole blob
	pending int64 // of these, not on disk yet
	offset  int64 // written and hashed
	saved   int64 // offset of the last checkpoint
	hash    hash.Hash
}

const stateSuffix = ".state"

// checkpoint is where a download can be continued from. State is the hash's
// own state after Offset bytes: a file that leads to it holds just those bytes.
type checkpoint struct {
	Offset int64
	State  []byte
}

// complete reports whether the checkpoint is at the end of the content of d.
func (c checkpoint) complete(d digest.Digest) bool {
	h := d.Algorithm().Hash()
	u, ok := h.(encoding.BinaryUnmarshaler)
	return ok && u.UnmarshalBinary(c.State) == nil && digest.NewDigest(d.Algorithm(), h) == d
}

// readCheckpoint returns the zero checkpoint when there is none to trust.
func (s *store) readCheckpoint(d digest.Digest) checkpoint {
	var c checkpoint
	b, err := os.ReadFile(s.partialPath(d) + stateSuffix)
	if err != nil || json.Unmarshal(b, &c) != nil || c.Offset < 0 {
		return checkpoint{}
	}
	if fi, err := os.Stat(s.partialPath(d)); err != nil || fi.Size() < c.Offset {
		return checkpoint{}
	}
	return c
}

// claim takes what is there of d out of eviction's reach and returns the
// offset from which its download can be continued. create or unclaim follows.
func (s *store) claim(d digest.Digest) int64 {
	s.mu.Lock()
	if e := s.index[d]; e != nil && e.partial {
		s.remove(e)
	}
	s.mu.Unlock()
	return s.readCheckpoint(d).Offset
}

// held returns how many bytes of d a download would not fetch again.
func (s *store) held(d digest.Digest) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.index[d]; e != nil && e.partial {
		return e.size
	}
	return 0
}

func (s *store) unclaim(d digest.Digest) {
	if at := s.readCheckpoint(d).Offset; at > 0 {
		s.enterPartial(d, at, time.Now().Unix())
	}
}

func (s *store) enterPartial(d digest.Digest, size, used int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.index[d] != nil {
		return
	}
	e := &entry{digest: d, size: size, used: used, partial: true}
	s.index[d] = e
	s.total += size
	s.link(e, &s.oldest)
}

// create opens the file of d for writing size bytes in all, of which the first
// `from` should be there already: they are hashed, and compared with what the
// checkpoint says. If they are not what they should be, the file is empty and
// offset zero. Errors: errNoSpace, errWriting, or what the disk reported.
func (s *store) create(d digest.Digest, size, from int64) (*partial, error) {
	if err := s.lockPartial(d); err != nil {
		return nil, err
	}
	if err := s.reserve(size); err != nil {
		s.unlockPartial(d)
		return nil, err
	}
	p := &partial{store: s, digest: d, size: size, pending: size, hash: d.Algorithm().Hash()}
	f, err := os.OpenFile(s.partialPath(d), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		p.release()
		return nil, err
	}
	p.File = f
	if err = p.restore(from); err == nil {
		err = p.preallocate()
	}
	if err != nil {
		p.abandon()
		return nil, err
	}
	return p, nil
}

// errWriting reports that the same content is being written already: as a
// manifest and as a blob.
var errWriting = errors.New("already being written")

func (s *store) lockPartial(d digest.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writing[d] {
		return errWriting
	}
	s.writing[d] = true
	return nil
}

func (s *store) unlockPartial(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.writing, d)
}

// restore brings file, hash and offset to `from` if the checkpoint is at it
// and the file leads to its state, to zero otherwise.
func (p *partial) restore(from int64) error {
	if from > 0 && from <= p.size {
		c := p.store.readCheckpoint(p.digest)
		_, err := io.CopyBuffer(p.hash, io.NewSectionReader(p.File, 0, from), make([]byte, smallBlob))
		if err == nil && c.Offset == from && string(p.state()) == string(c.State) {
			p.offset, p.saved = from, from
			p.onDisk(from)
			return p.Truncate(from)
		}
		p.hash.Reset()
	}
	os.Remove(p.Name() + stateSuffix)
	return p.Truncate(0)
}

func (p *partial) state() []byte {
	m, ok := p.hash.(encoding.BinaryMarshaler)
	if !ok {
		return nil
	}
	b, err := m.MarshalBinary()
	if err != nil {
		return nil
	}
	return b
}

// preallocate takes the disk space now, so that a full disk is found out
// before a reader depends on the file. Where that is not possible, it is taken
// as the file grows.
func (p *partial) preallocate() error {
	if p.size-p.offset < smallBlob {
		return nil
	}
	err := allocate(p.File, p.offset, p.size-p.offset)
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	if err == nil {
		p.onDisk(p.pending)
	}
	return err
}

func (p *partial) onDisk(n int64) {
	n = min(n, p.pending)
	p.pending -= n
	p.store.pending.Add(-n)
}

// Write appends b to file and hash.
func (p *partial) Write(b []byte) (int, error) {
	n, err := p.WriteAt(b, p.offset)
	p.hash.Write(b[:n])
	p.offset += int64(n)
	p.onDisk(int64(n))
	if err == nil && p.offset-p.saved >= checkpointEvery {
		p.save()
	}
	return n, err
}

// save writes a checkpoint. If it cannot, the one before stays good.
func (p *partial) save() {
	state := p.state()
	if state == nil {
		return
	}
	b, err := json.Marshal(checkpoint{p.offset, state})
	if err == nil && replaceFile(p.Name()+stateSuffix, b, false) == nil {
		p.saved = p.offset
	}
}

// verified reports whether what was written is the whole of the content.
func (p *partial) verified() bool {
	return p.offset == p.size && digest.NewDigest(p.digest.Algorithm(), p.hash) == p.digest
}

// commit makes the verified file a blob of the store. It is renamed within
// under, so that those who follow the file can be told its new name.
func (p *partial) commit(under func(rename func() error) error) error {
	if p.size >= smallBlob {
		p.save() // a crash while the data is flushed costs nothing
	}
	path := p.store.blobPath(p.digest)
	err := os.MkdirAll(filepath.Dir(path), 0o700)
	if err == nil {
		err = p.store.trust(p.File, p.digest)
	}
	if err == nil {
		err = under(func() error { return os.Rename(p.Name(), path) })
	}
	if err != nil {
		p.abandon()
		return fmt.Errorf("storing %s: %w", p.digest, err)
	}
	os.Remove(p.Name() + stateSuffix)
	s := p.store
	now := time.Now().Unix()
	s.mu.Lock()
	e := s.enter(p.digest, p.size, now)
	e.hashed = now
	s.toFront(e)
	s.mu.Unlock()
	p.release()
	p.Close()
	return nil
}

// suspend closes the file and keeps it for a later download to continue from.
func (p *partial) suspend() {
	p.save()
	if p.saved == 0 || p.Truncate(p.saved) != nil {
		p.abandon()
		return
	}
	p.release()
	p.Close()
	p.store.enterPartial(p.digest, p.saved, time.Now().Unix())
}

// abandon removes the file.
func (p *partial) abandon() {
	os.Remove(p.Name() + stateSuffix)
	os.Remove(p.Name())
	p.release()
	p.Close()
}

// release gives the reservation and the file's name back.
func (p *partial) release() {
	s := p.store
	s.pending.Add(-p.pending)
	p.pending = 0
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reserved -= p.size
	delete(s.writing, p.digest)
}

// put stores a small verified body.
func (s *store) put(d digest.Digest, body []byte) error {
	s.claim(d)
	p, err := s.create(d, int64(len(body)), 0)
	if errors.Is(err, errWriting) {
		return nil // whoever writes it will keep it
	}
	if err != nil {
		return err
	}
	if _, err := p.Write(body); err != nil {
		p.abandon()
		return fmt.Errorf("storing %s: %w", d, err)
	}
	return p.commit(func(rename func() error) error { return rename() })
}

// recover deals with what the last run was writing: a complete file becomes
// a blob without a seal, which is verified before it is used; one that can be
// continued is kept for a while; anything else of ours goes.
func (s *store) recover(ctx context.Context) error {
	dir := filepath.Join(s.dir, "partial")
	files, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("listing the store: %w", err)
	}
	for _, f := range files {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		fi, err := f.Info()
		d := digest.Digest(strings.Replace(f.Name(), "-", ":", 1))
		switch {
		case err != nil || !fi.Mode().IsRegular():
		case d.Validate() == nil:
			s.recoverPartial(d, fi)
		case strings.HasPrefix(f.Name(), ".tmp-"):
			os.Remove(filepath.Join(dir, f.Name()))
		}
	}
	return nil
}

func (s *store) recoverPartial(d digest.Digest, fi fs.FileInfo) {
	c := s.readCheckpoint(d)
	path := s.partialPath(d)
	switch {
	case c.Offset > 0 && c.complete(d):
		blob := s.blobPath(d)
		if os.MkdirAll(filepath.Dir(blob), 0o700) == nil && os.Rename(path, blob) == nil {
			os.Remove(path + stateSuffix)
			return
		}
	case c.Offset > 0 && time.Since(fi.ModTime()).Abs() < partialAge:
		s.enterPartial(d, fi.Size(), fi.ModTime().Unix())
		return
	}
	os.Remove(path + stateSuffix)
	os.Remove(path)
}
