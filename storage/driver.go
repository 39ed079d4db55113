package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/opencontainers/go-digest"
)

// driver is distribution's filesystem driver with two things added: blobs are
// verified before they are read and sealed when they come into place, and what
// has been put in place survives a power failure. Everything else is inherited.
type driver struct {
	storagedriver.StorageDriver
	store *Store
}

var _ storagedriver.StorageDriver = (*driver)(nil)

// Stat reports an unsealed blob once it has been hashed, so that a corrupt one
// is absent for whoever is about to link to it, or to skip storing it again.
func (d *driver) Stat(ctx context.Context, path string) (storagedriver.FileInfo, error) {
	dgst, ok := parseBlobPath(path)
	if !ok {
		return d.StorageDriver.Stat(ctx, path)
	}
	f, fi, err := d.store.OpenBlob(ctx, dgst)
	if err != nil {
		return nil, d.error(path, err)
	}
	f.Close()
	return fileInfo{fi, path}, nil
}

// GetContent returns the whole of a small file; a blob only when verified.
func (d *driver) GetContent(ctx context.Context, path string) ([]byte, error) {
	dgst, ok := parseBlobPath(path)
	if !ok {
		if dgst, ok := isLink(path); ok {
			_, _ = d.store.follow(path, dgst) // whoever reads a link relies on it
		}
		return d.StorageDriver.GetContent(ctx, path)
	}
	f, _, err := d.store.OpenBlob(ctx, dgst)
	if err != nil {
		return nil, d.error(path, err)
	}
	defer f.Close()
	return io.ReadAll(f)
}

// Reader opens a file at offset; a blob only when verified.
func (d *driver) Reader(ctx context.Context, path string, offset int64) (io.ReadCloser, error) {
	dgst, ok := parseBlobPath(path)
	if !ok {
		return d.StorageDriver.Reader(ctx, path, offset)
	}
	if offset < 0 {
		return nil, storagedriver.InvalidOffsetError{Path: path, Offset: offset, DriverName: d.Name()}
	}
	f, _, err := d.store.OpenBlob(ctx, dgst)
	if err != nil {
		return nil, d.error(path, err)
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// PutContent stores a small file atomically and durably. A blob must be what
// its path says, which costs next to nothing to check while it is at hand. A
// link that makes a manifest part of a repository makes it a referrer, too, if
// it has a subject.
func (d *driver) PutContent(ctx context.Context, path string, content []byte) error {
	if dgst, ok := parseBlobPath(path); ok {
		return d.putBlob(ctx, path, dgst, content)
	}
	if r, dgst, ok := d.store.parseRevisionPath(path); ok {
		manifest, err := d.store.readManifest(ctx, dgst)
		if err == nil {
			err = r.indexReferrer(ctx, dgst, manifest)
		}
		if err != nil {
			return err
		}
	}
	if r, ok := d.store.parseTagPath(path); ok {
		r.releaseTag(path)
	}
	if _, ok := isLink(path); ok {
		return d.putLink(ctx, path, content)
	}
	return d.putFile(ctx, path, content)
}

// putLink makes a repository hold a layer or a manifest.
func (d *driver) putLink(ctx context.Context, path string, content []byte) error {
	_, before := os.Lstat(d.store.path(path))
	if err := d.putFile(ctx, path, content); err != nil {
		return err
	}
	size, err := d.store.require(digest.Digest(content))
	if before != nil {
		d.store.usage.add(repositoryOf(path), size)
	}
	return err
}

// repositoryOf is the name of the repository that a driver path is about.
func repositoryOf(path string) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(path, repositoriesRoot), "/_")
	return name
}

func (d *driver) putBlob(ctx context.Context, path string, dgst digest.Digest, content []byte) error {
	if dgst.Algorithm().FromBytes(content) != dgst {
		return fmt.Errorf("storing blob: %w: expected %s", ErrCorrupt, dgst)
	}
	if err := d.putFile(ctx, path, content); err != nil {
		return err
	}
	d.seal(path, dgst)
	d.store.usage.add("", int64(len(content)))
	return nil
}

// putFile stores a file whatever it is.
func (d *driver) putFile(ctx context.Context, path string, content []byte) error {
	return d.untilPlaced(path, func() error { return d.StorageDriver.PutContent(ctx, path, content) })
}

// Move renames a file into place and makes the rename durable, which the driver
// underneath does for PutContent but not here.
//
// The one file moved to a blob's path is an upload's data, and distribution
// does that after it has compared the digest of everything written with the one
// expected, and flushed the file (blobWriter.Commit). It is sealed before the
// rename, so that it appears in the tree sealed. A move from anywhere else to a
// blob's path brings no such promise and leaves the file to be hashed when it
// is first read, as a crash before this point does.
func (d *driver) Move(ctx context.Context, source, dest string) error {
	if dgst, ok := parseBlobPath(dest); ok && isUploadData(source) {
		d.seal(source, dgst)
	}
	err := d.untilPlaced(dest, func() error { return d.StorageDriver.Move(ctx, source, dest) })
	if err != nil {
		return err
	}
	if _, ok := parseBlobPath(dest); ok {
		if _, size, err := statFile(d.store.path(dest)); err == nil {
			d.store.usage.add("", size)
		}
	}
	return syncDir(filepath.Dir(d.store.path(dest)))
}

