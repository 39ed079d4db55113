package storage

import (
	"cmp"
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// bucketDriver is a storage driver of distribution's on an object store, without
// integrity. Directories are what keys have in common up to a slash.
type bucketDriver struct {
	bucket bucket.Bucket
	part   int // bytes of a part of an upload
}

var _ storagedriver.StorageDriver = (*bucketDriver)(nil)

// objectKey is the key of a driver path.
func objectKey(driverPath string) string { return strings.TrimPrefix(driverPath, "/") }

// Name implements [storagedriver.StorageDriver].
func (d *bucketDriver) Name() string { return "objects" }

func (d *bucketDriver) check(path string) error {
	if !storagedriver.PathRegexp.MatchString(path) {
		return storagedriver.InvalidPathError{Path: path, DriverName: d.Name()}
	}
	return nil
}

// error translates what a bucket reports into what distribution looks for.
func (d *bucketDriver) error(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return storagedriver.PathNotFoundError{Path: path, DriverName: d.Name()}
	}
	return err
}

// upload detaches a request about an upload from the client that made it, who
// may be gone and come back for what there is.
func (d *bucketDriver) upload(ctx context.Context, path string) (context.Context, context.CancelFunc) {
	if strings.Contains(path, "/_uploads/") {
		ctx = context.WithoutCancel(ctx)
	}
	return context.WithTimeout(ctx, uploadTime)
}

// GetContent implements [storagedriver.StorageDriver].
func (d *bucketDriver) GetContent(ctx context.Context, path string) ([]byte, error) {
	if err := d.check(path); err != nil {
		return nil, err
	}
	content, _, err := readObject(ctx, d.bucket, objectKey(path))
	return content, d.error(path, err)
}

// PutContent implements [storagedriver.StorageDriver].
func (d *bucketDriver) PutContent(ctx context.Context, path string, content []byte) error {
	if err := d.check(path); err != nil {
		return err
	}
	ctx, cancel := d.upload(ctx, path)
	defer cancel()
	_, err := d.bucket.Put(ctx, objectKey(path), content, nil, bucket.Conditions{})
	return err
}

// Reader implements [storagedriver.StorageDriver].
func (d *bucketDriver) Reader(ctx context.Context, path string, offset int64) (io.ReadCloser, error) {
	if offset < 0 {
		return nil, storagedriver.InvalidOffsetError{Path: path, Offset: offset, DriverName: d.Name()}
	}
	if err := d.check(path); err != nil {
		return nil, err
	}
	at, err := d.bucket.Stat(ctx, objectKey(path))
	if err != nil {
		return nil, d.error(path, err)
	}
	c := newObjectContent(ctx, d.bucket, path, at, func(bucket.Attributes) bool { return false })
	_, err = c.Seek(offset, io.SeekStart)
	return c, err
}

