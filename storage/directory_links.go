package storage

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

func (m *directory) readLink(_ context.Context, path string) (digest.Digest, error) {
	return readLinkFile(m.path(path))
}

func (m *directory) look(_ context.Context, path string, d digest.Digest) (used time.Time, target digest.Digest, err error) {
	return lookAtLink(m.path(path), d)
}

// lookAtLink is look for a file on disk. Only a link that is called by another
// algorithm than distribution's own can name something else, so that most need
// not be read.
func lookAtLink(file string, d digest.Digest) (used time.Time, target digest.Digest, err error) {
	used, size, err := statFile(file)
	if err != nil {
		return time.Time{}, "", err
	}
	if d.Algorithm() == digest.Canonical {
		if size != int64(len(d)) {
			return time.Time{}, "", &fs.PathError{Op: "readlink", Path: file, Err: fs.ErrNotExist}
		}
		return used, d, nil
	}
	target, err = readLinkFile(file)
	return used, target, err
}

func (m *directory) renew(ctx context.Context, path string) error {
	now := time.Now()
	err := os.Chtimes(m.path(path), now, now)
	if errors.Is(err, fs.ErrNotExist) && !m.rescue(ctx, path) {
		return err
	}
	return nil // a file system that is read-only has no collector either
}

func (m *directory) rescue(_ context.Context, path string) bool { return m.rescueFile(path) }

func (m *directory) putLink(ctx context.Context, path string, target digest.Digest) (made bool, err error) {
	_, before := os.Lstat(m.path(path))
	return before != nil, m.putFile(ctx, path, []byte(target))
}

func (m *directory) links(_ context.Context, folder string) ([]link, error) {
	var links []link
	for _, limbo := range []bool{true, false} {
		root := m.path(folder)
		if limbo {
			root = m.limboPath(folder)
		}
		err := eachDir(root, func(alg string) error {
			return eachDir(root+"/"+alg, func(hex string) error {
				d := digest.Digest(alg + ":" + hex)
				if !validDigest(d) {
					return nil
				}
				l := link{name: d, path: folder + "/" + alg + "/" + hex + "/link"}
				var err error
				file := root + "/" + alg + "/" + hex
				l.used, l.target, err = lookAtLink(file+"/link", d)
				if errors.Is(err, fs.ErrNotExist) {
					return removeTemporary(file)
				}
				if limbo && err == nil {
					l.condemned, _, err = statFile(file)
				}
				links = append(links, l)
				return ignoreAbsent(err)
			})
		})
		if err != nil {
			return nil, err
		}
	}
	return links, nil
}

func (m *directory) condemn(_ context.Context, l link) (used time.Time, err error) {
	if err := m.limbo(path.Dir(l.path)); err != nil {
		return time.Time{}, err
	}
	used, _, err = statFile(m.limboPath(l.path))
	if err != nil {
		return time.Now(), nil //nolint:nilerr // somebody has brought it back already
	}
	return used, nil
}

// doomedPrefix begins the name, in limbo, of what is out of reach there. It is not
// in the trash, which any process empties, for it may have to go back.
const doomedPrefix = "doomed-"

// reap takes links out of everybody's reach by a rename each. One that came back
// is not there to be renamed, and so its time need not be looked at.
func (m *directory) reap(_ context.Context, all []link, _ time.Time) (reaped bool, err error) {
	type taking struct{ doomed, from string }
	var taken []taking
	for _, l := range all {
		from := m.limboPath(path.Dir(l.path))
		doomed := m.limboPath("/" + doomedPrefix + rand.Text())
		err := os.Rename(from, doomed)
		if err == nil {
			// Its link may have been taken out of it.
			_, err = os.Lstat(doomed + "/link")
			taken = append(taken, taking{doomed, from})
		}
		if err != nil {
			for _, t := range taken {
				err = errors.Join(err, os.Rename(t.doomed, t.from))
			}
			return false, ignoreAbsent(err)
		}
	}
	var errs []error
	for _, t := range taken {
		errs = append(errs, os.RemoveAll(t.doomed))
	}
	return true, errors.Join(errs...)
}

// readLinkFile does without os.File, which would have the poller look after a
// file of a few bytes. One that does not hold a digest, as after a power failure
// on a file system that does not order writes, is as good as absent.
func readLinkFile(file string) (digest.Digest, error) {
	fd, err := retried(func() (int, error) { return unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: file, Err: err}
	}
	defer func() { _ = unix.Close(fd) }() // it was only read
	var buf [256]byte                     // the longest digest, sha512, has 135
	n, err := retried(func() (int, error) { return unix.Read(fd, buf[:]) })
	if err != nil {
		return "", &fs.PathError{Op: "read", Path: file, Err: err}
	}
	d := digest.Digest(buf[:n])
	if n == 0 || !validDigest(d) {
		return "", &fs.PathError{Op: "readlink", Path: file, Err: fs.ErrNotExist}
	}
	return d, nil
}

// retried makes a system call again that a signal interrupted.
func retried(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR { //nolint:errorlint // an errno as it comes
			return n, err
		}
	}
}
