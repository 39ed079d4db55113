package storage

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
)

// tidy removes what has lost its meaning: entries in the lists of referrers, the
// memory that a tag has of manifests that it once named, empty directories.
func (c *collection) tidy(r Repository, have contents, keep map[digest.Digest]bool) error {
	known := make(map[digest.Digest]bool)
	for _, l := range have.revisions {
		known[l.name] = keep[l.name] || l.condemned.IsZero() || l.condemned.After(c.settled)
	}
	referrers := c.store.path(r.path + "/_referrers")
	err := eachFile(referrers, func(file string, e fs.DirEntry) error {
		if d, ok := parseEntryDigest(e.Name()); ok && known[d] || !c.old(e) {
			return nil
		}
		return ignoreAbsent(os.Remove(file))
	})
	if err != nil {
		return err
	}
	for tag, current := range have.tags {
		index := c.store.path(r.path + "/_manifests/tags/" + tag + "/index")
		err := eachFile(index, func(file string, e fs.DirEntry) error {
			alg, hex := filepath.Base(filepath.Dir(filepath.Dir(file))), filepath.Base(filepath.Dir(file))
			d := digest.Digest(alg + ":" + hex)
			if d == current || known[d] || !c.old(e) {
				return nil
			}
			return ignoreAbsent(c.store.discard(filepath.Dir(file)))
		})
		if err != nil {
			return err
		}
	}
	return pruneEmpty(c.store.path(r.path), len(have.tags)+len(have.revisions)+len(have.layers) == 0)
}

func (c *collection) old(e fs.DirEntry) bool {
	fi, err := e.Info()
	return err == nil && !fi.ModTime().After(c.cutoff)
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

// pruneEmpty removes the empty directories among a repository's own, and the
// repository with them if all is. Whoever is about to put something there makes
// the directory again.
func pruneEmpty(repository string, all bool) error {
	entries, err := os.ReadDir(repository)
	if err != nil {
		return ignoreAbsent(err)
	}
	for _, e := range entries {
		// A repository without a tag still has a list of them.
		if e.IsDir() && (e.Name() == "_referrers" || all && strings.HasPrefix(e.Name(), "_")) {
			if err := removeEmpty(filepath.Join(repository, e.Name())); err != nil {
				return err
			}
		}
	}
	if all {
		os.Remove(repository) // if it is empty; other repositories may be below it
	}
	return nil
}

// removeEmpty removes dir and the directories below it that are empty.
func removeEmpty(dir string) error {
	err := eachDir(dir, func(name string) error { return removeEmpty(filepath.Join(dir, name)) })
	os.Remove(dir) // if it is empty
	return err
}
