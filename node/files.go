package node

import (
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/connected-registry/connected-registry/trust"
)

// files is what is read of a node. Names are absolute, inside the node root.
type files interface {
	read(name string) ([]byte, error)
	// list returns the names in a directory, sorted.
	list(dir string) ([]string, error)
}

// rootFiles are those of a node root.
type rootFiles struct{ root *os.Root }

func (r rootFiles) read(name string) ([]byte, error) { return trust.ReadFile(r.root, name) }

func (r rootFiles) list(dir string) ([]string, error) {
	name, err := trust.ResolvePath(r.root, dir)
	if err != nil {
		return nil, err
	}
	entries, err := fs.ReadDir(r.root.FS(), name)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

// exists reports whether something is there.
func (r rootFiles) exists(name string) bool {
	real, err := trust.ResolvePath(r.root, name)
	if err != nil {
		return false
	}
	_, err = r.root.Lstat(real)
	return err == nil
}

// overlay is a node with one file as it would be.
type overlay struct {
	files
	name string
	data []byte
}

func (o overlay) read(name string) ([]byte, error) {
	if name == o.name {
		return o.data, nil
	}
	return o.files.read(name)
}

func (o overlay) list(dir string) ([]string, error) {
	names, err := o.files.list(dir)
	if dir != path.Dir(o.name) {
		return names, err
	}
	if base := path.Base(o.name); !slices.Contains(names, base) {
		names = append(slices.Clone(names), base)
		slices.Sort(names)
	}
	return names, nil
}

// glob expands a pattern with wildcards in its last element; those in others
// are not expanded by any distribution that we know, and match nothing here.
func glob(f files, pattern string) ([]string, error) {
	dir := path.Dir(pattern)
	names, err := f.list(dir)
	if err != nil {
		return nil, nil //nolint:nilerr // as filepath.Glob, which ignores what it cannot read
	}
	var out []string
	for _, n := range names {
		ok, err := path.Match(path.Base(pattern), n)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, path.Join(dir, n))
		}
	}
	return out, nil
}

// isPattern reports whether containerd expands an import: an asterisk alone
// makes it a pattern.
func isPattern(name string) bool { return strings.Contains(name, "*") }
