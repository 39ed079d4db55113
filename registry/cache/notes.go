package cache

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// notes keeps small strings on disk, one file each, under keys that do not tell
// what they are about: the digest that a tag last named, the challenge that a
// repository last gave. Losing one costs nothing while upstreams answer.
type notes struct {
	dir string
}

func (n notes) path(k factKey) string {
	name := hex.EncodeToString(k[:])
	return filepath.Join(n.dir, name[:2], name)
}

// get returns "" for a note that is not there or cannot be read.
func (n notes) get(k factKey) string {
	b, err := os.ReadFile(n.path(k))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

// put writes the note, or only marks it as used if it already says so.
func (n notes) put(k factKey, text string) error {
	path := n.path(k)
	if n.get(k) == text {
		now := time.Now()
		return os.Chtimes(path, now, now)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return replaceFile(path, []byte(text+"\n"), false)
}

func (n notes) forget(k factKey) {
	os.Remove(n.path(k)) // what is not there is forgotten already
}

// tag returns the digest noted under k, "" if there is none.
func (n notes) tag(k factKey) digest.Digest {
	d := digest.Digest(n.get(k))
	if d.Validate() != nil {
		return ""
	}
	return d
}

// prune removes the notes not used since before, and files that a crash left.
func (n notes) prune(before time.Time) {
	dirs, _ := os.ReadDir(n.dir)
	for _, dir := range dirs {
		files, _ := os.ReadDir(filepath.Join(n.dir, dir.Name()))
		for _, f := range files {
			if fi, err := f.Info(); err == nil && fi.ModTime().Before(before) {
				os.Remove(filepath.Join(n.dir, dir.Name(), f.Name()))
			}
		}
	}
}
