package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

func (m *directory) openBlob(_ context.Context, d digest.Digest) (Content, error) {
	path := m.path(blobPath(d))
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) && m.rescueFile(blobPath(d)) {
		f, err = os.Open(path)
	}
	if err != nil {
		return Content{}, err
	}
	fi, err := f.Stat()
	if err == nil && fi.IsDir() {
		err = &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	}
	if err != nil {
		f.Close()
		return Content{}, err
	}
	return Content{ReadSeekCloser: f, Size: fi.Size(), Modified: fi.ModTime(), version: versionOf(fi), sealed: Sealed(fi, d)}, nil
}

func versionOf(fi fs.FileInfo) version {
	return version{file: idOf(fi), modified: fi.ModTime().UnixNano()}
}

func (m *directory) statBlob(_ context.Context, d digest.Digest) (size int64, v version, err error) {
	modified, size, file, err := statID(m.path(blobPath(d)))
	if err != nil {
		return 0, version{}, err
	}
	return size, version{file: file, modified: modified.UnixNano()}, nil
}

func (m *directory) requireBlob(_ context.Context, d digest.Digest) (size int64, err error) {
	_, size, err = statFile(m.path(blobPath(d)))
	if errors.Is(err, fs.ErrNotExist) && m.rescueFile(blobPath(d)) {
		_, size, err = statFile(m.path(blobPath(d)))
	}
	return size, err
}

func (m *directory) putBlob(ctx context.Context, d digest.Digest, content []byte) error {
	if err := m.putFile(ctx, blobPath(d), content); err != nil {
		return err
	}
	m.seal(blobPath(d), d)
	return nil
}

func (m *directory) takeBlob(_ context.Context, d digest.Digest, f *os.File) error {
	if err := Seal(f, d); err != nil {
		return err
	}
	path := m.path(blobPath(d))
	if err := mkdirDurable(filepath.Dir(path)); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func (m *directory) peek(ctx context.Context, d digest.Digest) ([]byte, error) {
	tree, limbo := m.path(blobPath(d)), m.limboPath(blobPath(d))
	f, fi, err := OpenVerified(ctx, tree, d)
	for _, next := range []string{limbo, tree} { // where it may have gone meanwhile
		if errors.Is(err, fs.ErrNotExist) {
			f, fi, err = OpenVerified(ctx, next, d)
		}
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi.Size() > maxManifest {
		return nil, fmt.Errorf("it has %d bytes, more than any manifest", fi.Size())
	}
	return io.ReadAll(f)
}

func (m *directory) verifyBlob(ctx context.Context, d digest.Digest) (checked, error) {
	return m.check(d, func(f *os.File) error { return Verify(ctx, f, d) })
}

func (m *directory) scrubBlob(ctx context.Context, d digest.Digest, pace func(n int)) (checked, error) {
	if err := sweepTemporary(filepath.Dir(m.path(blobPath(d)))); err != nil {
		return checked{}, err
	}
	c, err := m.check(d, func(f *os.File) error {
		dropCache(f)
		return hashFile(ctx, f, d, pace)
	})
	if errors.Is(err, errUnstable) { // not at rest: it is hashed by whoever reads it
		return c, &fs.PathError{Op: "open", Path: blobPath(d), Err: fs.ErrNotExist}
	}
	return c, err
}

// check has a blob hashed, and sets it aside if it is corrupt.
func (m *directory) check(d digest.Digest, hash func(f *os.File) error) (checked, error) {
	path := m.path(blobPath(d))
	f, err := os.Open(path)
	if err != nil {
		return checked{}, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	}
	if err != nil {
		return checked{}, err
	}
	c := checked{size: fi.Size(), version: versionOf(fi)}
	err = hash(f)
	if errors.Is(err, ErrCorrupt) {
		c.aside, err = m.quarantine(d, path, f)
	}
	return c, err
}

// quarantine moves the corrupt file that f has open out of the tree. Should a
// good copy have taken its place meanwhile, that one stays, or comes back, and
// the error is fs.ErrNotExist.
func (m *directory) quarantine(d digest.Digest, path string, f *os.File) (aside string, err error) {
	gone := &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	bad, err := f.Stat()
	if err != nil {
		return "", err
	}
	if now, err := os.Stat(path); err != nil || !os.SameFile(now, bad) {
		return "", gone
	}
	aside = filepath.Join(m.root, quarantineDir, entryName(d))
	if err := os.Rename(path, aside); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return "", gone
		}
		return "", fmt.Errorf("setting corrupt blob %s aside: %w", d, err)
	}
	if moved, err := os.Stat(aside); err == nil && !os.SameFile(moved, bad) {
		if err := os.Link(aside, path); err == nil || errors.Is(err, fs.ErrExist) {
			os.Remove(aside)
		}
		return "", gone
	}
	return aside, nil
}

