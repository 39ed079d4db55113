package storage

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
)

// directory is a directory as the medium, of which other processes, on other
// machines, may have the same. Paths of drivers are paths below it.
type directory struct {
	root string
	log  *slog.Logger
	fs   storagedriver.StorageDriver // distribution's filesystem driver

	uploads uploads
}

var _ medium = (*directory)(nil)

// quarantineDir holds, beside the tree, what was found corrupt: one file per
// digest, the latest, so that it cannot grow past what is stored.
const quarantineDir = "quarantine"

// trashDir takes what is deleted, so that it vanishes from the tree in one step
// and is taken apart afterwards.
const trashDir = "trash"

// limboDir holds what the collector has condemned and not deleted yet, each
// directory at the path that it had in the tree. Whoever asks for something in
// limbo gets it: the asking brings it back. So a process that has just seen a
// blob, or is about to link to one, cannot have it taken away under its hands,
// and none of them needs a lock to say so.
const limboDir = "limbo"

// layoutDirs must exist for an empty registry to answer with empty lists
// rather than with "not found".
var layoutDirs = []string{
	"docker/registry/v2/blobs",
	"docker/registry/v2/repositories",
	quarantineDir,
	partialDir,
	journalDir,
	limboDir,
	usageDir,
	damagedDir,
	trashDir,
}

// maxThreads bounds concurrent driver calls, each of which may block a thread
// in a system call on a slow volume.
const maxThreads = 256

// openDirectory prepares a directory. The error names it and the remedy.
func openDirectory(root string, log *slog.Logger) (*directory, error) {
	full, err := prepare(root)
	if err != nil {
		return nil, err
	}
	if full != nil {
		log.Warn("nothing can be stored until there is space; what is there is served", "directory", root, "error", full)
	}
	return &directory{
		root: root,
		log:  log,
		fs:   filesystem.New(filesystem.DriverParameters{RootDirectory: root, MaxThreads: maxThreads}),
	}, nil
}

// prepare creates the layout and proves that a file can be written, synced and
// removed, which a directory that merely exists does not. That the volume is full
// is no reason not to serve what lies there; full is that error.
func prepare(root string) (full, err error) {
	for _, dir := range layoutDirs {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o777); err != nil {
			return nil, unusable(root, err)
		}
	}
	err = writeTest(root)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return err, nil
	}
	if err != nil {
		return nil, unusable(root, err)
	}
	return nil, nil
}

func writeTest(root string) error {
	f, err := os.CreateTemp(root, ".write-test-*")
	if err != nil {
		return err
	}
	_, err = f.WriteString("connected-registry\n")
	return errors.Join(err, f.Sync(), f.Close(), os.Remove(f.Name()))
}

func unusable(root string, err error) error {
	return fmt.Errorf("data directory %s cannot be written: %w; make it writable for user %d, free space on its volume, or choose another directory", root, err, os.Getuid())
}

func (m *directory) driver() storagedriver.StorageDriver { return uploadDriver{m.fs, m} }

func (m *directory) ready(context.Context) error {
	dir, err := os.Open(m.root)
	if err == nil {
		_, err = dir.Readdirnames(1)
		dir.Close()
	}
	if err != nil {
		return fmt.Errorf("the data directory: %w", err)
	}
	return nil
}

// path is the path on disk of a driver path, which begins with a slash.
func (m *directory) path(driverPath string) string { return m.root + driverPath }

func (m *directory) limboPath(driverPath string) string {
	return filepath.Join(m.root, limboDir, driverPath)
}

// limbo moves a directory of the tree, given as a driver path, to limbo.
func (m *directory) limbo(dir string) error {
	from, to := m.path(dir), m.limboPath(dir)
	if err := os.MkdirAll(filepath.Dir(to), 0o777); err != nil {
		return err
	}
	// What was condemned before has been replaced since.
	if err := ignoreAbsent(m.discard(to)); err != nil {
		return err
	}
	// From now on the directory's time is that of its condemnation.
	now := time.Now()
	if err := os.Chtimes(from, now, now); err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncDir(filepath.Dir(from))
}

// rescueFile brings a file back from limbo, and reports whether it is in the tree
// now, by whomever. Others may be at the same file, and the collector removes
// directories that are empty: what vanishes is looked for again.
func (m *directory) rescueFile(driverPath string) bool {
	from, to := m.limboPath(driverPath), m.path(driverPath)
	for range 10 {
		if _, err := os.Lstat(from); err != nil {
			break
		}
		if filepath.Base(driverPath) == "link" { // it is as good as new then
			now := time.Now()
			_ = os.Chtimes(from, now, now) // the rename tells whether it was still there
		}
		err := mkdirDurable(filepath.Dir(to))
		if err == nil {
			err = os.Rename(from, to)
		}
		if err == nil {
			err = syncDir(filepath.Dir(to))
			os.Remove(filepath.Dir(from))
		}
		if err == nil {
			return true
		}
		if !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	_, err := os.Lstat(to)
	return err == nil
}

// discard makes a file or directory on disk vanish in one step, and takes it
// apart afterwards.
func (m *directory) discard(file string) error {
	trash, err := m.take(file)
	if err != nil {
		return err
	}
	return os.RemoveAll(trash)
}

// take moves a file or directory on disk to the trash. It makes no directory, so
// that what is deleted to free space needs none.
func (m *directory) take(file string) (trash string, err error) {
	trash = filepath.Join(m.root, trashDir, rand.Text())
	return trash, os.Rename(file, trash)
}

// emptyTrash finishes deletions that a crash interrupted, until quit is closed.
// Those that another process has under way end no differently.
func (m *directory) emptyTrash(quit <-chan struct{}) {
	trash := filepath.Join(m.root, trashDir)
	if err := removeEntries(trash, quit); err != nil {
		m.log.Warn("deleted content still takes space", "directory", trash, "error", err)
	}
}

// removeEntries empties a directory, until quit is closed.
func removeEntries(dir string, quit <-chan struct{}) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return ignoreAbsent(err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if e.IsDir() {
			err = removeEntries(path, quit)
		}
		select {
		case <-quit:
			return err
		default:
		}
		if err = errors.Join(err, ignoreAbsent(os.Remove(path))); err != nil {
			return err
		}
	}
	return nil
}
