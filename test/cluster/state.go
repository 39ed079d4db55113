package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// state is what has to be known to find a cluster again or to clean up after
// it. It is written before what it names comes to be.
type state struct {
	Name string `json:"name"`
	// Boot tells process ids of this run of the kernel from those before.
	Boot string `json:"boot"`
	// Owner is the process that the cluster ends with, until Detached.
	Owner    process `json:"owner"`
	Detached bool    `json:"detached"`
	// Block is the network, 10.<Block>.0.0/16.
	Block    byte           `json:"block"`
	Machines []machineState `json:"machines"`
	// Images are the archives that every node has loaded, in order.
	Images []string `json:"images"`
}

type machineState struct {
	Name string `json:"name"`
	// Number is 0 for the control plane, and counts the nodes from 1.
	Number int `json:"number"`
	// Layout is a node's.
	Layout Layout `json:"layout,omitempty"`
	// Process is the machine's process 1; zero while the machine is stopped.
	Process process `json:"process"`
}

// process names a process beyond the reuse of its id.
type process struct {
	PID int `json:"pid"`
	// Start is the time of start, in clock ticks since boot.
	Start uint64 `json:"start"`
}

// identify returns the process of that id.
func identify(pid int) (process, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, err
	}
	start, running, err := parseStat(string(data))
	if err == nil && !running {
		err = fs.ErrNotExist
	}
	return process{pid, start}, err
}

