package storage

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// temporaryAge is how old a temporary file is when nobody writes to it any more.
const temporaryAge = time.Hour

// Swept says what crashes and clients that gave up had left.
type Swept struct {
	Uploads   int // that nobody went on with
	Temporary int // files
}

// sweep removes uploads that nobody has written to for uploadAge, temporary
// files, what is in the trash, and old files in quarantine.
func (s *Store) sweep(ctx context.Context, uploadAge, quarantineAge time.Duration) (Swept, error) {
	var swept Swept
	names, err := s.allRepositories()
	if err != nil {
		return swept, err
	}
	for name := range names {
		if ctx.Err() != nil {
			return swept, context.Cause(ctx)
		}
		n, err := s.sweepUploads(s.path(repositoriesRoot+name), time.Now().Add(-uploadAge))
		if err != nil {
			return swept, err
		}
		swept.Uploads += n
	}
	s.emptyTrash()
	err = eachDir(filepath.Join(s.root, limboDir), func(name string) error {
		if !strings.HasPrefix(name, doomedPrefix) {
			return nil
		}
		return s.discard(filepath.Join(s.root, limboDir, name))
	})
	if err != nil {
		return swept, err
	}
	for _, old := range []struct {
		dir, prefix string
		age         time.Duration
	}{
		{"", ".write-test-", temporaryAge},
		{journalDir, ".new-", temporaryAge},
		{usageDir, ".new-", temporaryAge},
		{quarantineDir, "", quarantineAge},
		{partialDir, "", uploadAge},
	} {
		n, err := s.sweepFiles(old.dir, old.prefix, time.Now().Add(-old.age))
		if err != nil {
			return swept, err
		}
		swept.Temporary += n
	}
	return swept, nil
}

// sweepUploads removes a repository's uploads that were last written to before
// then.
func (s *Store) sweepUploads(repository string, then time.Time) (n int, err error) {
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
		return ignoreAbsent(s.discard(dir))
	})
	return n, err
}

// sweepFiles removes the files in a directory below the root whose names begin
// with prefix and that were last written to before then.
func (s *Store) sweepFiles(dir, prefix string, then time.Time) (n int, err error) {
	dir = filepath.Join(s.root, dir)
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
