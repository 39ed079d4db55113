package agent

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/fsnotify/fsnotify"
)

// watcher tells when something changed in the hosts directory, or took it away.
// It watches directories, since files are replaced by renaming.
type watcher struct {
	*fsnotify.Watcher
	root  string // the node root
	certs string // the hosts directory, joined with the root
}

// newWatcher watches nothing yet. certs is inside root and free of symbolic
// links.
func newWatcher(root, certs string) (*watcher, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	root = filepath.Clean(root)
	return &watcher{Watcher: w, root: root, certs: filepath.Join(root, certs)}, nil
}

// isAt reports whether certs, as newWatcher takes it, is what is watched.
func (w *watcher) isAt(certs string) bool { return filepath.Join(w.root, certs) == w.certs }

// cover watches what exists now: the directories that lead to the hosts
// directory, and those in it. What is watched already stays so; one that
// vanishes meanwhile is noticed by the watch on its parent. grew says that some
// were not watched before, so that what happened there went unseen.
func (w *watcher) cover() (grew bool, err error) {
	dirs := []string{w.root}
	for dir := w.certs; len(dir) > len(w.root); dir = filepath.Dir(dir) {
		dirs = append(dirs, dir)
	}
	entries, err := os.ReadDir(w.certs)
	if err != nil && !isGone(err) {
		return false, err
	}
	watched := len(w.WatchList())
	for _, e := range entries {
		if e.IsDir() {
			dirs = append(dirs, filepath.Join(w.certs, e.Name()))
		}
	}
	var errs []error
	for _, dir := range dirs {
		if err := w.Add(dir); err != nil && !isGone(err) {
			errs = append(errs, err)
		}
	}
	return len(w.WatchList()) > watched, errors.Join(errs...)
}

// concerns reports whether an event is about the hosts directory, what is in
// it, or a directory that leads to it.
func (w *watcher) concerns(e fsnotify.Event) bool {
	return e.Name == w.certs ||
		strings.HasPrefix(e.Name, w.certs+"/") ||
		strings.HasPrefix(w.certs, strings.TrimSuffix(e.Name, "/")+"/")
}

func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}
