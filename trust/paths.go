package trust

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
)

// maxLinks is how many symbolic links the kernel follows in one path.
const maxLinks = 40

// resolve returns name, a path inside the node root, without symbolic links:
// relative to the root and in the form of [fs.ValidPath]. As in a chroot, an
// absolute link begins at the node root; os.Root alone would refuse it, but
// on a node it is as good as any other. What does not exist yet stays as it is,
// unless it is a link that says it should. A link that climbs out of the root
// is refused.
func (d *disk) resolve(name string) (string, error) {
	todo := pathElements(name)
	done := "."
	// While more than rest elements are to do, they come from a link.
	rest := len(todo)
	for links := 0; len(todo) > 0; {
		if todo[0] == ".." {
			if done == "." {
				return "", fmt.Errorf("/%s leads out of the node root: make it a directory, or a link to one inside", strings.TrimPrefix(name, "/"))
			}
			done, todo = path.Dir(done), todo[1:]
			continue
		}
		next := path.Join(done, todo[0])
		info, err := d.root.Lstat(next)
		if errors.Is(err, fs.ErrNotExist) {
			if len(todo) > rest {
				return "", fmt.Errorf("/%s is, or is below, a symbolic link to /%s, which does not exist in the node root: create that directory, or replace the link", strings.TrimPrefix(name, "/"), path.Join(append([]string{done}, todo...)...))
			}
			return cleanJoin(done, todo)
		}
		if err != nil {
			return "", err
		}
		todo = todo[1:]
		if info.Mode().Type() != fs.ModeSymlink {
			if len(todo) > 0 && !info.IsDir() {
				return "", fmt.Errorf("/%s is not a directory: move it away", next)
			}
			done = next
			continue
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("/%s: too many symbolic links", strings.TrimPrefix(name, "/"))
		}
		target, err := d.root.Readlink(next)
		if err != nil {
			return "", err
		}
		rest = min(rest, len(todo))
		if path.IsAbs(target) {
			done = "."
		}
		todo = append(pathElements(target), todo...)
	}
	return done, nil
}

// cleanJoin appends elements that do not exist, among which ".." means nothing.
func cleanJoin(done string, todo []string) (string, error) {
	for _, e := range todo {
		if e == ".." {
			return "", fmt.Errorf("/%s/%s: a path must not go up from what does not exist", done, strings.Join(todo, "/"))
		}
	}
	return path.Join(append([]string{done}, todo...)...), nil
}

// pathElements splits a path, absolute or not, leaving out what means nothing.
func pathElements(p string) []string {
	var out []string
	for e := range strings.SplitSeq(p, "/") {
		if e != "" && e != "." {
			out = append(out, e)
		}
	}
	return out
}

// missing returns the directories that have to be created for dir to exist,
// parents first.
func (d *disk) missing(dir string) ([]string, error) {
	var out []string
	for ; dir != "."; dir = path.Dir(dir) {
		info, err := d.root.Lstat(dir)
		if err == nil {
			if !info.IsDir() {
				return nil, fmt.Errorf("/%s is not a directory: move it away", dir)
			}
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		out = append([]string{dir}, out...)
	}
	return out, nil
}
