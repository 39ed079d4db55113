package e2e

import (
	"io/fs"
	"os"
	"testing"

	"github.com/connected-registry/connected-registry/test/cluster"
)

// ours are the places of a node that an installation may change.
var places = []string{"etc/containerd", "usr/local/share/ca-certificates", "etc/ssl/certs"}

// snapshot returns every file in these places: mode, content, or where a link
// leads.
func snapshot(t *testing.T, n *cluster.Node) map[string]string {
	t.Helper()
	root, err := os.OpenRoot(n.Root())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	all := map[string]string{}
	for _, place := range places {
		err := fs.WalkDir(root.FS(), place, func(name string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			text := info.Mode().String()
			switch info.Mode().Type() {
			case 0:
				data, err := root.ReadFile(name)
				if err != nil {
					return err
				}
				text += " " + string(data)
			case fs.ModeSymlink:
				target, err := root.Readlink(name)
				if err != nil {
					return err
				}
				text += " " + target
			}
			all[name] = text
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// writeNode writes a file on a node as its operator would.
func writeNode(t *testing.T, n *cluster.Node, dir, name, content string) {
	t.Helper()
	root, err := os.OpenRoot(n.Root())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := root.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := root.WriteFile(dir+"/"+name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func removeNode(t *testing.T, n *cluster.Node, path string) {
	t.Helper()
	root, err := os.OpenRoot(n.Root())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := root.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}
