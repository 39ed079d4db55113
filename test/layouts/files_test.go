package layouts

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"strings"
	"testing"

	"github.com/connected-registry/connected-registry/test/cluster"
)

// places are those of a node that an installation may change.
var places = []string{"etc/containerd", "var/lib/rancher/k3s/agent/etc", "usr/local/share/ca-certificates", "etc/ssl/certs"}

// snapshot returns every file in these places: mode, content, or where a link
// leads.
func snapshot(t *testing.T, n *cluster.Node) map[string]string {
	t.Helper()
	root := open(t, n)
	defer root.Close()
	all := map[string]string{}
	for _, place := range places {
		err := fs.WalkDir(root.FS(), place, func(name string, d fs.DirEntry, err error) error {
			if name == place && errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil {
				all[name], err = describe(root, name)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

func describe(root *os.Root, name string) (string, error) {
	info, err := root.Lstat(name)
	if err != nil {
		return "", err
	}
	text := info.Mode().String()
	switch info.Mode().Type() {
	case 0:
		data, err := root.ReadFile(name)
		return text + " " + string(data), err
	case fs.ModeSymlink:
		target, err := root.Readlink(name)
		return text + " " + target, err
	}
	return text, nil
}

// appendFile adds to a file on a node, or makes it, as its operator would.
func appendFile(t *testing.T, n *cluster.Node, name, text string) {
	t.Helper()
	root := open(t, n)
	defer root.Close()
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := root.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// cutFile takes away what appendFile added, and the file and its directory if
// nothing else is there.
func cutFile(t *testing.T, n *cluster.Node, name, text string) {
	t.Helper()
	root := open(t, n)
	defer root.Close()
	data, err := root.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	rest, found := strings.CutSuffix(string(data), text)
	if !found {
		t.Errorf("%s: %s has changed since its operator did:\n%s", n.Name(), name, data)
	}
	if rest != "" {
		err = root.WriteFile(name, []byte(rest), 0o644)
	} else if err = root.Remove(name); err == nil {
		err = root.Remove(path.Dir(name))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// open is to be closed before the node is stopped.
func open(t *testing.T, n *cluster.Node) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(n.Root())
	if err != nil {
		t.Fatal(err)
	}
	return root
}
