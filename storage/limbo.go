package storage

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// limboDir holds what the collector has condemned and not deleted yet, each
// directory at the path that it had in the tree. Whoever asks for something in
// limbo gets it: the asking brings it back. So a process that has just seen a
// blob, or is about to link to one, cannot have it taken away under its hands,
// and none of them needs a lock to say so.
const limboDir = "limbo"

// renewTime is how old the time of a link may be when it is used before it is
// renewed: links in steady use cost one write an hour.
const renewTime = time.Hour

func (s *Store) limboPath(driverPath string) string {
	return filepath.Join(s.root, limboDir, driverPath)
}

// condemn moves a directory of the tree, given as a driver path, to limbo.
func (s *Store) condemn(dir string) error {
	from, to := s.path(dir), s.limboPath(dir)
	if err := os.MkdirAll(filepath.Dir(to), 0o777); err != nil {
		return err
	}
	// What was condemned before has been replaced since.
	if err := s.discard(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
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

// rescue brings a file back from limbo, and reports whether it is in the tree
// now. A link is as good as new then.
func (s *Store) rescue(driverPath string) bool {
	from, to := s.limboPath(driverPath), s.path(driverPath)
	if _, err := os.Lstat(from); err != nil {
		return false
	}
	if path.Base(driverPath) == "link" {
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
	if err != nil {
		_, gone := os.Lstat(to)
		return gone == nil // somebody else was faster
	}
	return true
}

// discard makes a file or directory on disk vanish in one step, and takes it
// apart afterwards.
func (s *Store) discard(file string) error {
	trash, err := s.take(file)
	if err != nil {
		return err
	}
	return os.RemoveAll(trash)
}

// take moves a file or directory on disk to the trash. It makes no directory, so
// that what is deleted to free space needs none.
func (s *Store) take(file string) (trash string, err error) {
	trash = filepath.Join(s.root, trashDir, rand.Text())
	return trash, os.Rename(file, trash)
}

// follow returns what the link at a driver path names, and renews it: a link
// that is used is not old. The error is fs.ErrNotExist when there is none, or
// one that holds no digest.
func (s *Store) follow(link string, d digest.Digest) (digest.Digest, error) {
	file := s.path(link)
	modified, target, err := s.look(file, d)
	if errors.Is(err, fs.ErrNotExist) && s.rescue(link) {
		modified, target, err = s.look(file, d)
	}
	if err == nil && time.Since(modified) > s.renewAfter {
		now := time.Now()
		err = os.Chtimes(file, now, now)
		if errors.Is(err, fs.ErrNotExist) && s.rescue(link) {
			err = nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			err = nil // a file system that is read-only has no collector either
		}
	}
	if err != nil {
		return "", err
	}
	return target, nil
}

// look finds out when the link for d was last used, and what it names. Only a
// link that is called by another algorithm than distribution's own can name
// something else, so that most need not be read.
func (s *Store) look(file string, d digest.Digest) (modified time.Time, target digest.Digest, err error) {
	modified, size, err := statFile(file)
	if err != nil {
		return time.Time{}, "", err
	}
	if d.Algorithm() == digest.Canonical {
		if size != int64(len(d)) {
			return time.Time{}, "", &fs.PathError{Op: "readlink", Path: file, Err: fs.ErrNotExist}
		}
		return modified, d, nil
	}
	target, err = readLinkFile(file)
	return modified, target, err
}

// isLink recognises the driver path of the link by which a repository holds a
// layer or a manifest.
func isLink(driverPath string) (d digest.Digest, ok bool) {
	rest, ok := strings.CutSuffix(driverPath, "/link")
	if !ok || !strings.HasPrefix(rest, repositoriesRoot) {
		return "", false
	}
	rest, hex := path.Split(rest)
	rest, alg := path.Split(strings.TrimSuffix(rest, "/"))
	if !strings.HasSuffix(rest, "/_layers/") && !strings.HasSuffix(rest, "/_manifests/revisions/") {
		return "", false
	}
	d = digest.Digest(alg + ":" + hex)
	return d, d.Validate() == nil
}

// require makes sure that a blob which has just been linked to is there, and
// returns its size. The collector looks for links after it has condemned, and
// this looks for the blob after it was linked, so that one of the two sees the
// other.
func (s *Store) require(d digest.Digest) (size int64, err error) {
	if !validDigest(d) {
		return 0, nil // damaged, and so as good as absent
	}
	_, size, err = statFile(s.path(blobPath(d)))
	if errors.Is(err, fs.ErrNotExist) && s.rescue(blobPath(d)) {
		_, size, err = statFile(s.path(blobPath(d)))
	}
	if err != nil {
		return 0, fmt.Errorf("linking to %s: %w", d, err)
	}
	return size, nil
}

// parseTagPath recognises the driver path of the link that says what a tag
// names.
func (s *Store) parseTagPath(driverPath string) (r Repository, ok bool) {
	rest, ok := strings.CutSuffix(driverPath, "/current/link")
	if !ok || !strings.HasPrefix(rest, repositoriesRoot) {
		return Repository{}, false
	}
	tags, ok := strings.CutSuffix(path.Dir(rest), "/_manifests/tags")
	if !ok {
		return Repository{}, false
	}
	r, err := s.Repository(strings.TrimPrefix(tags, repositoriesRoot))
	return r, err == nil
}

// releaseTag is called before a tag moves or goes. The manifest that it names is
// kept for as long from then on as one that has just been pushed.
func (r Repository) releaseTag(tagLink string) {
	d, err := r.store.readLink(tagLink)
	if err != nil {
		return
	}
	now := time.Now()
	// It may be gone already, or on a file system that is read-only.
	_ = os.Chtimes(r.store.path(linkPath(r.path+"/_manifests/revisions/", d)), now, now)
}