// Stat implements [storagedriver.StorageDriver].
func (d *bucketDriver) Stat(ctx context.Context, path string) (storagedriver.FileInfo, error) {
	if path == "/" {
		return objectInfo{path: path, dir: true}, nil
	}
	if err := d.check(path); err != nil {
		return nil, err
	}
	at, err := d.bucket.Stat(ctx, objectKey(path))
	if err == nil {
		return infoOf(at), nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, err := range d.bucket.List(ctx, objectKey(path)+"/", "", "/") {
		if err != nil {
			return nil, err
		}
		return objectInfo{path: path, dir: true}, nil
	}
	return nil, d.error(path, err)
}

// children lists a directory, sorted by name.
func (d *bucketDriver) children(ctx context.Context, path string) ([]objectInfo, error) {
	if path == "/" {
		return d.folder(ctx, "")
	}
	if err := d.check(path); err != nil {
		return nil, err
	}
	infos, err := d.folder(ctx, objectKey(path)+"/")
	if err == nil && len(infos) == 0 {
		err = d.error(path, fs.ErrNotExist)
	}
	return infos, err
}

// folder lists what has a prefix, which is empty or ends in a slash, sorted by
// name.
func (d *bucketDriver) folder(ctx context.Context, prefix string) ([]objectInfo, error) {
	var infos []objectInfo
	for at, err := range d.bucket.List(ctx, prefix, "", "/") {
		if err != nil {
			return nil, err
		}
		infos = append(infos, infoOf(at))
	}
	slices.SortFunc(infos, func(a, b objectInfo) int { return cmp.Compare(a.path, b.path) })
	return infos, nil
}

// List implements [storagedriver.StorageDriver].
func (d *bucketDriver) List(ctx context.Context, path string) ([]string, error) {
	infos, err := d.children(ctx, path)
	paths := make([]string, len(infos))
	for i, info := range infos {
		paths[i] = info.path
	}
	return paths, err
}

// Walk implements [storagedriver.StorageDriver]. It begins at the beginning
// whatever it is told, which it may.
func (d *bucketDriver) Walk(ctx context.Context, path string, visit storagedriver.WalkFn, _ ...func(*storagedriver.WalkOptions)) error {
	err := d.walk(ctx, path, visit)
	if errors.Is(err, storagedriver.ErrFilledBuffer) {
		return nil
	}
	return err
}

func (d *bucketDriver) walk(ctx context.Context, path string, visit storagedriver.WalkFn) error {
	infos, err := d.children(ctx, path)
	if err != nil {
		return err
	}
	for _, info := range infos {
		err := visit(info)
		if err == nil && info.dir {
			err = d.walk(ctx, info.path, visit)
			if _, gone := err.(storagedriver.PathNotFoundError); gone { //nolint:errorlint // distribution's own, as it comes
				err = nil // deleted meanwhile
			}
		}
		if err != nil && !errors.Is(err, storagedriver.ErrSkipDir) {
			return err
		}
	}
	return nil
}

// Move implements [storagedriver.StorageDriver].
func (d *bucketDriver) Move(ctx context.Context, source, dest string) error {
	if err := errors.Join(d.check(source), d.check(dest)); err != nil {
		return err
	}
	if err := d.bucket.Copy(ctx, objectKey(source), "", objectKey(dest), nil); err != nil {
		return d.error(source, err)
	}
	return d.bucket.Delete(ctx, objectKey(source))
}

// Delete implements [storagedriver.StorageDriver].
func (d *bucketDriver) Delete(ctx context.Context, path string) error {
	if err := d.check(path); err != nil {
		return err
	}
	ctx, cancel := d.upload(ctx, path)
	defer cancel()
	found := false
	if at, err := d.bucket.Stat(ctx, objectKey(path)); err == nil {
		found = true
		err := d.bucket.Delete(ctx, at.Key)
		if err == nil && at.Metadata[markName] != "" {
			err = d.bucket.Delete(ctx, at.Key+uploadSuffix)
		}
		if err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	n, err := d.deleteTree(ctx, path)
	if err == nil && n == 0 && !found {
		return d.error(path, fs.ErrNotExist)
	}
	return err
}

// deleteTree deletes what lies below a driver path, until nothing does: what
// comes while it goes on, where it has been, goes too.
func (d *bucketDriver) deleteTree(ctx context.Context, path string) (n int, err error) {
	for range 10 {
		var keys []string
		for at, err := range d.bucket.List(ctx, objectKey(path)+"/", "", "") {
			if err != nil {
				return n, err
			}
			keys = append(keys, at.Key)
		}
		if len(keys) == 0 {
			return n, nil
		}
		n += len(keys)
		if err := d.deleteAll(ctx, keys); err != nil {
			return n, err
		}
	}
	return n, nil
}

// deleteAll deletes objects, and aborts the uploads among them. What makes a tag
// be there goes last, so that it can be deleted again if this ends half way.
func (d *bucketDriver) deleteAll(ctx context.Context, keys []string) error {
	isTag := func(key string) bool { return strings.HasSuffix(key, "/current/link") }
	if err := d.deleteThese(ctx, slices.DeleteFunc(slices.Clone(keys), isTag)); err != nil {
		return err
	}
	return d.deleteThese(ctx, slices.DeleteFunc(keys, func(key string) bool { return !isTag(key) }))
}

func (d *bucketDriver) deleteThese(ctx context.Context, keys []string) error {
	return inParallel(ctx, keys, func(ctx context.Context, key string) error {
		if strings.HasSuffix(key, uploadSuffix) && strings.Contains(key, "/_uploads/") {
			if err := d.abortUpload(ctx, key); err != nil {
				return err
			}
		}
		return d.bucket.Delete(ctx, key)
	})
}

// RedirectURL implements [storagedriver.StorageDriver]: clients need no access
// to the object store.
func (d *bucketDriver) RedirectURL(*http.Request, string) (string, error) { return "", nil }

// objectInfo is a FileInfo as distribution wants it.
type objectInfo struct {
	path     string
	size     int64
	modified time.Time
	dir      bool
}

func infoOf(at bucket.Attributes) objectInfo {
	return objectInfo{path: path.Clean("/" + at.Key), size: at.Size, modified: at.Modified, dir: strings.HasSuffix(at.Key, "/")}
}

func (i objectInfo) Path() string       { return i.path }
func (i objectInfo) Size() int64        { return i.size }
func (i objectInfo) ModTime() time.Time { return i.modified }
func (i objectInfo) IsDir() bool        { return i.dir }

// isAbsent reports whether an error of the driver says that there is no such
// path.
func isAbsent(err error) bool {
	var absent storagedriver.PathNotFoundError
	return errors.As(err, &absent)
}
