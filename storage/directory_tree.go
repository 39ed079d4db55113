package storage

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/opencontainers/go-digest"
)

func (m *directory) readFile(_ context.Context, path string) ([]byte, error) {
	return os.ReadFile(m.path(path))
}

func (m *directory) putFile(ctx context.Context, path string, content []byte) error {
	if keep, err := m.keepsHash(path); !keep || err != nil {
		return err
	}
	return m.untilPlaced(path, func() error { return m.fs.PutContent(ctx, path, content) })
}

func (m *directory) createFile(_ context.Context, path string, content []byte) error {
	file := m.path(path)
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

// move renames a file into place and makes the rename durable, which the driver
// underneath does for PutContent but not here. An upload's data is sealed before,
// so that it appears in the tree sealed, and right.
func (m *directory) move(ctx context.Context, from, to string) error {
	if dgst, ok := parseBlobPath(to); ok && isUploadData(from) {
		defer m.release(from)
		if err := m.sealUpload(ctx, from, dgst); err != nil {
			return err
		}
	}
	if err := m.untilPlaced(to, func() error { return m.fs.Move(ctx, from, to) }); err != nil {
		return err
	}
	return syncDir(filepath.Dir(m.path(to)))
}

// seal marks a file that has just been verified. A file without its seal is
// still right, only slower to read the first time, so this is no reason to
// fail.
func (m *directory) seal(path string, dgst digest.Digest) {
	f, err := os.Open(m.path(path))
	if err == nil {
		err = Seal(f, dgst)
		f.Close()
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.notSealed(dgst, err)
	}
}

func (m *directory) notSealed(dgst digest.Digest, err error) {
	m.log.Warn("blob could not be sealed and will be hashed when it is read", "digest", dgst, "error", err)
}

// isUploadData reports whether a driver path is the data of an upload:
// …/_uploads/<id>/data.
func isUploadData(p string) bool {
	return path.Base(p) == "data" && path.Base(path.Dir(path.Dir(p))) == "_uploads"
}

func (m *directory) remove(_ context.Context, path string) error {
	defer m.release(path)
	target := m.path(path)
	found := false
	for _, file := range []string{target, m.limboPath(path)} {
		trash, err := m.take(file)
		if ignoreAbsent(err) != nil {
			return err
		}
		if err == nil {
			found = true
			defer os.RemoveAll(trash)
		}
	}
	if !found {
		return &fs.PathError{Op: "delete", Path: path, Err: fs.ErrNotExist}
	}
	return ignoreAbsent(syncDir(filepath.Dir(target)))
}

// removeUpload has the upload vanish in one step, so that nobody finds a part of it
// to go on with.
func (m *directory) removeUpload(_ context.Context, path string) error {
	defer m.release(path)
	if err := ignoreAbsent(m.discard(m.path(path))); err == nil {
		return nil
	}
	return os.RemoveAll(m.path(path)) // on a disk too full for a rename, for one
}

func (m *directory) list(_ context.Context, path string) ([]entry, error) {
	files, err := os.ReadDir(m.path(path))
	if err != nil {
		return nil, err
	}
	entries := make([]entry, len(files))
	for i, e := range files {
		entries[i] = entry{e.Name(), e.IsDir()}
	}
	return entries, nil
}

func (m *directory) walk(_ context.Context, path string, visit func(file string, modified func() (time.Time, error)) error) error {
	return eachFile(m.path(path), func(file string, e fs.DirEntry) error {
		return visit(strings.TrimPrefix(file, m.root), modifiedOf(e))
	})
}

// modifiedOf looks for when a file was last written to once it is asked for.
func modifiedOf(e fs.DirEntry) func() (time.Time, error) {
	return func() (time.Time, error) {
		fi, err := e.Info()
		if err != nil {
			return time.Time{}, err
		}
		return fi.ModTime(), nil
	}
}

// prune removes the empty directories among a repository's own, and the
// repository with them if all is. Whoever is about to put something there makes
// the directory again.
func (m *directory) prune(_ context.Context, repository string, all bool) error {
	dir := m.path(repository)
	err := eachDir(dir, func(name string) error {
		// A repository without a tag still has a list of them.
		if name == "_referrers" || all && strings.HasPrefix(name, "_") {
			return removeEmpty(filepath.Join(dir, name))
		}
		return nil
	})
	os.Remove(dir) // if it is empty; other repositories may be below it
	return err
}

// removeEmpty removes dir and the directories below it that are empty.
func removeEmpty(dir string) error {
	err := eachDir(dir, func(name string) error { return removeEmpty(filepath.Join(dir, name)) })
	os.Remove(dir) // if it is empty
	return err
}

// repositories looks in the tree and in limbo.
func (m *directory) repositories(context.Context) ([]string, error) {
	var names []string
	seen := make(map[string]bool)
	var walk func(root, name string) error
	walk = func(root, name string) error {
		return eachDir(root+name, func(entry string) error {
			if !strings.HasPrefix(entry, "_") {
				return walk(root, strings.TrimPrefix(name+"/"+entry, "/"))
			}
			if !seen[name] {
				seen[name] = true
				names = append(names, name)
			}
			return nil
		})
	}
	for _, root := range []string{m.limboPath(repositoriesRoot), m.path(repositoriesRoot)} {
		if err := walk(root+"/", ""); err != nil {
			return nil, err
		}
	}
	return names, nil
}

// eachDir calls visit with the name of each directory in dir, which need not
// exist.
func eachDir(dir string, visit func(name string) error) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return ignoreAbsent(err)
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := visit(e.Name()); err != nil {
			return err
		}
	}
	return nil
}

// eachFile calls visit with every file below dir, which need not exist.
func eachFile(dir string, visit func(file string, e fs.DirEntry) error) error {
	return filepath.WalkDir(dir, func(file string, e fs.DirEntry, err error) error {
		if err != nil {
			return ignoreAbsent(err)
		}
		if e.IsDir() {
			return nil
		}
		return visit(file, e)
	})
}

// untilPlaced makes the directories for a file and calls place to put it there,
// again when a deletion took the directories away in between.
func (m *directory) untilPlaced(path string, place func() error) error {
	for attempt := 1; ; attempt++ {
		err := m.mkdirFor(path)
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

// mkdirFor creates the missing directories above a driver path, each durable
// before the next: a file in a directory that a power failure undoes is lost
// however well it was flushed itself. Uploads in progress may be lost.
func (m *directory) mkdirFor(driverPath string) error {
	if strings.Contains(driverPath, "/_uploads/") {
		return nil
	}
	return mkdirDurable(filepath.Dir(m.path(driverPath)))
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
