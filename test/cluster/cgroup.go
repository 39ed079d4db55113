package cluster

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// hierarchy is one mounted control group file system.
type hierarchy struct {
	mount string
	v2    bool
}

// hierarchies reads the mounts of /proc/self/mountinfo (proc_pid_mountinfo(5)).
func hierarchies(mountinfo []byte) []hierarchy {
	var all []hierarchy
	lines := bufio.NewScanner(bytes.NewReader(mountinfo))
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(kind) < 1 || !strings.HasPrefix(fields[4], "/sys/fs/cgroup") {
			continue
		}
		if h := (hierarchy{fields[4], kind[0] == "cgroup2"}); h.v2 || kind[0] == "cgroup" {
			all = append(all, h)
		}
	}
	slices.SortFunc(all, func(a, b hierarchy) int { return strings.Compare(a.mount, b.mount) })
	return slices.Compact(all)
}

func mounted() ([]hierarchy, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	all := hierarchies(data)
	if len(all) == 0 {
		return nil, errors.New("no control groups under /sys/fs/cgroup: mount cgroup2 there")
	}
	return all, nil
}

// makeCgroup makes the group path, which starts with a slash, in every
// hierarchy, with every controller usable beneath it.
func makeCgroup(path string) error {
	all, err := mounted()
	if err != nil {
		return err
	}
	for _, h := range all {
		dir := h.mount
		for part := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
			parent := dir
			dir = filepath.Join(dir, part)
			if h.v2 {
				err = delegate(parent)
			}
			if err == nil {
				err = os.MkdirAll(dir, 0o755)
			}
			if err == nil && !h.v2 {
				err = inheritCpuset(parent, dir)
			}
			if err != nil {
				return fmt.Errorf("making the control group %s: %w", dir, err)
			}
		}
		if h.v2 {
			if err := delegate(dir); err != nil {
				return fmt.Errorf("preparing the control group %s: %w", dir, err)
			}
		}
	}
	return nil
}

// delegate makes every controller of a version 2 group available to its
// children.
func delegate(dir string) error {
	available, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	enabled, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	if err != nil {
		return err
	}
	have := strings.Fields(string(enabled))
	for _, c := range strings.Fields(string(available)) {
		if slices.Contains(have, c) {
			continue
		}
		// One at a time: a controller that cannot be had here, rdma for
		// instance, must not cost the others.
		err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0o644)
		if err != nil && slices.Contains([]string{"cpu", "cpuset", "memory", "pids"}, c) {
			return fmt.Errorf("enabling the controller %s (are there processes in this very group?): %w", c, err)
		}
	}
	return nil
}

// inheritCpuset copies what a version 1 cpuset group starts without and can
// hold no process without.
func inheritCpuset(parent, dir string) error {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		value, err := os.ReadFile(filepath.Join(parent, file))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, file), value, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// removeCgroup removes the group and those beneath it, waiting for the kernel
// to let processes go that were killed a moment ago.
func removeCgroup(ctx context.Context, path string) error {
	all, err := mounted()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for _, h := range all {
		for {
			err := removeTree(filepath.Join(h.mount, path))
			if err == nil {
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("removing the control group %s%s: %w", h.mount, path, err)
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	return nil
}

func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