// errEnough ends a walk.
var errEnough = errors.New("enough")

func (m *directory) blobs(ctx context.Context, sizes bool) iter.Seq2[blob, error] {
	return func(yield func(blob, error) bool) {
		for _, limbo := range []bool{true, false} { // what comes back meanwhile is seen twice rather than never
			err := m.eachBlob(ctx, limbo, func(d digest.Digest) error {
				b, err := m.describe(d, limbo, sizes)
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				if err == nil && !yield(b, nil) {
					err = errEnough
				}
				return err
			})
			if errors.Is(err, errEnough) || err != nil && !yield(blob{}, err) {
				return
			}
		}
	}
}

// describe asks the file system for no more than is needed.
func (m *directory) describe(d digest.Digest, limbo, size bool) (b blob, err error) {
	b.digest = d
	file := m.path(blobPath(d))
	if limbo {
		file = m.limboPath(blobPath(d))
		b.condemned, _, err = statFile(filepath.Dir(file))
	}
	if size && err == nil {
		_, b.size, err = statFile(file)
	}
	return b, err
}

// eachBlob visits the directories of blobs, in the tree or in limbo.
func (m *directory) eachBlob(ctx context.Context, limbo bool, visit func(d digest.Digest) error) error {
	root := m.path(blobsRoot)
	if limbo {
		root = m.limboPath(blobsRoot)
	}
	return eachDir(root, func(alg string) error {
		return eachDir(filepath.Join(root, alg), func(prefix string) error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return eachDir(filepath.Join(root, alg, prefix), func(hex string) error {
				d := digest.Digest(alg + ":" + hex)
				if !validDigest(d) || !strings.HasPrefix(hex, prefix) || len(prefix) != 2 {
					return nil
				}
				return visit(d)
			})
		})
	})
}

func (m *directory) condemnBlob(_ context.Context, d digest.Digest, then time.Time) (bool, error) {
	data := blobPath(d)
	dir := filepath.Dir(data)
	came, _, err := statFile(m.path(dir))
	if err != nil || came.After(then) {
		return false, ignoreAbsent(err)
	}
	if _, err := os.Lstat(m.path(data)); err != nil {
		return false, removeTemporary(m.path(dir))
	}
	err = m.limbo(dir)
	return err == nil, ignoreAbsent(err)
}

func (m *directory) restoreBlob(_ context.Context, d digest.Digest) error {
	data := blobPath(d)
	if _, err := os.Lstat(m.path(data)); err == nil { // it has been stored again
		return ignoreAbsent(m.discard(m.limboPath(filepath.Dir(data))))
	}
	m.rescueFile(data)
	return nil
}

func (m *directory) reapBlob(_ context.Context, d digest.Digest) (size int64, reaped bool, err error) {
	file := m.limboPath(blobPath(d))
	_, size, err = statFile(file)
	there := err == nil // else it was brought back, and left its directory
	if ignoreAbsent(err) == nil {
		err = m.discard(filepath.Dir(file))
	}
	return size, there && err == nil, ignoreAbsent(err)
}
