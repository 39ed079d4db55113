package trust

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
	"time"
)

// tempPrefix begins the name of everything that is not yet in its place. It
// must never end in .crt, .cert or .key: containerd and the trust stores pick
// such files up wherever they lie.
const tempPrefix = ".connected-registry-tmp-"

// Bounds on what is read from a node: far more than any hosts.toml or bundle of
// certificates, and than a record that holds many of them.
const (
	maxFileBytes   = 4 << 20
	maxRecordBytes = 64 << 20
)

// WriteFile puts data at name inside root so that, whatever happens, a reader
// finds either what was there before or all of data: a temporary file in the
// same directory, fsync, rename, fsync of the directory. The file gets mode; an
// existing file keeps its owner. If it already holds data with that mode,
// nothing is written and changed is false.
//
// The last element of name is replaced even if it is a symbolic link; links in
// the directories before it are followed only as [os.Root] does.
func WriteFile(root *os.Root, name string, data []byte, mode fs.FileMode) (changed bool, err error) {
	return (&disk{root: root}).write(name, data, mode)
}

// RemoveFile removes name inside root and makes that durable. A file that does
// not exist is no error, and removed is false.
func RemoveFile(root *os.Root, name string) (removed bool, err error) {
	return (&disk{root: root}).remove(name)
}

// disk makes durable changes inside a root. before, if set, is called ahead of
// every single change; tests end the process there.
type disk struct {
	root   *os.Root
	before func(step string)
}

func (d *disk) step(format string, args ...any) {
	if d.before != nil {
		d.before(fmt.Sprintf(format, args...))
	}
}

func (d *disk) write(name string, data []byte, mode fs.FileMode) (changed bool, err error) {
	old, err := d.root.Lstat(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err == nil && old.IsDir() {
		return false, &fs.PathError{Op: "write", Path: name, Err: syscall.EISDIR}
	}
	if err == nil && old.Mode().IsRegular() && old.Size() == int64(len(data)) {
		have, err := d.read(name)
		if err != nil {
			return false, err
		}
		if bytes.Equal(have, data) {
			return d.chmod(name, old.Mode().Perm(), mode)
		}
	}
	return true, d.replace(name, data, mode, old)
}

// chmod repairs the mode of a file whose bytes are right.
func (d *disk) chmod(name string, have, want fs.FileMode) (changed bool, err error) {
	if have == want {
		return false, nil
	}
	d.step("chmod %s", name)
	return true, d.root.Chmod(name, want)
}

func (d *disk) replace(name string, data []byte, mode fs.FileMode, old fs.FileInfo) error {
	temp := path.Join(path.Dir(name), tempName())
	if err := d.replaceBy(temp, name, data, mode, old); err != nil {
		// The temporary name means nothing to whoever reads the message.
		return fmt.Errorf("writing %s: %w", name, bare(err))
	}
	return nil
}

func (d *disk) replaceBy(temp, name string, data []byte, mode fs.FileMode, old fs.FileInfo) (err error) {
	d.step("create the temporary file of %s", name)
	f, err := d.root.OpenFile(temp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = d.root.Remove(temp)
		}
	}()
	if err := d.fill(f, data, mode, old); err != nil {
		_ = f.Close()
		return err
	}
	// Some file systems report a full disk only here.
	if err := f.Close(); err != nil {
		return err
	}
	d.step("rename into %s", name)
	if err := d.root.Rename(temp, name); err != nil {
		return err
	}
	d.step("sync the directory of %s", name)
	return d.syncDir(path.Dir(name))
}

// bare takes operation and path off an error of the file system.
func bare(err error) error {
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		return p.Err
	}
	if l, ok := errors.AsType[*os.LinkError](err); ok {
		return l.Err
	}
	return err
}

func (d *disk) fill(f *os.File, data []byte, mode fs.FileMode, old fs.FileInfo) error {
	d.step("write %d bytes", len(data))
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := keepOwner(f, old); err != nil {
		return err
	}
	// After the owner, and by number: chown clears bits, umask would too.
	if err := f.Chmod(mode); err != nil {
		return err
	}
	d.step("sync the file")
	return f.Sync()
}

