package cluster

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/connected-registry/connected-registry/test/cluster/internal/machine"
	"github.com/connected-registry/connected-registry/test/cluster/internal/provisioner"
)

const (
	controlPlane = "control-plane"
	domain       = "cluster.local"
	// sharedDir is where nodes see the shared volumes.
	sharedDir = "/var/lib/shared-volumes"
)

// start brings the claimed cluster up.
func (c *Cluster) start(ctx context.Context, config Config) error {
	began := time.Now()
	if err := c.startControlPlane(ctx, config.CertManager); err != nil {
		return err
	}
	for i := range config.Nodes {
		var l Layout
		if i < len(config.Layouts) {
			l = config.Layouts[i]
		}
		if _, err := c.addNode(ctx, l); err != nil {
			return err
		}
	}
	for _, n := range c.nodes {
		if err := n.waitReady(ctx); err != nil {
			return err
		}
	}
	if config.Nodes > 0 {
		if err := c.waitServices(ctx); err != nil {
			return err
		}
	}
	c.log.Info("the cluster is up", "name", c.Name(), "took", time.Since(began).Round(time.Second/10))
	return nil
}

func (c *Cluster) startControlPlane(ctx context.Context, certManager bool) error {
	if err := c.issue(); err != nil {
		return fmt.Errorf("making certificates: %w", err)
	}
	for _, dir := range []string{"etcd", "shared", "images", "overlays", "logs", "machines"} {
		if err := os.MkdirAll(c.path(dir), 0o755); err != nil {
			return err
		}
	}
	if err := writePause(c.path("images", "pause.tar"), c.programs.path("machine", "machine")); err != nil {
		return fmt.Errorf("making the pause image: %w", err)
	}
	if err := os.WriteFile(c.path("hosts"), nil, 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(c.path("Corefile"), []byte(c.corefile()), 0o644); err != nil {
		return err
	}
	c.state.Images = []string{c.path("images", "pause.tar")}
	c.state.Machines = []machineState{{Name: controlPlane}}
	if err := c.store.write(c.state); err != nil {
		return err
	}
	p, err := c.boot(ctx, 0, machine.Spec{
		Hostname: controlPlane,
		Tmpfs:    []string{c.path("overlays")},
		Sysctls: map[string]string{
			"net.ipv4.ip_forward": "1",
			// Packets between nodes are the bridge's business alone.
			"net.bridge.bridge-nf-call-iptables": "0",
			// Every machine knows all routes.
			"net.ipv4.conf.all.send_redirects":     "0",
			"net.ipv4.conf.default.send_redirects": "0",
		},
	})
	if err != nil {
		return err
	}
	if err := c.net.connectHost(ctx, p.PID); err != nil {
		return err
	}
	if err := c.startControlServices(ctx); err != nil {
		return err
	}
	if err := c.Apply(ctx, strings.NewReader(storageClass())); err != nil {
		return err
	}
	if certManager {
		return c.startCertManager(ctx)
	}
	return nil
}

// startControlServices starts everything that needs no further preparation.
// kube-proxy runs here too, so that the API server and the host reach services.
func (c *Cluster) startControlServices(ctx context.Context) error {
	for _, s := range c.controlServices(false) {
		if err := c.manager(controlPlane).Start(ctx, s); err != nil {
			return err
		}
		if s.Name == "kube-apiserver" {
			if err := c.WaitAPI(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// waitServices returns when the host reaches services.
func (c *Cluster) waitServices(ctx context.Context) error {
	return c.poll(ctx, controlPlane, "kube-proxy", func(ctx context.Context) error {
		d := net.Dialer{Timeout: time.Second}
		conn, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(c.net.apiService(), 443).String())
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// server is the address of the API server.
func (c *Cluster) server() string { return fmt.Sprintf("https://%s:6443", c.net.control()) }

// issue makes the certificates and kubeconfigs of the control plane.
func (c *Cluster) issue() (err error) {
	if c.pki, err = newAuthority(c.path("pki")); err != nil {
		return err
	}
	ids := map[string]identity{
		"admin":      {user: "admin", groups: []string{"system:masters"}},
		"controller": {user: "system:kube-controller-manager"},
		"scheduler":  {user: "system:kube-scheduler"},
		"proxy":      {user: "system:kube-proxy"},
		"apiserver": {
			user: "kube-apiserver", groups: []string{"system:masters"}, // towards kubelets
			names: []string{
				"localhost", "kubernetes", "kubernetes.default",
				"kubernetes.default.svc", "kubernetes.default.svc." + domain,
			},
			addrs: []netip.Addr{c.net.control(), c.net.apiService(), netip.AddrFrom4([4]byte{127, 0, 0, 1})},
		},
	}
	for name, id := range ids {
		if err := c.pki.issue(name, id); err != nil {
			return err
		}
		if err := c.pki.kubeconfig(c.pki.path(name, "conf"), name, c.server()); err != nil {
			return err
		}
	}
	return c.pki.kubeconfig(c.Kubeconfig(), "admin", c.server())
}

// controlServices are the services of the control plane in the order they
// start; all includes those that wait for resource definitions of their own.
func (c *Cluster) controlServices(all bool) []machine.Service {
	pki := c.pki.path
	service := func(set, program string, args ...string) machine.Service {
		return machine.Service{
			Name: program,
			Args: append([]string{c.programs.path(set, program)}, args...),
			Env:  environment(),
			Log:  filepath.Join(c.Logs(), controlPlane, program+".log"),
		}
	}
	services := []machine.Service{
		service("kubernetes", "etcd",
			"--data-dir="+c.path("etcd"),
			"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
			"--listen-peer-urls=http://127.0.0.1:2380",
			"--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=default=http://127.0.0.1:2380",
			"--unsafe-no-fsync", // the data ends with the cluster
			"--log-level=warn",
		),
		service("kubernetes", "kube-apiserver",
			"--etcd-servers=http://127.0.0.1:2379",
			"--bind-address=0.0.0.0", "--secure-port=6443", "--advertise-address="+c.net.control().String(),
			"--service-cluster-ip-range="+c.net.services().String(),
			"--allow-privileged=true",
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
			"--client-ca-file="+pki("ca", "crt"),
			"--tls-cert-file="+pki("apiserver", "crt"), "--tls-private-key-file="+pki("apiserver", "key"),
			"--kubelet-certificate-authority="+pki("ca", "crt"),
			"--kubelet-client-certificate="+pki("apiserver", "crt"), "--kubelet-client-key="+pki("apiserver", "key"),
			"--kubelet-preferred-address-types=InternalIP",
			"--service-account-issuer=https://kubernetes.default.svc."+domain,
			"--service-account-key-file="+pki("sa", "pub"), "--service-account-signing-key-file="+pki("sa", "key"),
		),
		service("kubernetes", "kube-controller-manager",
			"--kubeconfig="+pki("controller", "conf"), "--bind-address=127.0.0.1", "--leader-elect=false",
			"--use-service-account-credentials",
			"--root-ca-file="+pki("ca", "crt"), "--service-account-private-key-file="+pki("sa", "key"),
			"--cluster-signing-cert-file="+pki("ca", "crt"), "--cluster-signing-key-file="+pki("ca", "key"),
			// A node that is gone shows after 20 seconds.
			"--node-monitor-period=2s", "--node-monitor-grace-period=20s",
		),
		service("kubernetes", "kube-scheduler",
			"--kubeconfig="+pki("scheduler", "conf"), "--bind-address=127.0.0.1", "--leader-elect=false",
		),
		// kube-proxy wants to see the node whose name it has, and there is
		// none of this machine's, so it goes by the first node's.
		service("kubernetes", "kube-proxy", append(proxyArgs(c.net, pki("proxy", "conf"), nodeName(1)),
			"--bind-address="+c.net.control().String())...),
		service("addons", "coredns", "-conf", c.path("Corefile")),
		service("machine", "machine", "provision",
			"-server="+c.server(), "-ca="+pki("ca", "crt"), "-cert="+pki("admin", "crt"), "-key="+pki("admin", "key"),
			"-class="+StorageClass, "-dir="+c.path("shared"), "-node-dir="+sharedDir,
		),
	}
	last := &services[len(services)-1]
	last.Name, last.Log = "provisioner", filepath.Join(c.Logs(), controlPlane, "provisioner.log")
	if all {
		services = append(services, service("addons", "cert-manager", "controller", "--kubeconfig="+pki("admin", "conf")))
	}
	return services
}

// proxyArgs are the arguments of kube-proxy. The kernel's limits on tracked
// connections are the host's and stay as they are.
func proxyArgs(n network, kubeconfig, node string) []string {
	return []string{
		"--kubeconfig=" + kubeconfig, "--hostname-override=" + node, "--cluster-cidr=" + n.pods().String(),
		"--proxy-mode=iptables", "--conntrack-max-per-core=0", "--conntrack-min=0",
		"--metrics-bind-address=127.0.0.1:10249", "--healthz-bind-address=127.0.0.1:10256",
	}
}

// corefile configures the DNS server, which listens in the control plane's
// network; nodes and pods ask it.
func (c *Cluster) corefile() string {
	return fmt.Sprintf(`.:53 {
	bind %s
	errors
	hosts %s {
		reload 200ms
		ttl 1
		fallthrough
	}
	kubernetes %s in-addr.arpa {
		kubeconfig %s
		pods insecure
		ttl 1
	}
}
`, c.net.control(), c.path("hosts"), domain, c.pki.path("admin", "conf"))
}

func storageClass() string {
	return `apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata:
  name: ` + StorageClass + `
  annotations:
    storageclass.kubernetes.io/is-default-class: "true"
provisioner: ` + provisioner.Name + `
reclaimPolicy: Delete
volumeBindingMode: Immediate
`
}

// startCertManager installs the resource definitions and starts the
// controllers once they are served.
func (c *Cluster) startCertManager(ctx context.Context) error {
	dir, _, err := certManagerModule(ctx)
	if err != nil {
		return err
	}
	crds, err := filepath.Glob(filepath.Join(dir, "deploy", "crds", "*.yaml"))
	if err != nil {
		return err
	}
	var all bytes.Buffer
	for _, crd := range crds {
		data, err := os.ReadFile(crd)
		if err != nil {
			return err
		}
		fmt.Fprintf(&all, "---\n%s\n", data)
	}
	all.WriteString("---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: cert-manager\n")
	if err := c.Apply(ctx, &all); err != nil {
		return fmt.Errorf("installing cert-manager's resource definitions: %w", err)
	}
	if _, err := c.Kubectl(ctx, "wait", "--for=condition=Established", "--timeout=60s", "crd",
		"certificates.cert-manager.io", "certificaterequests.cert-manager.io",
		"issuers.cert-manager.io", "clusterissuers.cert-manager.io"); err != nil {
		return err
	}
	return c.StartService(ctx, "cert-manager")
}
