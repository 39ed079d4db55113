package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// separate lists the directories of the host that may be file systems of their
// own, which an overlay over / alone would show empty.
func separate() []string { return []string{"/usr", "/etc", "/var", "/opt", "/srv"} }

// setup lays out the machine's file system. The caller's mount namespace is
// its own and private.
func setup(spec Spec) error {
	if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
		return fmt.Errorf("setting the host name to %s: %w", spec.Hostname, err)
	}
	root := "/"
	if spec.Overlay != "" {
		var err error
		if root, err = overlay(spec); err != nil {
			return err
		}
		if err := kernelMounts(root); err != nil {
			return err
		}
	} else if err := mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	for _, dir := range spec.Tmpfs {
		if err := mount("tmpfs", filepath.Join(root, dir), "tmpfs", 0, "mode=0755"); err != nil {
			return err
		}
	}
	for _, b := range spec.Binds {
		if err := bind(root, b); err != nil {
			return err
		}
	}
	if spec.Overlay != "" {
		if err := pivot(root); err != nil {
			return err
		}
	}
	return sysctls(spec.Sysctls)
}

// overlay mounts the host's root, with a writable layer above it, and returns
// where.
func overlay(spec Spec) (string, error) {
	root := filepath.Join(spec.Overlay, "root")
	upper := filepath.Join(spec.Overlay, "upper")
	_, err := os.Stat(upper)
	first := errors.Is(err, fs.ErrNotExist)

	if err := overlayMount("/", root, spec.Overlay, ""); err != nil {
		return "", err
	}
	for _, dir := range separate() {
		other, err := otherDevice(dir)
		if err != nil {
			return "", err
		}
		if !other {
			continue
		}
		if err := overlayMount(dir, filepath.Join(root, dir), spec.Overlay, strings.ReplaceAll(dir, "/", "-")); err != nil {
			return "", err
		}
	}
	if !first {
		return root, nil
	}
	for _, path := range spec.Remove {
		if err := os.RemoveAll(filepath.Join(root, path)); err != nil {
			return "", fmt.Errorf("hiding the host's %s: %w", path, err)
		}
	}
	return root, nil
}

// overlayMount mounts lower at target with its writable layer in dir.
func overlayMount(lower, target, dir, suffix string) error {
	upper, work := filepath.Join(dir, "upper"+suffix), filepath.Join(dir, "work"+suffix)
	for _, d := range []string{upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	return mount("overlay", target, "overlay", 0,
		"lowerdir="+lower+",upperdir="+upper+",workdir="+work)
}

// otherDevice tells whether dir is a file system other than the root's.
func otherDevice(dir string) (bool, error) {
	var root, st unix.Stat_t
	if err := unix.Lstat("/", &root); err != nil {
		return false, err
	}
	err := unix.Lstat(dir, &st)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Dev != root.Dev, err
}

// kernelMounts adds /proc, /sys and /dev. /sys is mounted afresh, so that it
// shows the machine's own network devices, with the host's control groups
// beneath it.
func kernelMounts(root string) error {
	if err := mount("proc", filepath.Join(root, "proc"), "proc", 0, ""); err != nil {
		return err
	}
	if err := mount("sysfs", filepath.Join(root, "sys"), "sysfs", 0, ""); err != nil {
		return err
	}
	for _, dir := range []string{"sys/fs/cgroup", "dev"} {
		if err := mount("/"+dir, filepath.Join(root, dir), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
	}
	return nil
}

func bind(root string, b Bind) error {
	target := filepath.Join(root, b.Target)
	if err := mount(b.Source, target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if !b.ReadOnly {
		return nil
	}
	return mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mounting %s %s on %s: %w", kind, source, target, err)
	}
	return nil
}

// pivot makes root the root of the mount namespace and lets the old one go.
// Mounts propagate from then on, as the kubelet asks of its host.
func pivot(root string) error {
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("changing to %s: %w", root, err)
	}
	// The old root is stacked under the new one, so no directory for it shows
	// in the machine.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("making %s the root: %w", root, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("letting the host's root go: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("sharing the mounts: %w", err)
	}
	return nil
}

func sysctls(values map[string]string) error {
	keys := make([]string, 0, len(values))
	for key := range values {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for _, key := range keys {
		path := filepath.Join("/proc/sys", strings.ReplaceAll(key, ".", "/"))
		err := os.WriteFile(path, []byte(values[key]), 0o644)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("setting %s to %s: %w", key, values[key], err)
		}
	}
	return nil
}
