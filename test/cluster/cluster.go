package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/connected-registry/connected-registry/test/cluster/internal/machine"
)

// StorageClass is the default StorageClass: ReadWriteMany volumes that every
// node sees, made for a claim and removed with it.
const StorageClass = "shared"

// startTimeout bounds one step of a start: the API server answering, a node
// becoming ready. It has room for a machine that is busy compiling.
const startTimeout = 3 * time.Minute

// Config says what cluster to start.
type Config struct {
	// Name tells clusters on one host apart: lower-case letters, digits and
	// hyphens, at most 20. Zero: "test".
	Name string
	// Dir holds the compiled programs and the clusters' files, on a file
	// system that is no overlay. Zero: connected-registry/cluster in the
	// user's cache directory.
	Dir string
	// Nodes is how many nodes to start with. Zero: 2. Negative: none.
	Nodes int
	// Layouts are those of the first nodes, in order. Every further node has
	// the zero Layout.
	Layouts []Layout
	// CertManager installs cert-manager's resource definitions and runs its
	// controllers beside the control plane.
	CertManager bool
	// Log tells of the steps. Zero: none are told.
	Log *slog.Logger
}

func (c Config) withDefaults() (Config, error) {
	if c.Name == "" {
		c.Name = "test"
	}
	if !regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?$`).MatchString(c.Name) {
		return c, fmt.Errorf("cluster name %q: want at most 20 lower-case letters, digits and hyphens", c.Name)
	}
	if c.Dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return c, fmt.Errorf("finding the cache directory (or set Dir): %w", err)
		}
		c.Dir = filepath.Join(cache, "connected-registry", "cluster")
	}
	switch {
	case c.Nodes == 0:
		c.Nodes = 2
	case c.Nodes < 0:
		c.Nodes = 0
	case c.Nodes > maxNodes:
		return c, fmt.Errorf("%d nodes: at most %d", c.Nodes, maxNodes)
	}
	for _, l := range c.Layouts {
		if _, ok := layouts[l]; !ok {
			return c, fmt.Errorf("unknown layout %q", l)
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, checkDir(c.Dir)
}

// Cluster is a running cluster. Its methods may be called concurrently.
type Cluster struct {
	store    store
	log      *slog.Logger
	programs programs
	pki      *authority
	net      network

	mu    sync.Mutex // guards what follows, and orders changes
	state *state
	nodes []*Node
	// lifeline and waits are of the machines that this process started.
	lifeline lifeline
	waits    sync.WaitGroup
}

// New starts a cluster and returns when its nodes are ready and its DNS and
// storage are in place. What earlier clusters left behind is removed first.
// When New fails, or ctx ends, nothing is left of the new one either.
func New(ctx context.Context, config Config) (*Cluster, error) {
	config, err := config.withDefaults()
	if err != nil {
		return nil, err
	}
	s := store{config.Dir}
	built, err := prepareAndBuild(ctx, config)
	if err != nil {
		return nil, err
	}
	st, err := s.claim(ctx, config.Name)
	if err != nil {
		return nil, err
	}
	c := &Cluster{store: s, log: config.Log, programs: built, net: network{st.Block}, state: st}
	if err := c.start(ctx, config); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Build installs and compiles what New needs, and starts nothing. The first
// time takes minutes, more than a test is given: run it before.
func Build(ctx context.Context, config Config) error {
	config, err := config.withDefaults()
	if err != nil {
		return err
	}
	_, err = prepareAndBuild(ctx, config)
	return err
}

func prepareAndBuild(ctx context.Context, config Config) (programs, error) {
	if err := prepare(ctx, config.Log); err != nil {
		return nil, err
	}
	return build(ctx, config.Log, store{config.Dir}.programs())
}

// Open finds a cluster that was left running by Detach. Close ends it all the
// same. Nodes that are started through it end with this process until Detach is
// called again.
func Open(ctx context.Context, config Config) (*Cluster, error) {
	config, err := config.withDefaults()
	if err != nil {
		return nil, err
	}
	s := store{config.Dir}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	st, err := s.read(config.Name)
	if err != nil || !st.Detached || !st.inUse(boot) {
		return nil, fmt.Errorf("no cluster %s is up", config.Name)
	}
	built, err := build(ctx, config.Log, s.programs())
	if err != nil {
		return nil, err
	}
	c := &Cluster{store: s, log: config.Log, programs: built, net: network{st.Block}, state: st}
	if c.pki, err = openAuthority(c.path("pki")); err != nil {
		return nil, err
	}
	for _, m := range st.Machines {
		if m.Number > 0 {
			c.nodes = append(c.nodes, &Node{cluster: c, name: m.Name, number: m.Number, layout: layouts[m.Layout]})
		}
	}
	return c, nil
}

// Down removes the cluster of that name, in use or not, and every other that
// nobody uses any more.
func Down(ctx context.Context, config Config) error {
	config, err := config.withDefaults()
	if err != nil {
		return err
	}
	s := store{config.Dir}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	boot, err := bootID()
	if err != nil {
		return err
	}
	if st, err := s.read(config.Name); err == nil {
		if err := s.remove(ctx, st, boot); err != nil {
			return err
		}
	}
	return s.sweep(ctx, boot)
}

// Close ends the cluster: every process, mount, network and control group of
// it, and its files. A second Close does nothing.
func (c *Cluster) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lifeline.close()
	unlock, err := c.store.lock()
	if err != nil {
		return err
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := os.Stat(c.store.file(c.state.Name)); err == nil {
		if err := c.store.remove(ctx, c.state, c.state.Boot); err != nil {
			return err
		}
	}
	c.waits.Wait()
	return nil
}

// Detach lets the cluster outlive this process. Afterwards, Open finds it and
// Down ends it.
func (c *Cluster) Detach(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.state.Machines {
		if m.Process.alive() {
			if err := c.manager(m.Name).Detach(ctx); err != nil {
				return err
			}
		}
	}
	c.state.Detached = true
	return c.store.write(c.state)
}

// Name returns the cluster's name.
func (c *Cluster) Name() string { return c.state.Name }

// Nodes returns the nodes, stopped ones too, in the order they were added.
func (c *Cluster) Nodes() []*Node {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.nodes)
}

// Kubeconfig returns the path of the administrator's kubeconfig, which needs
// no other file.
func (c *Cluster) Kubeconfig() string { return c.path("kubeconfig") }

// HostAddr is the host's address as nodes and pods reach it: what a test
// serves there, they can use.
func (c *Cluster) HostAddr() netip.Addr { return c.net.host() }

// AddHost gives a name to an address, for nodes and pods alike: the host's, for
// a registry that a test serves there. Names are known within a second; one
// that is given again gets a further address.
func (c *Cluster) AddHost(name string, addr netip.Addr) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	data, err := os.ReadFile(c.path("hosts"))
	if err != nil {
		return err
	}
	data = fmt.Appendf(data, "%s %s\n", addr, name)
	if err := os.WriteFile(c.path("hosts.new"), data, 0o644); err != nil {
		return err
	}
	return os.Rename(c.path("hosts.new"), c.path("hosts"))
}

// ServiceAddr returns an address for a Service of a chosen clusterIP: the
// number-th, from 1 to 250, of a part of the service network that is given out
// last. The host reaches it too.
func (c *Cluster) ServiceAddr(number int) netip.Addr { return c.net.addr(16, byte(number)) }

// Logs returns the directory of the logs of the services, one file for each, in
// one directory for each machine.
func (c *Cluster) Logs() string { return c.path("logs") }

// Program returns the path of kubectl, helm, or another of the compiled
// programs.
func (c *Cluster) Program(name string) (string, error) {
	for _, set := range toolsets() {
		if path := c.programs.path(set.name, name); has(path) {
			return path, nil
		}
	}
	return "", fmt.Errorf("no program %s among those of the cluster", name)
}

// Kubectl runs kubectl as administrator and returns its output. The error
// carries what kubectl complained of.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) ([]byte, error) {
	return c.client(ctx, nil, "kubernetes", "kubectl", args)
}

// Apply runs kubectl apply on manifests.
func (c *Cluster) Apply(ctx context.Context, manifests io.Reader) error {
	_, err := c.client(ctx, manifests, "kubernetes", "kubectl", []string{"apply", "--server-side", "-f", "-"})
	return err
}

// Helm runs helm as administrator and returns its output.
func (c *Cluster) Helm(ctx context.Context, args ...string) ([]byte, error) {
	return c.client(ctx, nil, "helm", "helm", args)
}

func (c *Cluster) client(ctx context.Context, stdin io.Reader, set, program string, args []string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, c.programs.path(set, program), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(),
		"HELM_CACHE_HOME="+c.path("helm"), "HELM_CONFIG_HOME="+c.path("helm"), "HELM_DATA_HOME="+c.path("helm"),
		"KUBECACHEDIR="+c.path("kubectl"))
	cmd.Stdin = stdin
	return output(cmd)
}

// StopService stops a service of the control plane: etcd, kube-apiserver,
// kube-controller-manager, kube-scheduler, coredns, provisioner or
// cert-manager.
func (c *Cluster) StopService(ctx context.Context, name string) error {
	return c.manager(controlPlane).Stop(ctx, name)
}

// StartService starts a service of the control plane again. It does not wait
// for it to answer; see WaitAPI.
func (c *Cluster) StartService(ctx context.Context, name string) error {
	for _, s := range c.controlServices(true) {
		if s.Name == name {
			return c.manager(controlPlane).Start(ctx, s)
		}
	}
	return fmt.Errorf("the control plane has no service %s", name)
}

// WaitAPI returns when the API server is ready.
func (c *Cluster) WaitAPI(ctx context.Context) error {
	return c.poll(ctx, controlPlane, "kube-apiserver", func(ctx context.Context) error {
		_, err := c.Kubectl(ctx, "get", "--raw", "/readyz", "--request-timeout=5s")
		return err
	})
}

// poll repeats check until it succeeds. When it does not in time, the error
// ends with what the service's log ends with.
func (c *Cluster) poll(ctx context.Context, machine, service string, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s on %s: %w: %w\n%s", service, machine, ctx.Err(), err,
				tail(filepath.Join(c.Logs(), machine, service+".log")))
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// tail returns the last lines of a log, for an error.
func tail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

func (c *Cluster) path(elem ...string) string {
	return filepath.Join(append([]string{c.store.cluster(c.state.Name)}, elem...)...)
}

func (c *Cluster) manager(name string) machine.Client {
	return machine.Client{Socket: c.path("machines", name+".sock")}
}

// MachineStatus is the state of the control plane or of a node.
type MachineStatus struct {
	Name    string
	IP      netip.Addr
	Running bool
	// Services are empty while the machine is stopped.
	Services []ServiceStatus
}

// ServiceStatus is the state of one service.
type ServiceStatus struct {
	Name string
	// PID is the process id inside the machine; 0 while it is not running.
	PID int
	// Exits counts how often it ended without having been stopped.
	Exits int
}

// Status reports on every machine, the control plane first.
func (c *Cluster) Status(ctx context.Context) ([]MachineStatus, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []MachineStatus
	for _, m := range c.state.Machines {
		status := MachineStatus{Name: m.Name, IP: c.net.node(m.Number), Running: m.Process.alive()}
		if m.Number == 0 {
			status.IP = c.net.control()
		}
		if status.Running {
			services, err := c.manager(m.Name).List(ctx)
			if err != nil {
				return nil, err
			}
			for _, s := range services {
				status.Services = append(status.Services, ServiceStatus(s))
			}
		}
		all = append(all, status)
	}
	return all, nil
}
