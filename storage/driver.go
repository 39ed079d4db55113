package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/opencontainers/go-digest"
)

// driver is the medium's driver with two things added: blobs are verified before
// they are read and sealed when they come into place, and what has been put in
// place survives a power failure. Everything else is inherited.
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
	f, err := d.store.OpenBlob(ctx, dgst)
	if err != nil {
		return nil, d.error(path, err)
	}
	f.Close()
	return blobInfo{path, f.Size, f.Modified}, nil
}

// GetContent returns the whole of a small file; a blob only when verified.
func (d *driver) GetContent(ctx context.Context, path string) ([]byte, error) {
	dgst, ok := parseBlobPath(path)
	if !ok {
		if dgst, ok := isLink(path); ok {
			_, _ = d.store.followToRead(ctx, path, dgst) // whoever reads a link relies on it
		}
		return d.StorageDriver.GetContent(ctx, path)
	}
	f, err := d.store.OpenBlob(ctx, dgst)
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
	f, err := d.store.OpenBlob(ctx, dgst)
	if err != nil {
		return nil, d.error(path, err)
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		f.Close()
		return nil, err
	}
	return f.ReadSeekCloser, nil
}

// PutContent stores a small file atomically and durably. A blob must be what
// its path says, which costs next to nothing to check while it is at hand. A
// link that makes a manifest part of a repository makes it a referrer, too, if
// it has a subject.
func (d *driver) PutContent(ctx context.Context, path string, content []byte) error {
	if dgst, ok := parseBlobPath(path); ok {
		return d.putBlob(ctx, dgst, content)
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
		r.releaseTag(ctx, path)
	}
	if _, ok := isLink(path); ok {
		return d.putLink(ctx, path, digest.Digest(content))
	}
	return d.store.medium.putFile(ctx, path, content)
}

// putLink makes a repository hold a layer or a manifest.
func (d *driver) putLink(ctx context.Context, path string, target digest.Digest) error {
	made, err := d.store.medium.putLink(ctx, path, target)
	if err != nil {
		return err
	}
	size, err := d.store.require(ctx, target)
	if made {
		d.store.usage.add(ctx, repositoryOf(path), size)
	}
	return err
}

// repositoryOf is the name of the repository that a driver path is about.
func repositoryOf(path string) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(path, repositoriesRoot), "/_")
	return name
}

func (d *driver) putBlob(ctx context.Context, dgst digest.Digest, content []byte) error {
	if dgst.Algorithm().FromBytes(content) != dgst {
		return fmt.Errorf("storing blob: %w: expected %s", ErrCorrupt, dgst)
	}
	if err := d.store.medium.putBlob(ctx, dgst, content); err != nil {
		return err
	}
	d.store.usage.add(ctx, "", int64(len(content)))
	return nil
}

// Move puts a file in its place durably.
//
// The one file moved to a blob's path is an upload's data, and distribution
// does that after it has compared the digest of everything written with the one
// expected, and flushed the file (blobWriter.Commit). It is in its place sealed.
// A move from anywhere else to a blob's path brings no such promise and leaves
// the file to be hashed when it is first read, as a crash before this point does.
func (d *driver) Move(ctx context.Context, source, dest string) error {
	err := d.store.medium.move(ctx, source, dest)
	if errors.Is(err, fs.ErrNotExist) {
		return d.error(source, err)
	}
	if err != nil {
		return err
	}
	if dgst, ok := parseBlobPath(dest); ok {
		if size, _, err := d.store.medium.statBlob(ctx, dgst); err == nil {
			d.store.usage.add(ctx, "", size)
		}
	}
	return nil
}

// Delete removes a file or a tree: for whoever looks, in one step, so that a
// push to the same place meets all of it or none. It is durable, too.
func (d *driver) Delete(ctx context.Context, path string) error {
	if !storagedriver.PathRegexp.MatchString(path) {
		return storagedriver.InvalidPathError{Path: path, DriverName: d.Name()}
	}
	if r, ok := d.store.parseTagPath(path + "/current/link"); ok {
		r.releaseTag(ctx, path+"/current/link")
	}
	if err := d.store.medium.remove(ctx, path); err != nil {
		return d.error(path, err)
	}
	if r, dgst, ok := d.store.parseRevisionPath(path); ok {
		if manifest, err := d.store.readManifest(ctx, dgst); err == nil {
			r.forgetReferrer(ctx, dgst, manifest)
		}
	}
	return nil
}

// Writer opens an upload's data for writing.
func (d *driver) Writer(ctx context.Context, path string, append bool) (storagedriver.FileWriter, error) {
	w, err := d.StorageDriver.Writer(ctx, path, append)
	return w, cause(err)
}

// cause takes the wrapping off an error of the driver underneath, which hides
// what is inside from errors.Is.
func cause(err error) error {
	if wrapped, ok := err.(storagedriver.Error); ok { //nolint:errorlint // it is the outermost that is taken off
		return wrapped.Detail
	}
	return err
}

// error translates what OpenBlob returns into what distribution looks for.
func (d *driver) error(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return storagedriver.PathNotFoundError{Path: path, DriverName: d.Name()}
	}
	return storagedriver.Error{DriverName: d.Name(), Detail: err}
}

// blobInfo describes a blob as distribution wants it.
type blobInfo struct {
	path     string
	size     int64
	modified time.Time
}

func (b blobInfo) Path() string       { return b.path }
func (b blobInfo) Size() int64        { return b.size }
func (b blobInfo) ModTime() time.Time { return b.modified }
func (b blobInfo) IsDir() bool        { return false }
