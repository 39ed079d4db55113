package node

import (
	"bufio"
	"bytes"
	"strings"
)

// layout is where a distribution of Kubernetes keeps its container runtime. All
// paths are inside the node root; of several, the first that is there counts.
type layout struct {
	name     string
	markers  []string
	configs  []string
	certsDir string
	sockets  []string
	binaries []string
	// units are what systemd, or OpenRC, calls the service that runs the
	// runtime.
	units []string
	// generated says what writes the configuration anew at every start, and so
	// where to change it instead. Empty: nothing does.
	generated string
	// reserved are the registries whose directories belong to the
	// distribution once they are there.
	reserved []string
}

const (
	defaultConfig   = "/etc/containerd/config.toml"
	defaultSocket   = "/run/containerd/containerd.sock"
	defaultCertsDir = "/etc/containerd/certs.d"
	defaultUnit     = "containerd"
)

var defaultBinaries = []string{"/usr/bin/containerd", "/usr/local/bin/containerd", "/opt/bin/containerd"}

// layouts are tried in this order.
var layouts = []layout{
	rancher("k3s", "K3s", []string{"/usr/local/bin/k3s", "/opt/bin/k3s"}, []string{"k3s", "k3s-agent"}),
	rancher("rke2", "RKE2", []string{"/usr/local/bin/rke2", "/opt/rke2/bin/rke2"}, []string{"rke2-server", "rke2-agent"}),
	{
		name:      "MicroK8s",
		markers:   []string{"/var/snap/microk8s/current"},
		configs:   []string{"/var/snap/microk8s/current/args/containerd.toml"},
		certsDir:  "/var/snap/microk8s/current/args/certs.d",
		sockets:   []string{"/var/snap/microk8s/common/run/containerd.sock"},
		binaries:  []string{"/snap/microk8s/current/bin/containerd"},
		units:     []string{"snap.microk8s.daemon-containerd"},
		generated: "MicroK8s writes it from /var/snap/microk8s/current/args/containerd-template.toml: change it there, then \"microk8s stop && microk8s start\"",
	},
	plain("kind", "/kind/version", "/kind/kubeadm.conf"),
	func() layout {
		l := plain("AKS", "/opt/azure/containers")
		l.reserved = []string{"mcr.microsoft.com"}
		return l
	}(),
	plain("kubeadm", "/var/lib/kubelet/kubeadm-flags.env", "/etc/kubernetes/kubelet.conf"),
	plain("plain containerd"),
}

// plain is a distribution that leaves containerd where its packages put it.
func plain(name string, markers ...string) layout {
	return layout{
		name:     name,
		markers:  markers,
		configs:  []string{defaultConfig},
		certsDir: defaultCertsDir,
		sockets:  []string{defaultSocket},
		binaries: defaultBinaries,
		units:    []string{defaultUnit},
	}
}

// rancher is K3s or its sibling, which run a containerd of their own.
func rancher(id, name string, markers, units []string) layout {
	data := "/var/lib/rancher/" + id
	etc := data + "/agent/etc/containerd"
	return layout{
		name:     name,
		markers:  append([]string{etc, data}, markers...),
		configs:  []string{etc + "/config.toml"},
		certsDir: etc + "/certs.d",
		// Both keep their socket here.
		sockets:   []string{"/run/k3s/containerd/containerd.sock"},
		binaries:  append([]string{data + "/data/current/bin/containerd", data + "/bin/containerd"}, markers...),
		units:     units,
		generated: name + " writes it at every start: put the change into " + etc + "/config-v3.toml.tmpl (containerd 2) or config.toml.tmpl, then restart " + units[0],
	}
}

// registriesFile is where the operator of K3s or RKE2 configures mirrors.
func (l layout) registriesFile() string {
	switch l.name {
	case "K3s":
		return "/etc/rancher/k3s/registries.yaml"
	case "RKE2":
		return "/etc/rancher/rke2/registries.yaml"
	}
	return ""
}

// findLayout recognises the distribution, and what it was recognised by.
func findLayout(r rootFiles) (l layout, marker string) {
	for _, l = range layouts {
		for _, m := range l.markers {
			if r.exists(m) {
				return l, m
			}
		}
	}
	return l, ""
}

// firstOf returns the first of names that exists, else the first of all.
func firstOf(r rootFiles, names []string) (name string, found bool) {
	for _, n := range names {
		if r.exists(n) {
			return n, true
		}
	}
	return names[0], false
}

// trustStores are the programs by which families of operating systems rebuild
// their trust store.
var trustStores = []struct{ program, dir string }{
	{"/usr/sbin/update-ca-certificates", "/usr/local/share/ca-certificates"},
	{"/usr/bin/update-ca-trust", "/etc/pki/ca-trust/source/anchors"},
}

// findSystem returns the operating system by its own name, the file that says
// so, and its trust store's directory, empty if it is none that is known.
func findSystem(r rootFiles) (name, from, store, program string) {
	for _, from = range []string{"/etc/os-release", "/usr/lib/os-release"} {
		if data, err := r.read(from); err == nil {
			fields := releaseFields(data)
			name = strings.TrimSpace(fields["ID"] + " " + fields["VERSION_ID"])
			break
		}
	}
	for _, s := range trustStores {
		if r.exists(s.program) {
			return name, from, s.dir, s.program
		}
	}
	return name, from, "", ""
}

func releaseFields(data []byte) map[string]string {
	fields := map[string]string{}
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		if key, value, ok := strings.Cut(s.Text(), "="); ok {
			fields[key] = strings.Trim(value, `"'`)
		}
	}
	return fields
}
