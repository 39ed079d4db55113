package trust

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func openRoot(t testing.TB, dir string) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = root.Close() })
	return root
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	write := func(data string, mode os.FileMode) bool {
		t.Helper()
		changed, err := WriteFile(root, "a.key", []byte(data), mode)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(filepath.Join(dir, "a.key"))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != mode {
			t.Errorf("mode = %v, want %v", info.Mode(), mode)
		}
		return changed
	}
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	if !write("one", 0o644) {
		t.Error("a new file is no change")
	}
	before, _ := os.Stat(filepath.Join(dir, "a.key"))
	if write("one", 0o644) {
		t.Error("equal bytes are a change")
	}
	after, _ := os.Stat(filepath.Join(dir, "a.key"))
	if !os.SameFile(before, after) || before.ModTime() != after.ModTime() {
		t.Error("equal bytes were written")
	}
	if !write("one", 0o600) {
		t.Error("another mode is no change")
	}
	if !write("two", 0o600) {
		t.Error("other bytes of the same length are no change")
	}
	if diff := cmp.Diff(map[string]string{"/a.key": "-rw------- two"}, readTree(t, dir)); diff != "" {
		t.Error(diff)
	}
}

func TestWriteFileReplacesALinkAndNotItsTarget(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"target": "theirs"})
	if err := os.Symlink("target", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := WriteFile(openRoot(t, dir), "link", []byte("ours"), 0o644); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"/target": "-rw-r--r-- theirs", "/link": "-rw-r--r-- ours"}
	if diff := cmp.Diff(want, readTree(t, dir)); diff != "" {
		t.Error(diff)
	}
}

func TestWriteFileStaysInside(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	if err := os.Symlink(outside, filepath.Join(dir, "out")); err != nil {
		t.Fatal(err)
	}
	root := openRoot(t, dir)
	for _, name := range []string{"out/a", "../a", "out"} {
		_, err := WriteFile(root, name, []byte("x"), 0o644)
		if name != "out" && err == nil {
			t.Errorf("%s was written", name)
		}
	}
	if got := readTree(t, outside); len(got) != 0 {
		t.Errorf("outside there is %v", got)
	}
}

func TestWriteFileThatFailsLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	writeTree(t, dir, map[string]string{"file": "before", "dir/x": ""})
	for _, name := range []string{"dir", "file/below", "missing/below"} {
		if _, err := WriteFile(root, name, []byte("x"), 0o644); err == nil {
			t.Errorf("%s was written", name)
		}
	}
	for name := range readTree(t, dir) {
		if strings.Contains(name, tempPrefix) {
			t.Errorf("%s is left behind", name)
		}
	}
}

func TestReadRefusesWhatIsNoFile(t *testing.T) {
	dir := t.TempDir()
	d := &disk{root: openRoot(t, dir)}
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := d.read("fifo"); err == nil {
		t.Error("a pipe was read")
	}
	if err := os.WriteFile(filepath.Join(dir, "big"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "big"), maxFileBytes+1); err != nil {
		t.Fatal(err)
	}
	_, err := d.read("big")
	mustContain(t, err, "big", "larger than")
}

func TestRemoveFile(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	writeTree(t, dir, map[string]string{"a": ""})
	for i, want := range []bool{true, false} {
		if removed, err := RemoveFile(root, "a"); err != nil || removed != want {
			t.Errorf("removal %d: %v, %v", i, removed, err)
		}
	}
}

func TestTempNamesAreReadByNobody(t *testing.T) {
	for range 100 {
		name := tempName()
		for _, ext := range []string{".crt", ".cert", ".key", ".pem", ".toml"} {
			if strings.HasSuffix(strings.ToLower(name), ext) {
				t.Errorf("temporary name %s", name)
			}
		}
	}
}

func TestResolve(t *testing.T) {
	root, outside := t.TempDir(), t.TempDir()
	writeTree(t, root, map[string]string{"real/deep/file": "", "etc/x": ""})
	for name, target := range map[string]string{
		"etc/relative": "../real/deep",
		"etc/absolute": "/real/deep",
		"etc/chain":    "relative",
		"etc/out":      "../../../../../../../../.." + outside,
		"etc/absout":   outside,
		"etc/dangling": "/nowhere/at/all",
		"etc/loop":     "loop",
	} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	d := &disk{root: openRoot(t, root)}
	for name, want := range map[string]string{
		"/etc/containerd/certs.d": "etc/containerd/certs.d",
		"/etc/relative":           "real/deep",
		"/etc/absolute":           "real/deep",
		"/etc/chain":              "real/deep",
		"/etc/chain/new/dir":      "real/deep/new/dir",
		"/etc/absolute/../new":    "real/new",
		"/":                       ".",
	} {
		if got, err := d.resolve(name); err != nil || got != want {
			t.Errorf("resolve(%q) = %q, %v; want %q", name, got, err, want)
		}
	}
	for name, want := range map[string]string{
		"/etc/out":      "out of the node root",
		"/etc/absout":   "does not exist in the node root",
		"/etc/dangling": "does not exist in the node root",
		"/etc/loop":     "too many",
		"/etc/x/below":  "not a directory",
	} {
		_, err := d.resolve(name)
		mustContain(t, err, want, "/etc/")
	}
}
