package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// distribution compares a digest with what the requests of an upload have sent,
// and not with what is in the file at the end. The two are the same because one
// at a time writes to the file, at its end: whoever writes holds a lock on it, of
// this process and of the file system, from the first byte until the file is
// closed or, once it is committed, in its place and sealed. And the state of a
// hash is kept only by who holds the lock, for the size that the file has then.

// lockTime is how long a writer waits for another to end. lockPoll is how often it
// looks.
const (
	lockTime = 2 * time.Second
	lockPoll = 20 * time.Millisecond
)

// uploads are those that this process writes to, by the driver path of their data.
type uploads struct {
	mu   sync.Mutex
	held map[string]*uploadWriter // guarded by mu
}

func (s *uploads) get(path string) *uploadWriter {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held[path]
}

// claim reports whether nobody else in this process has the upload.
func (s *uploads) claim(u *uploadWriter) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[u.path] != nil {
		return false
	}
	if s.held == nil {
		s.held = make(map[string]*uploadWriter)
	}
	s.held[u.path] = u
	return true
}

func (s *uploads) yield(u *uploadWriter) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[u.path] == u {
		delete(s.held, u.path)
	}
}

// uploadDriver has the data of uploads written by one at a time.
type uploadDriver struct {
	storagedriver.StorageDriver
	medium *directory
}

func (d uploadDriver) Writer(ctx context.Context, path string, appending bool) (storagedriver.FileWriter, error) {
	if !isUploadData(path) {
		return d.StorageDriver.Writer(ctx, path, appending)
	}
	return d.medium.openUpload(path, appending)
}

// uploadWriter writes the data of an upload.
type uploadWriter struct {
	medium *directory
	path   string // of drivers
	file   *os.File

	mu        sync.Mutex
	size      int64       // where the next byte goes
	held      bool        // nobody else in this process writes to it
	locked    bool        // nor anywhere else, for the file system has locks
	dirty     bool        // not everything has been flushed
	closed    bool        // for who wrote
	committed fs.FileInfo // of the file as it was then
}

// openUpload opens the data of an upload, of which the folder must be there if it
// is to be appended to. Whoever only looks disturbs nobody: the lock is taken by the first
// byte, or by the commit.
func (m *directory) openUpload(path string, appending bool) (*uploadWriter, error) {
	if !appending {
		if err := os.MkdirAll(filepath.Dir(m.path(path)), 0o777); err != nil {
			return nil, err
		}
	}
	f, err := os.OpenFile(m.path(path), os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return nil, err
	}
	u := &uploadWriter{medium: m, path: path, file: f}
	fi, err := f.Stat()
	if err == nil {
		u.size = fi.Size()
	}
	if err == nil && !appending {
		if err = u.lock(); err == nil {
			err = f.Truncate(0)
		}
		u.size = 0
	}
	if err != nil {
		return nil, errors.Join(err, u.end())
	}
	return u, nil
}

// lock makes the upload this writer's. u.mu is held.
//
// Errors: ErrBusy when another writes to it, or has since it was opened, and
// fs.ErrNotExist when it has been thrown away.
func (u *uploadWriter) lock() error {
	if u.held {
		return nil
	}
	for deadline := time.Now().Add(lockTime); !u.tryLock(); time.Sleep(lockPoll) {
		if time.Now().After(deadline) {
			return fmt.Errorf("upload %s: %w", u.path, ErrBusy)
		}
	}
	mine, err := u.file.Stat()
	now, gone := os.Stat(u.medium.path(u.path))
	switch {
	case err != nil:
	case gone != nil:
		err = gone
	case !os.SameFile(mine, now):
		err = &fs.PathError{Op: "write", Path: u.path, Err: fs.ErrNotExist}
	case mine.Size() != u.size:
		err = fmt.Errorf("upload %s: others have continued it: %w", u.path, ErrBusy)
	}
	if err != nil {
		_ = unix.Flock(int(u.file.Fd()), unix.LOCK_UN)
		u.medium.uploads.yield(u)
		return err
	}
	u.held = true
	return nil
}

