package storage

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// temporaryAge is how old a temporary file is when nobody writes to it any more.
const temporaryAge = time.Hour

func (m *directory) sweep(ctx context.Context, repositories []string, uploads, aside time.Time) (Swept, error) {
	var swept Swept
	for _, name := range repositories {
		if ctx.Err() != nil {
			return swept, context.Cause(ctx)
		}
		n, err := m.sweepUploads(m.path(repositoriesRoot+name), uploads)
		if err != nil {
			return swept, err
		}
		swept.Uploads += n
	}
	m.emptyTrash(ctx.Done())
	limbo := filepath.Join(m.root, limboDir)
	err := eachDir(limbo, func(name string) error {
		if !strings.HasPrefix(name, doomedPrefix) {
			return nil
		}
		return m.discard(filepath.Join(limbo, name))
	})
	if err != nil {
		return swept, err
	}
	temporary := time.Now().Add(-temporaryAge)
	for _, old := range []struct {
		dir, prefix string
		then        time.Time
	}{
		{"", ".write-test-", temporary},
		{quarantineDir, "", aside},
	} {
		n, err := sweepFiles(filepath.Join(m.root, old.dir), old.prefix, old.then)
		if err != nil {
			return swept, err
		}
		swept.Temporary += n
	}
	n, err := m.sweepNotes(m.root, temporary)
	swept.Temporary += n
	return swept, err
}

// sweepUploads removes a repository's uploads that were last written to before
// then.
func (m *directory) sweepUploads(repository string, then time.Time) (n int, err error) {
	uploads := filepath.Join(repository, "_uploads")
	err = eachDir(uploads, func(id string) error {
		dir := filepath.Join(uploads, id)
		last, _, err := statFile(dir)
		if err != nil {
			return ignoreAbsent(err)
		}
		err = eachFile(dir, func(_ string, e fs.DirEntry) error {
			fi, err := e.Info()
			if err == nil && fi.ModTime().After(last) {
				last = fi.ModTime()
			}
			return ignoreAbsent(err)
		})
		if err != nil || last.After(then) {
			return err
		}
		n++
		return ignoreAbsent(m.discard(dir))
	})
	return n, err
}

// noNotes are the folders in the root in which there are none.
var noNotes = []string{"docker", limboDir, trashDir, quarantineDir, partialDir}

// sweepNotes removes notes in and below dir that were being written before then.
// Folders of others, which may be there and cannot be read, hold none.
func (m *directory) sweepNotes(dir string, then time.Time) (n int, err error) {
	n, err = sweepFiles(dir, newPrefix, then)
	if errors.Is(err, fs.ErrPermission) {
		return 0, nil
	}
	if err != nil {
		return n, err
	}
	err = eachDir(dir, func(name string) error {
		if dir == m.root && slices.Contains(noNotes, name) {
			return nil
		}
		more, err := m.sweepNotes(filepath.Join(dir, name), then)
		n += more
		return err
	})
	return n, err
}

// sweepFiles removes the files in a directory whose names begin with prefix and
// that were last written to before then.
func sweepFiles(dir, prefix string, then time.Time) (n int, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, ignoreAbsent(err)
	}
	for _, e := range entries {
		if e.IsDir() || !strings.HasPrefix(e.Name(), prefix) {
			continue
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && changed(fi).After(then) {
			continue
		}
		if err == nil {
			err = ignoreAbsent(os.Remove(filepath.Join(dir, e.Name())))
		}
		if err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// removeTemporary removes what a crash left in a directory that should hold one
// file and does not, and the directory itself if that empties it.
func removeTemporary(dir string) error {
	err := sweepTemporary(dir)
	os.Remove(dir) // if it is empty
	return err
}

// sweepTemporary removes the driver's temporary files in a directory.
func sweepTemporary(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return ignoreAbsent(err)
	}
	for _, e := range entries {
		fi, err := e.Info()
		if err == nil && strings.HasSuffix(e.Name(), ".tmp") && time.Since(fi.ModTime()) > temporaryAge {
			err = os.Remove(filepath.Join(dir, e.Name()))
		}
		if ignoreAbsent(err) != nil {
			return err
		}
	}
	return nil
}