// keepOwner gives f the owner of the file that it replaces.
func keepOwner(f *os.File, old fs.FileInfo) error {
	if old == nil {
		return nil
	}
	was, ok := old.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if is, ok := info.Sys().(*syscall.Stat_t); ok && is.Uid == was.Uid && is.Gid == was.Gid {
		return nil
	}
	err = f.Chown(int(was.Uid), int(was.Gid))
	if errors.Is(err, fs.ErrPermission) {
		// Only root gives files away; then the file is ours from now on.
		return nil
	}
	return err
}

// symlink puts a symbolic link at name, replacing a file there in one step.
func (d *disk) symlink(target, name string) (err error) {
	temp := path.Join(path.Dir(name), tempName())
	d.step("create the link of %s", name)
	if err := d.root.Symlink(target, temp); err != nil {
		return err
	}
	d.step("rename the link into %s", name)
	if err := d.root.Rename(temp, name); err != nil {
		_ = d.root.Remove(temp)
		return err
	}
	return d.syncDir(path.Dir(name))
}

func (d *disk) remove(name string) (removed bool, err error) {
	d.step("remove %s", name)
	err = d.root.Remove(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	d.step("sync the directory of removed %s", name)
	return true, d.syncDir(path.Dir(name))
}

func (d *disk) syncDir(name string) error {
	dir, err := d.root.Open(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// read returns a regular file's bytes, refusing one that cannot be meant.
func (d *disk) read(name string) ([]byte, error) { return d.readLimited(name, maxFileBytes) }

func (d *disk) readLimited(name string, limit int64) ([]byte, error) {
	// Without O_NONBLOCK a named pipe put there would hold us for ever.
	f, err := d.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is larger than %d bytes", name, limit)
	}
	return data, nil
}

// sweep removes what a killed process left half-made in dir. What is locked
// belongs to one that is alive.
func (d *disk) sweep(dir string) error {
	names, err := d.list(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, tempPrefix) {
			continue
		}
		if err := d.sweepOne(path.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (d *disk) sweepOne(name string) error {
	info, err := d.root.Lstat(name)
	if err != nil {
		return err
	}
	if info.IsDir() {
		unlock, err := d.tryLock(name)
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil
		}
		if err != nil {
			return err
		}
		defer unlock()
	}
	d.step("sweep %s", name)
	return d.root.RemoveAll(name)
}

// list returns the names in dir, sorted.
func (d *disk) list(dir string) ([]string, error) {
	entries, err := fs.ReadDir(d.root.FS(), dir)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

// tempName is unlike any other: the random text has at least 128 bits.
func tempName() string { return tempPrefix + rand.Text() }

// lock takes the advisory lock on a directory, waiting for whoever has it until
// ctx ends. Locking the directory itself leaves no lock file behind; a killed
// process gives the lock back.
func (d *disk) lock(ctx context.Context, dir string) (unlock func(), err error) {
	for {
		unlock, err := d.tryLock(dir)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return unlock, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("locking %s, which another process holds: %w", dir, context.Cause(ctx))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// tryLock does the same without waiting: EWOULDBLOCK says that it is taken.
func (d *disk) tryLock(dir string) (unlock func(), err error) {
	f, err := d.root.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := flock(f); err != nil {
		_ = f.Close()
		return nil, &fs.PathError{Op: "lock", Path: dir, Err: err}
	}
	if err := d.isStill(f, dir); err != nil {
		_ = f.Close()
		return nil, err
	}
	return func() { _ = f.Close() }, nil
}

func flock(f *os.File) error {
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

// isStill makes sure that a directory was not removed or replaced before its
// lock was taken.
func (d *disk) isStill(f *os.File, dir string) error {
	have, err := f.Stat()
	if err != nil {
		return err
	}
	now, err := d.root.Stat(dir)
	if err != nil {
		return err
	}
	if !os.SameFile(have, now) {
		return &fs.PathError{Op: "lock", Path: dir, Err: fs.ErrNotExist}
	}
	return nil
}