// Delete removes a file or a tree: for whoever looks, in one step, so that a
// push to the same place meets all of it or none. It is durable, too.
func (d *driver) Delete(ctx context.Context, path string) error {
	if !storagedriver.PathRegexp.MatchString(path) {
		return storagedriver.InvalidPathError{Path: path, DriverName: d.Name()}
	}
	target := d.store.path(path)
	if r, ok := d.store.parseTagPath(path + "/current/link"); ok {
		r.releaseTag(path + "/current/link")
	}
	trash, err := d.store.take(target)
	if err != nil {
		return d.error(path, err)
	}
	defer os.RemoveAll(trash)
	if r, dgst, ok := d.store.parseRevisionPath(path); ok {
		if manifest, err := d.store.readManifest(ctx, dgst); err == nil {
			r.forgetReferrer(dgst, manifest)
		}
	}
	return syncDir(filepath.Dir(target))
}

// Writer opens an upload's data for writing.
func (d *driver) Writer(ctx context.Context, path string, append bool) (storagedriver.FileWriter, error) {
	w, err := d.StorageDriver.Writer(ctx, path, append)
	return w, cause(err)
}

// untilPlaced makes the directories for a file and calls place to put it there,
// again when a deletion took the directories away in between.
func (d *driver) untilPlaced(path string, place func() error) error {
	for attempt := 1; ; attempt++ {
		err := d.mkdirFor(path)
		if err == nil {
			err = cause(place())
		}
		var absent storagedriver.PathNotFoundError
		vanished := errors.Is(err, fs.ErrNotExist) || errors.As(err, &absent)
		if !vanished || attempt == 10 {
			return err
		}
	}
}

// cause takes the wrapping off an error of the driver underneath, which hides
// what is inside from errors.Is.
func cause(err error) error {
	if wrapped, ok := err.(storagedriver.Error); ok { //nolint:errorlint // it is the outermost that is taken off
		return wrapped.Detail
	}
	return err
}

// seal marks a file that has just been verified. A file without its seal is
// still right, only slower to read the first time, so this is no reason to
// fail.
func (d *driver) seal(path string, dgst digest.Digest) {
	f, err := os.Open(d.store.path(path))
	if err == nil {
		err = Seal(f, dgst)
		f.Close()
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.store.log.Warn("blob could not be sealed and will be hashed when it is read", "digest", dgst, "error", err)
	}
}

// mkdirFor creates the missing directories above a driver path, each durable
// before the next: a file in a directory that a power failure undoes is lost
// however well it was flushed itself. Uploads in progress may be lost.
func (d *driver) mkdirFor(driverPath string) error {
	if strings.Contains(driverPath, "/_uploads/") {
		return nil
	}
	return mkdirDurable(filepath.Dir(d.store.path(driverPath)))
}

// create writes a small file that must not be there yet, durably and in one step.
func (s *Store) create(file string, content []byte) error {
	if err := mkdirDurable(filepath.Dir(file)); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), "link.*.tmp")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(content)
	if err = errors.Join(err, tmp.Chmod(0o644), tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Link(tmp.Name(), file); err != nil {
		return err
	}
	return syncDir(filepath.Dir(file))
}

func mkdirDurable(dir string) error {
	err := os.Mkdir(dir, 0o777)
	switch {
	case errors.Is(err, fs.ErrExist):
		return nil
	case errors.Is(err, fs.ErrNotExist):
		if err := mkdirDurable(filepath.Dir(dir)); err != nil {
			return err
		}
		if err := os.Mkdir(dir, 0o777); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	case err != nil:
		return err
	}
	return syncDir(filepath.Dir(dir))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// isUploadData reports whether a driver path is the data of an upload:
// …/_uploads/<id>/data.
func isUploadData(p string) bool {
	return path.Base(p) == "data" && path.Base(path.Dir(path.Dir(p))) == "_uploads"
}

// error translates what OpenBlob returns into what distribution looks for.
func (d *driver) error(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return storagedriver.PathNotFoundError{Path: path, DriverName: d.Name()}
	}
	return storagedriver.Error{DriverName: d.Name(), Detail: err}
}

// fileInfo is a FileInfo as distribution wants it.
type fileInfo struct {
	fs.FileInfo
	path string
}

func (fi fileInfo) Path() string       { return fi.path }
func (fi fileInfo) Size() int64        { return fi.FileInfo.Size() }
func (fi fileInfo) ModTime() time.Time { return fi.FileInfo.ModTime() }
func (fi fileInfo) IsDir() bool        { return false }
