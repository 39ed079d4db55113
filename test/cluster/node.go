package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/connected-registry/connected-registry/test/cluster/internal/machine"
)

const (
	// binDir is where nodes see the compiled programs.
	binDir   = "/opt/cluster"
	logDir   = "/var/log/cluster"
	pauseRef = "connected-registry.test/pause:1"
)

// Node is one node.
type Node struct {
	cluster *Cluster
	name    string
	number  int
	layout  layout
	booted  time.Time // guarded by cluster.mu
}

func nodeName(number int) string { return fmt.Sprintf("node%d", number) }

// Name is the node's name in the cluster, and its host name.
func (n *Node) Name() string { return n.name }

// IP is the node's address.
func (n *Node) IP() netip.Addr { return n.cluster.net.node(n.number) }

// Root is the node's file system as the host sees it, while the node runs.
// Absolute symbolic links in it lead to the host's files: use os.OpenRoot to
// read or write.
func (n *Node) Root() string {
	n.cluster.mu.Lock()
	defer n.cluster.mu.Unlock()
	return n.root()
}

func (n *Node) root() string { return fmt.Sprintf("/proc/%d/root", n.pid()) }

// pid is the node's process 1, 0 while it is stopped; the caller holds mu.
func (n *Node) pid() int { return n.cluster.machine(n.number).Process.PID }

// Command is a command to run on the node, as root, in all of its namespaces.
// Ending ctx kills it and what it has started.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	n.cluster.mu.Lock()
	pid := n.pid()
	n.cluster.mu.Unlock()
	return command(ctx, pid, name, args...)
}

func command(ctx context.Context, pid int, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{
		"--target", strconv.Itoa(pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--", name,
	}, args...)...)
	cmd.Env = environment()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}

// Run runs a command on the node and returns its output. The error carries
// what the command complained of.
func (n *Node) Run(ctx context.Context, name string, args ...string) ([]byte, error) {
	return output(n.Command(ctx, name, args...))
}

// StopService stops containerd, kubelet or kube-proxy on the node. Containers
// go on running.
func (n *Node) StopService(ctx context.Context, name string) error {
	return n.manager().Stop(ctx, name)
}

// StartService starts a service of the node again.
func (n *Node) StartService(ctx context.Context, name string) error {
	for _, s := range n.services() {
		if s.Name == name {
			return n.manager().Start(ctx, s)
		}
	}
	return fmt.Errorf("a node has no service %s", name)
}

func (n *Node) manager() machine.Client { return n.cluster.manager(n.name) }

// AddNode adds a node and returns when it is ready. It has the images that
// were loaded before. A node that does not come up stays in the cluster, for
// its logs.
func (c *Cluster) AddNode(ctx context.Context) (*Node, error) {
	c.mu.Lock()
	n, err := c.addNode(ctx, "")
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return n, n.waitReady(ctx)
}

func (c *Cluster) addNode(ctx context.Context, l Layout) (*Node, error) {
	number := len(c.nodes) + 1
	if number > maxNodes {
		return nil, fmt.Errorf("the cluster has %d nodes already", maxNodes)
	}
	n := &Node{cluster: c, name: nodeName(number), number: number, layout: layouts[l]}
	c.state.Machines = append(c.state.Machines, machineState{Name: n.name, Number: number, Layout: l})
	if err := c.store.write(c.state); err != nil {
		return nil, err
	}
	c.nodes = append(c.nodes, n)
	if err := n.prepare(); err != nil {
		return nil, fmt.Errorf("preparing %s: %w", n.name, err)
	}
	if err := n.boot(ctx); err != nil {
		return nil, err
	}
	return n, nil
}

// StopNode cuts a node's power: every process on it is killed at once. Its
// disk stays as it is.
func (c *Cluster) StopNode(ctx context.Context, n *Node) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.machine(n.number)
	if err := m.Process.kill(ctx); err != nil {
		return err
	}
	m.Process = process{}
	if err := c.store.write(c.state); err != nil {
		return err
	}
	// The kernel removes the node's port in its own time, and the next start
	// needs the name.
	port := n.name
	control := c.machine(0).Process.PID
	if err := ip(ctx, control, "link show "+port); err == nil {
		if err := ip(ctx, control, "link del "+port); err != nil && ip(ctx, control, "link show "+port) == nil {
			return err
		}
	}
	return removeCgroup(ctx, n.cgroup())
}