// parseStat reads the time of start from proc_pid_stat(5), and whether the
// process is more than a zombie. The second field may hold anything, spaces and
// parentheses too.
func parseStat(stat string) (start uint64, running bool, err error) {
	end := strings.LastIndexByte(stat, ')')
	f := strings.Fields(stat[end+1:])
	if end < 0 || len(f) < 20 {
		return 0, false, fmt.Errorf("cannot read the process status %q", stat)
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	return start, f[0] != "Z" && f[0] != "X", err
}

func (p process) alive() bool {
	if p.PID == 0 {
		return false
	}
	now, err := identify(p.PID)
	return err == nil && now == p
}

// kill ends the process and returns when it is gone. With process 1 of a
// machine goes everything in it.
func (p process) kill(ctx context.Context) error {
	for p.alive() {
		if err := unix.Kill(p.PID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("ending process %d: %w", p.PID, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("process %d does not end: %w", p.PID, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

// inUse tells whether somebody still wants the cluster.
func (s *state) inUse(boot string) bool {
	if s.Boot != boot {
		return false
	}
	if s.Detached {
		return len(s.Machines) > 0 && s.Machines[0].Process.alive()
	}
	return s.Owner.alive()
}

// store is the directory of all clusters of one user. Whoever changes which
// clusters there are holds its lock.
type store struct{ dir string }

func (s store) lock() (func(), error) {
	if err := os.MkdirAll(s.clusters(), 0o755); err != nil {
		return nil, err
	}
	return lock(filepath.Join(s.dir, "lock"))
}

func (s store) programs() string           { return filepath.Join(s.dir, "programs") }
func (s store) clusters() string           { return filepath.Join(s.dir, "clusters") }
func (s store) cluster(name string) string { return filepath.Join(s.clusters(), name) }
func (s store) tunables() string           { return filepath.Join(s.dir, "host-sysctls.json") }
func (s store) file(name string) string    { return filepath.Join(s.cluster(name), "state.json") }

// all reads the clusters there are. One whose state cannot be read was cut off
// before it had started anything.
func (s store) all() ([]*state, error) {
	entries, err := os.ReadDir(s.clusters())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var all []*state
	for _, e := range entries {
		st, err := s.read(e.Name())
		if err != nil {
			st = &state{Name: e.Name()}
		}
		all = append(all, st)
	}
	return all, nil
}

func (s store) read(name string) (*state, error) {
	data, err := os.ReadFile(s.file(name))
	if err != nil {
		return nil, err
	}
	var st state
	if err := json.Unmarshal(data, &st); err != nil {
		return nil, fmt.Errorf("reading %s: %w", s.file(name), err)
	}
	return &st, nil
}

// write replaces the state file as a whole.
func (s store) write(st *state) error {
	data, err := json.MarshalIndent(st, "", "  ")
	if err != nil {
		return err
	}
	temp := s.file(st.Name) + ".new"
	if err := os.WriteFile(temp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(temp, s.file(st.Name))
}

// claim registers a new cluster, after cleaning up after those that nobody
// wants any more.
func (s store) claim(ctx context.Context, name string) (*state, error) {
	unlock, err := s.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if err := s.sweep(ctx, boot); err != nil {
		return nil, err
	}
	if st, err := s.read(name); err == nil {
		return nil, fmt.Errorf("the cluster %s is up (process %d): take it down first, or give this one another name", name, st.Owner.PID)
	}
	used, err := hostNetworks()
	if err != nil {
		return nil, err
	}
	others, err := s.all()
	if err != nil {
		return nil, err
	}
	for _, o := range others {
		used = append(used, network{o.Block}.all())
	}
	n, err := freeNetwork(used)
	if err != nil {
		return nil, err
	}
	owner, err := identify(os.Getpid())
	if err != nil {
		return nil, err
	}
	if err := s.saveTunables(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.cluster(name), 0o755); err != nil {
		return nil, err
	}
	st := &state{Name: name, Boot: boot, Owner: owner, Block: n.block}
	return st, s.write(st)
}

// sweep removes every cluster that is not in use. The caller holds the lock.
func (s store) sweep(ctx context.Context, boot string) error {
	all, err := s.all()
	if err != nil {
		return err
	}
	for _, st := range all {
		if !st.inUse(boot) {
			if err := s.remove(ctx, st, boot); err != nil {
				return fmt.Errorf("cleaning up after the cluster %s: %w", st.Name, err)
			}
		}
	}
	return nil
}

// remove takes down what is left of a cluster. The caller holds the lock.
func (s store) remove(ctx context.Context, st *state, boot string) error {
	if st.Boot == boot {
		// The nodes first: the control plane's machine holds their file
		// systems.
		for i := len(st.Machines) - 1; i >= 0; i-- {
			if err := st.Machines[i].Process.kill(ctx); err != nil {
				return err
			}
		}
		if err := (network{st.Block}).disconnectHost(ctx); err != nil {
			return err
		}
		if err := removeCgroup(ctx, cgroupOf(st.Name)); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(s.cluster(st.Name)); err != nil {
		return err
	}
	left, err := s.all()
	if err != nil || len(left) > 0 {
		return err
	}
	return s.restoreTunables(st.Boot == boot)
}

// cgroupOf is the control group of a cluster; its nodes' lie beneath.
func cgroupOf(cluster string) string { return "/connected-registry-" + cluster }

// tunables are settings of the one kernel that a kubelet changes.
func tunables() []string {
	return []string{
		"kernel/keys/root_maxbytes", "kernel/keys/root_maxkeys",
		"kernel/panic", "kernel/panic_on_oops",
		"vm/overcommit_memory", "vm/panic_on_oom",
	}
}

// saveTunables notes the host's settings before the first cluster starts.
func (s store) saveTunables() error {
	if _, err := os.Stat(s.tunables()); err == nil {
		return nil
	}
	values := map[string]string{}
	for _, key := range tunables() {
		value, err := os.ReadFile(filepath.Join("/proc/sys", key))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		values[key] = string(value)
	}
	data, err := json.MarshalIndent(values, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(s.tunables(), data, 0o600)
}

// restoreTunables puts the settings back after the last cluster; after a
// restart of the machine there is nothing to put back.
func (s store) restoreTunables(sameBoot bool) error {
	data, err := os.ReadFile(s.tunables())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if sameBoot {
		var values map[string]string
		if err := json.Unmarshal(data, &values); err != nil {
			return fmt.Errorf("reading %s: %w", s.tunables(), err)
		}
		for key, value := range values {
			if err := os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0o644); err != nil {
				return err
			}
		}
	}
	return os.Remove(s.tunables())
}

func bootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(data)), err
}