func (u *uploadWriter) tryLock() bool {
	if !u.medium.uploads.claim(u) {
		return false
	}
	err := unix.Flock(int(u.file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	for errors.Is(err, unix.EINTR) {
		err = unix.Flock(int(u.file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		u.medium.uploads.yield(u)
		return false
	}
	u.locked = err == nil // without locks the file is hashed in the end
	return true
}

// Size is how many bytes have been written, before and now.
func (u *uploadWriter) Size() int64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.size
}

// Write appends p. Errors are those of lock, too.
func (u *uploadWriter) Write(p []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed || u.committed != nil {
		return 0, &fs.PathError{Op: "write", Path: u.path, Err: fs.ErrClosed}
	}
	if err := u.lock(); err != nil {
		return 0, err
	}
	n, err := u.file.WriteAt(p, u.size)
	u.size += int64(n)
	u.dirty = u.dirty || n > 0
	return n, err
}

// Commit flushes the file and keeps it locked, beyond Close, until it is moved or
// removed. Errors are those of lock, too.
func (u *uploadWriter) Commit(context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed || u.committed != nil {
		return &fs.PathError{Op: "commit", Path: u.path, Err: fs.ErrClosed}
	}
	err := u.lock()
	if err == nil {
		err = u.file.Sync()
	}
	if err == nil {
		u.dirty = false
		u.committed, err = u.file.Stat()
	}
	return err
}

// Close keeps what was written for whoever opens the file next.
func (u *uploadWriter) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return nil
	}
	u.closed = true
	if u.committed != nil {
		return nil
	}
	return errors.Join(u.flush(), u.end())
}

// Cancel throws away what was written, if it is this writer's.
func (u *uploadWriter) Cancel(context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	var err error
	if u.held {
		err = ignoreAbsent(os.Remove(u.medium.path(u.path)))
	}
	return errors.Join(err, u.end())
}

func (u *uploadWriter) flush() error {
	if !u.dirty {
		return nil
	}
	u.dirty = false
	return u.file.Sync()
}

// end lets others write. u.mu is held.
func (u *uploadWriter) end() error {
	if u.held {
		u.medium.uploads.yield(u)
	}
	u.held = false
	if err := u.file.Close(); !errors.Is(err, fs.ErrClosed) {
		return err
	}
	return nil
}

// keep reports whether the state that a hash has after so many bytes is worth
// keeping, and sees to it that it does not outlive them. Nothing, and what is
// about to be a blob, is hashed sooner than a state is stored.
func (u *uploadWriter) keep(offset int64) (bool, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.held || !u.locked || u.committed != nil || u.size != offset {
		return false, nil
	}
	mine, err := u.file.Stat()
	if err != nil {
		return false, err
	}
	if now, err := os.Stat(u.medium.path(u.path)); err != nil || !os.SameFile(mine, now) {
		return false, nil
	}
	return true, u.flush()
}

// keepsHash is keep for a driver path, of any kind.
func (m *directory) keepsHash(file string) (bool, error) {
	data, offset, ok := parseHashState(file)
	if !ok {
		return true, nil
	}
	u := m.uploads.get(data)
	if offset == 0 || u == nil {
		return false, nil
	}
	return u.keep(offset)
}

// parseHashState takes …/_uploads/<id>/hashstates/<algorithm>/<offset> apart.
func parseHashState(file string) (data string, offset int64, ok bool) {
	states := path.Dir(path.Dir(file))
	data = path.Join(path.Dir(states), "data")
	if path.Base(states) != "hashstates" || !isUploadData(data) {
		return "", 0, false
	}
	offset, err := strconv.ParseInt(path.Base(file), 10, 64)
	return data, offset, err == nil
}

// sealUpload seals the data of an upload, which distribution has verified as far
// as what was sent is what is there. Where that is not certain, because there are
// no locks or something has touched the file all the same, it is hashed: sealed
// first, for a write that comes behind the hash's back takes the seal away, in
// whatever steps times are kept.
func (m *directory) sealUpload(ctx context.Context, data string, d digest.Digest) error {
	if u := m.uploads.get(data); u != nil && u.seal(d) {
		return nil
	}
	f, err := os.Open(m.path(data))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := Seal(f, d); err != nil {
		m.notSealed(d, err)
	}
	return hashFile(ctx, f, d, nil)
}

// seal seals the file, and not what is under its name now, unless anything has
// changed since it was committed.
func (u *uploadWriter) seal(d digest.Digest) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.locked || u.committed == nil {
		return false
	}
	now, err := u.file.Stat()
	then := u.committed
	if err != nil || now.Size() != u.size || then.Size() != u.size || !now.ModTime().Equal(then.ModTime()) || !changed(now).Equal(changed(then)) {
		return false
	}
	if err := Seal(u.file, d); err != nil {
		u.medium.notSealed(d, err)
	}
	return true
}

// release ends the hold on what is committed of an upload, or of any below a path:
// it is in its place, or gone.
func (m *directory) release(path string) {
	m.uploads.mu.Lock()
	var over []*uploadWriter
	for data, u := range m.uploads.held {
		if data == path || strings.HasPrefix(data, path+"/") {
			over = append(over, u)
		}
	}
	m.uploads.mu.Unlock()
	for _, u := range over {
		u.mu.Lock()
		if u.closed && u.committed != nil {
			_ = u.end() // it was flushed
		}
		u.mu.Unlock()
	}
}
