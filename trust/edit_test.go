package trust

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	editedFile = "/etc/containerd/config.toml"
	addedFile  = "/etc/containerd/conf.d/ours.toml"
)

// editable is a node root with a runtime configuration, and the store for it.
func editable(t *testing.T, before func(string)) (root string, store *Store) {
	t.Helper()
	root = t.TempDir()
	write(t, root, editedFile, "version = 2\n")
	store, err := NewStore(StoreConfig{NodeRoot: root, Grace: -1, BeforeStep: before})
	if err != nil {
		t.Fatal(err)
	}
	return root, store
}

func write(t *testing.T, root, name, text string) {
	t.Helper()
	name = filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o640); err != nil {
		t.Fatal(err)
	}
}

func files(t *testing.T, root string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(root, func(name string, d os.DirEntry, err error) error {
		if err != nil || name == root {
			return err
		}
		rel, _ := filepath.Rel(root, name)
		if d.IsDir() {
			found[rel] = "directory"
			return nil
		}
		data, err := os.ReadFile(name)
		info, _ := d.Info()
		found[rel] = info.Mode().String() + " " + string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func putFile(t *testing.T, s *Store, name, text string) bool {
	t.Helper()
	changed, err := s.Put(t.Context(), name, []byte(text), 0o644)
	if err != nil {
		t.Fatal(err)
	}
	return changed
}

// TestPut: what is put stays through an Apply, and goes with Undo or Cleanup.
func TestPut(t *testing.T) {
	for _, undo := range []string{"undo", "cleanup"} {
		t.Run(undo, func(t *testing.T) {
			root, store := editable(t, nil)
			before := files(t, root)
			if !putFile(t, store, editedFile, "first") || putFile(t, store, editedFile, "first") {
				t.Error("Put does not tell a change from none")
			}
			putFile(t, store, editedFile, "second")
			putFile(t, store, addedFile, "added")
			after := files(t, root)
			if _, err := store.Apply(t.Context(), State{}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(after, files(t, root)); diff != "" {
				t.Errorf("an Apply changed what was put (-before +after):\n%s", diff)
			}
			if undo == "undo" {
				for _, name := range []string{editedFile, addedFile} {
					if _, err := store.Undo(t.Context(), name); err != nil {
						t.Fatal(err)
					}
				}
			}
			if result, err := store.Cleanup(t.Context()); err != nil || len(result.Notes) > 0 {
				t.Fatal(result.Notes, err)
			}
			if diff := cmp.Diff(before, files(t, root)); diff != "" {
				t.Errorf("not as it was (-want +got):\n%s", diff)
			}
		})
	}
}

// TestPutThenChanged: what somebody has changed since is theirs.
func TestPutThenChanged(t *testing.T) {
	root, store := editable(t, nil)
	putFile(t, store, editedFile, "ours")
	putFile(t, store, addedFile, "ours")
	write(t, root, editedFile, "theirs")
	write(t, root, addedFile, "theirs")
	result, err := store.Cleanup(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(result.Notes) < 2 {
		t.Errorf("notes %q, want one for each file", result.Notes)
	}
	for _, name := range []string{editedFile, addedFile} {
		if data, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(data) != "theirs" {
			t.Errorf("%s: %q, %v: want what somebody wrote", name, data, err)
		}
	}
}

// TestPutKilled ends Put before each of its steps: the file is one or the other,
// and a cleanup finds the way back.
func TestPutKilled(t *testing.T) {
	for step := 0; ; step++ {
		n := 0
		root, store := editable(t, func(string) {
			if n++; n > step {
				panic("killed")
			}
		})
		before := files(t, root)
		killed := func() (killed bool) {
			defer func() { killed = recover() != nil }()
			_, _ = store.Put(context.Background(), editedFile, []byte("ours"), 0o644)
			_, _ = store.Put(context.Background(), addedFile, []byte("ours"), 0o644)
			return false
		}()
		if data, err := os.ReadFile(filepath.Join(root, editedFile)); err != nil || string(data) != "ours" && string(data) != "version = 2\n" {
			t.Errorf("killed at step %d: %q, %v", step, data, err)
		}
		again, err := NewStore(StoreConfig{NodeRoot: root, Grace: -1})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := again.Cleanup(t.Context()); err != nil {
			t.Fatalf("killed at step %d: %v", step, err)
		}
		if diff := cmp.Diff(before, files(t, root)); diff != "" {
			t.Errorf("killed at step %d, then cleaned up (-want +got):\n%s", step, diff)
		}
		if !killed {
			return
		}
	}
}

// TestReadFile: absolute links begin at the node root.
func TestReadFile(t *testing.T) {
	dir, _ := editable(t, nil)
	link(t, dir, "/etc/containerd", "etc/other")
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	data, err := ReadFile(root, "/etc/other/config.toml")
	if err != nil || string(data) != "version = 2\n" {
		t.Errorf("%q, %v", data, err)
	}
}