// StartNode starts a stopped node and returns when it is ready.
func (c *Cluster) StartNode(ctx context.Context, n *Node) error {
	c.mu.Lock()
	err := n.boot(ctx)
	c.mu.Unlock()
	if err != nil {
		return err
	}
	return n.waitReady(ctx)
}

// LoadImage imports an image archive (docker save's form or an OCI layout, as a
// tar file) into the containerd of every running node, where pods find it with
// imagePullPolicy IfNotPresent. Nodes that are added later load it too.
func (c *Cluster) LoadImage(ctx context.Context, tarPath string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	kept := c.path("images", fmt.Sprintf("%d.tar", len(c.state.Images)))
	if err := copyFile(kept, tarPath); err != nil {
		return fmt.Errorf("keeping the image %s: %w", tarPath, err)
	}
	c.state.Images = append(c.state.Images, kept)
	if err := c.store.write(c.state); err != nil {
		return err
	}
	for _, n := range c.nodes {
		if n.pid() == 0 {
			continue
		}
		if err := n.load(ctx, kept); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// load imports an archive into the node.
func (n *Node) load(ctx context.Context, tar string) error {
	f, err := os.Open(tar)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := command(ctx, n.pid(), binDir+"/containerd/ctr",
		"--address", n.layout.socket, "--namespace", "k8s.io", "images", "import", "-")
	cmd.Stdin = f
	if _, err := output(cmd); err != nil {
		return fmt.Errorf("loading %s into %s: %w", tar, n.name, err)
	}
	return nil
}

func (n *Node) cgroup() string { return cgroupOf(n.cluster.Name()) + "/" + n.name }

// dir is a directory of the node's on the host's disk.
func (n *Node) dir(elem ...string) string {
	return n.cluster.path(append([]string{"nodes", n.name}, elem...)...)
}

// prepare makes the node's credentials and the directories it keeps on disk,
// under which containerd can stack overlays as on the node's own it cannot.
func (n *Node) prepare() error {
	for _, dir := range []string{"containerd", "kubelet", "kubernetes"} {
		if err := os.MkdirAll(n.dir(dir), 0o755); err != nil {
			return err
		}
	}
	c := n.cluster
	err := c.pki.issue(n.name, identity{
		user: "system:node:" + n.name, groups: []string{"system:nodes"},
		names: []string{n.name}, addrs: []netip.Addr{n.IP()},
	})
	if err != nil {
		return err
	}
	if err := c.pki.kubeconfig(n.dir("kubernetes", "kubelet.conf"), n.name, c.server()); err != nil {
		return err
	}
	for to, from := range map[string]string{
		"ca.crt": c.pki.path("ca", "crt"), "proxy.conf": c.pki.path("proxy", "conf"),
		"kubelet.crt": c.pki.path(n.name, "crt"), "kubelet.key": c.pki.path(n.name, "key"),
	} {
		if err := copyFile(n.dir("kubernetes", to), from); err != nil {
			return err
		}
	}
	kubelet, err := json.MarshalIndent(n.kubeletConfig(), "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(n.dir("kubernetes", "kubelet.json"), kubelet, 0o644)
}

// boot starts the node's machine and everything on it.
func (n *Node) boot(ctx context.Context) error {
	c := n.cluster
	if c.machine(n.number).Process.alive() {
		return fmt.Errorf("%s is running already", n.name)
	}
	n.booted = time.Now().Truncate(time.Second) // the API's times have no more
	if err := makeCgroup(n.cgroup()); err != nil {
		return err
	}
	p, err := c.boot(ctx, n.number, n.spec())
	if err != nil {
		return err
	}
	peers := map[int]int{}
	for _, m := range c.state.Machines {
		if m.Number > 0 && m.Number != n.number && m.Process.PID != 0 {
			peers[m.Process.PID] = m.Number
		}
	}
	if err := c.net.connectNode(ctx, c.machine(0).Process.PID, p.PID, n.number, peers); err != nil {
		return err
	}
	if err := n.configure(); err != nil {
		return fmt.Errorf("configuring %s: %w", n.name, err)
	}
	return n.startServices(ctx)
}

// spec is the node's machine. What a host may have of its own as a node of
// another cluster is hidden.
func (n *Node) spec() machine.Spec {
	c := n.cluster
	binds := []machine.Bind{
		{Source: n.dir("containerd"), Target: n.layout.root},
		{Source: n.dir("kubelet"), Target: "/var/lib/kubelet"},
		{Source: n.dir("kubernetes"), Target: "/etc/kubernetes", ReadOnly: true},
		{Source: c.path("shared"), Target: sharedDir},
		{Source: filepath.Join(c.Logs(), n.name), Target: logDir},
		{Source: c.programs["cni"], Target: "/opt/cni/bin", ReadOnly: true},
	}
	binds = append(binds, machine.Bind{Source: c.programs[n.layout.toolset], Target: binDir + "/containerd", ReadOnly: true})
	for _, set := range []string{"machine", "runc", "kubernetes"} {
		binds = append(binds, machine.Bind{Source: c.programs[set], Target: filepath.Join(binDir, set), ReadOnly: true})
	}
	return machine.Spec{
		Hostname: n.name,
		Overlay:  c.path("overlays", n.name),
		Remove: []string{
			"/etc/containerd", "/etc/cni", "/etc/kubernetes", "/kind", "/opt/azure", "/opt/cni", "/opt/containerd",
			"/etc/rancher", "/usr/local/bin/k3s", "/var/lib/rancher", "/var/lib/containerd", "/var/lib/kubelet", "/var/lib/cni", "/var/log/pods", "/var/log/containers",
		},
		// /root and /home keep the person's own files out of a node's reach.
		Tmpfs: []string{"/run", "/tmp", "/root", "/home"},
		Binds: binds,
		Sysctls: map[string]string{
			"net.ipv4.ip_forward":                "1",
			"net.bridge.bridge-nf-call-iptables": "1",
		},
	}
}

// configure writes the node's configuration, as an administrator would, into
// its own file system.
func (n *Node) configure() error {
	root, err := os.OpenRoot(n.root())
	if err != nil {
		return err
	}
	defer root.Close()
	for path, content := range map[string]string{
		"etc/cni/net.d/10-cluster.conflist": cniConfig(n.cluster.net.nodePods(n.number)),
		"etc/resolv.conf":                   "nameserver " + n.cluster.net.control().String() + "\n",
		"etc/hosts":                         n.hosts(),
	} {
		if err := root.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		// What is there may be a symbolic link to the host's own.
		if err := root.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := root.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return n.layout.write(root)
}

func (n *Node) hosts() string {
	var b strings.Builder
	b.WriteString("127.0.0.1 localhost\n")
	for number := 1; number <= maxNodes; number++ {
		fmt.Fprintf(&b, "%s %s\n", n.cluster.net.node(number), nodeName(number))
	}
	return b.String()
}

func cniConfig(pods netip.Prefix) string {
	return fmt.Sprintf(`{
  "cniVersion": "1.0.0",
  "name": "cluster",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "cni0",
      "isGateway": true,
      "hairpinMode": true,
      "ipam": {
        "type": "host-local",
        "dataDir": "/run/cni",
        "ranges": [[{"subnet": "%s"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`, pods)
}

// kubeletConfig is a KubeletConfiguration (kubelet.config.k8s.io/v1beta1).
// Nothing is evicted or collected for want of disk: the disk is the host's.
// What a mounted Secret or ConfigMap holds arrives within seconds.
func (n *Node) kubeletConfig() map[string]any {
	return map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1beta1",
		"kind":       "KubeletConfiguration",
		"authentication": map[string]any{
			"anonymous": map[string]any{"enabled": false},
			"webhook":   map[string]any{"enabled": true},
			"x509":      map[string]any{"clientCAFile": "/etc/kubernetes/ca.crt"},
		},
		"authorization":               map[string]any{"mode": "Webhook"},
		"cgroupDriver":                "cgroupfs",
		"cgroupRoot":                  n.cgroup(),
		"clusterDNS":                  []string{n.cluster.net.control().String()},
		"clusterDomain":               domain,
		"containerRuntimeEndpoint":    "unix://" + n.layout.socket,
		"evictionHard":                map[string]string{"memory.available": "100Mi", "nodefs.available": "0%", "imagefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.inodesFree": "0%"},
		"failCgroupV1":                false,
		"failSwapOn":                  false,
		"imageGCHighThresholdPercent": 100,
		"nodeLeaseDurationSeconds":    20,
		"nodeStatusUpdateFrequency":   "4s",
		"resolvConf":                  "/etc/resolv.conf",
		"syncFrequency":               "10s",
		"tlsCertFile":                 "/etc/kubernetes/kubelet.crt",
		"tlsPrivateKeyFile":           "/etc/kubernetes/kubelet.key",
	}
}

func (n *Node) services() []machine.Service {
	service := func(set, program string, args ...string) machine.Service {
		return machine.Service{
			Name: program,
			Args: append([]string{filepath.Join(binDir, set, program)}, args...),
			Env:  environment(),
			Log:  filepath.Join(logDir, program+".log"),
		}
	}
	return []machine.Service{
		service("containerd", "containerd", n.layout.args()...),
		service("kubernetes", "kubelet",
			"--config=/etc/kubernetes/kubelet.json", "--kubeconfig=/etc/kubernetes/kubelet.conf",
			"--hostname-override="+n.name, "--node-ip="+n.IP().String()),
		service("kubernetes", "kube-proxy", proxyArgs(n.cluster.net, "/etc/kubernetes/proxy.conf", n.name)...),
	}
}

// startServices starts the kubelet only when containerd answers and has the
// images: the kubelet would give up on the first and pull the second.
func (n *Node) startServices(ctx context.Context) error {
	for _, s := range n.services() {
		if err := n.manager().Start(ctx, s); err != nil {
			return fmt.Errorf("%s: %w", n.name, err)
		}
		if s.Name != "containerd" {
			continue
		}
		err := n.cluster.poll(ctx, n.name, "containerd", func(ctx context.Context) error {
			_, err := output(command(ctx, n.pid(), binDir+"/containerd/ctr", "--address", n.layout.socket, "version"))
			return err
		})
		if err != nil {
			return err
		}
		for _, image := range n.cluster.state.Images {
			if err := n.load(ctx, image); err != nil {
				return err
			}
		}
	}
	return nil
}

// waitReady returns when the API server calls the node ready and services can
// be reached on it.
func (n *Node) waitReady(ctx context.Context) error {
	if err := n.waitKubelet(ctx); err != nil {
		return err
	}
	api := fmt.Sprintf("/dev/tcp/%s/443", n.cluster.net.apiService())
	return n.cluster.poll(ctx, n.name, "kube-proxy", func(ctx context.Context) error {
		_, err := n.Run(ctx, "timeout", "1", "bash", "-c", "<"+api)
		return err
	})
}

// waitKubelet returns when the API server calls the node ready, on word from
// this start of its kubelet rather than from an earlier one.
func (n *Node) waitKubelet(ctx context.Context) error {
	n.cluster.mu.Lock()
	booted := n.booted
	n.cluster.mu.Unlock()
	const ready = `.status.conditions[?(@.type=="Ready")]`
	return n.cluster.poll(ctx, n.name, "kubelet", func(ctx context.Context) error {
		out, err := n.cluster.Kubectl(ctx, "get", "node", n.name, "-o",
			"jsonpath={"+ready+".lastHeartbeatTime} {"+ready+".status} {"+ready+".message}")
		if err != nil {
			return err
		}
		heartbeat, rest, _ := strings.Cut(string(out), " ")
		status, message, _ := strings.Cut(rest, " ")
		at, err := time.Parse(time.RFC3339, heartbeat)
		if err != nil {
			return fmt.Errorf("no word from the kubelet yet: %w", err)
		}
		if at.Before(booted) || status != "True" {
			return fmt.Errorf("not ready: %s", message)
		}
		return nil
	})
}
