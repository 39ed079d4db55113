package main

import (
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v4"

	"github.com/connected-registry/connected-registry/agent"
)

const bootstrapDir = "../../manifests/bootstrap"

// machine is a node's file system on which the examples run for real, with the
// program in its place and a systemctl that runs what a unit says.
type machine struct {
	root string
	bin  string // for PATH
	ca   string
}

func newMachine(t *testing.T) machine {
	t.Helper()
	m := machine{root: t.TempDir(), bin: t.TempDir()}
	server := httptest.NewTLSServer(http.NotFoundHandler())
	server.Close()
	m.ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	m.write(t, "/usr/local/bin/connected-registry", "#!/bin/sh\n"+asProgram+"=1 exec '"+self+"' \"$@\"\n", 0o755)
	const systemctl = `#!/bin/sh
set -eu
[ "$1" = enable ] || exit 0
unit=$NODE_ROOT/etc/systemd/system/$3
"$NODE_ROOT$(sed -n 's/^ExecStart=//p' "$unit")"
`
	if err := os.WriteFile(filepath.Join(m.bin, "systemctl"), []byte(systemctl), 0o755); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m machine) write(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	name = filepath.Join(m.root, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// sh runs a command as the machine's root user would.
func (m machine) sh(t *testing.T, command string, env ...string) {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", command)
	cmd.Env = append([]string{"NODE_ROOT=" + m.root, "PATH=" + m.bin + ":" + os.Getenv("PATH")}, env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
}

// inRoot makes the absolute paths of a command those of the machine.
func (m machine) inRoot(command string) string {
	return regexp.MustCompile(`(^|\s)/(usr|etc)/`).ReplaceAllString(command, "${1}"+m.root+"/${2}/")
}

// check: the node asks the registry for its own images and for the mirrors', and
// is as it was after a cleanup.
func (m machine) check(t *testing.T, certs string, mirrors ...string) {
	t.Helper()
	for _, dir := range append([]string{"10.96.0.50"}, mirrors...) {
		text, err := os.ReadFile(filepath.Join(m.root, certs, dir, "hosts.toml"))
		if err != nil || !strings.Contains(string(text), `"https://10.96.0.50:443"`) && !strings.Contains(string(text), `"https://10.96.0.50"`) {
			t.Errorf("%s: %v\n%s", dir, err, text)
		}
		ca, err := os.ReadFile(filepath.Join(m.root, certs, dir, "ca.crt"))
		if err != nil || strings.TrimSpace(string(ca)) != strings.TrimSpace(m.ca) {
			t.Errorf("%s: CA %v\n%s", dir, err, ca)
		}
	}
	if err := agent.Cleanup(t.Context(), agent.CleanupConfig{NodeRoot: m.root}); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(m.root, certs)); err == nil && len(left) > 0 {
		t.Errorf("left after the cleanup: %v", left)
	}
}

func example(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(bootstrapDir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// writtenFile is a file as cloud-init and Cluster API write it.
type writtenFile struct {
	Path        string `yaml:"path"`
	Permissions string `yaml:"permissions"`
	Content     string `yaml:"content"`
	ContentFrom struct {
		Secret struct {
			Name string `yaml:"name"`
			Key  string `yaml:"key"`
		} `yaml:"secret"`
	} `yaml:"contentFrom"`
}

func (m machine) writeAll(t *testing.T, files []writtenFile) {
	t.Helper()
	for _, f := range files {
		mode := os.FileMode(0o644)
		if f.Permissions == "0755" {
			mode = 0o755
		}
		if f.ContentFrom.Secret.Key != "" || strings.HasSuffix(f.Path, ".crt") {
			f.Content = m.ca
		}
		m.write(t, f.Path, f.Content, mode)
	}
}

func TestBootstrapCloudInit(t *testing.T) {
	m := newMachine(t)
	var doc struct {
		WriteFiles []writtenFile `yaml:"write_files"`
		RunCmd     []string      `yaml:"runcmd"`
	}
	if err := yaml.Unmarshal([]byte(example(t, "cloud-init.yaml")), &doc); err != nil {
		t.Fatal(err)
	}
	for _, f := range doc.WriteFiles {
		for path, name := range map[string]string{
			"/usr/local/bin/connected-registry-bootstrap":         "bootstrap.sh",
			"/etc/systemd/system/connected-registry-node.service": "connected-registry-node.service",
			"/etc/connected-registry/node.yaml":                   "node.yaml",
		} {
			if diff := cmp.Diff(example(t, name), f.Content); f.Path == path && diff != "" {
				t.Errorf("%s is not in step (-want +got):\n%s", name, diff)
			}
		}
	}
	m.writeAll(t, doc.WriteFiles)
	for range 2 { // a machine that boots again
		for _, c := range doc.RunCmd {
			m.sh(t, c)
		}
	}
	m.check(t, "etc/containerd/certs.d", "docker.io", "registry.k8s.io")
}

func TestBootstrapK3s(t *testing.T) {
	for _, rancher := range []string{"k3s", "rke2"} {
		t.Run(rancher, func(t *testing.T) {
			m := newMachine(t)
			ca := filepath.Join(t.TempDir(), "ca.crt")
			if err := os.WriteFile(ca, []byte(m.ca), 0o644); err != nil {
				t.Fatal(err)
			}
			m.sh(t, filepath.Join(bootstrapDir, "k3s.sh"), "CA="+ca, "RANCHER="+rancher)
			m.check(t, "var/lib/rancher/"+rancher+"/agent/etc/containerd/certs.d", "docker.io", "registry.k8s.io")
		})
	}
}

// TestBootstrapKind mounts what kind would, and runs what the node's systemd
// would before containerd.
func TestBootstrapKind(t *testing.T) {
	m := newMachine(t)
	var cluster struct {
		Nodes []struct {
			ExtraMounts []struct {
				HostPath      string `yaml:"hostPath"`
				ContainerPath string `yaml:"containerPath"`
			} `yaml:"extraMounts"`
		} `yaml:"nodes"`
	}
	if err := yaml.Unmarshal([]byte(example(t, "kind.yaml")), &cluster); err != nil {
		t.Fatal(err)
	}
	if len(cluster.Nodes) != 2 || len(cluster.Nodes[1].ExtraMounts) != 5 {
		t.Fatalf("not two nodes with five mounts each: %+v", cluster)
	}
	unit := ""
	for _, mount := range cluster.Nodes[0].ExtraMounts {
		switch mount.HostPath {
		case "connected-registry":
		case "ca.crt":
			m.write(t, mount.ContainerPath, m.ca, 0o644)
		default:
			m.write(t, mount.ContainerPath, example(t, mount.HostPath), 0o755)
		}
		if strings.HasSuffix(mount.ContainerPath, ".conf") {
			unit = mount.ContainerPath
		}
	}
	_, command, ok := strings.Cut(example(t, filepath.Base("kind-containerd.conf")), "ExecStartPre=-")
	if !ok || !strings.HasPrefix(unit, "/etc/systemd/system/containerd.service.d/") {
		t.Fatalf("%s does not run ahead of containerd", unit)
	}
	m.sh(t, m.inRoot(command))
	m.check(t, "etc/containerd/certs.d", "docker.io", "registry.k8s.io")
}

// TestBootstrapAKS runs on a node whose own registry is configured by AKS.
func TestBootstrapAKS(t *testing.T) {
	m := newMachine(t)
	files := t.TempDir()
	for name, text := range map[string]string{"node.yaml": example(t, "node.yaml") + "- registry: mcr.microsoft.com\n", "ca.crt": m.ca, "bootstrap.sh": example(t, "bootstrap.sh")} {
		if err := os.WriteFile(filepath.Join(files, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	program, err := os.ReadFile(filepath.Join(m.root, "usr/local/bin/connected-registry"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(files, "connected-registry"), program, 0o755); err != nil {
		t.Fatal(err)
	}
	const hosts = "[host.\"https://bootstrap.example\"]\n"
	const theirs = "etc/containerd/certs.d/mcr.microsoft.com/hosts.toml"
	m.write(t, theirs, hosts, 0o644)
	m.write(t, "opt/azure/containers/provision.sh", "", 0o644)
	m.sh(t, filepath.Join(bootstrapDir, "aks.sh"), "FILES="+files)
	if text, err := os.ReadFile(filepath.Join(m.root, theirs)); err != nil || string(text) != hosts {
		t.Errorf("AKS's own: %q, %v", text, err)
	}
	if err := os.RemoveAll(filepath.Join(m.root, filepath.Dir(theirs))); err != nil {
		t.Fatal(err)
	}
	m.check(t, "etc/containerd/certs.d", "docker.io", "registry.k8s.io")
}

// TestBootstrapClusterAPI fills the variables in as clusterctl does, and does
// what cloud-init does of a KubeadmConfig.
func TestBootstrapClusterAPI(t *testing.T) {
	text := regexp.MustCompile(`\$\{[A-Z_]+\}`).ReplaceAllStringFunc(example(t, "cluster-api-nutanix.yaml"), func(v string) string {
		switch v {
		case "${CONNECTED_REGISTRY_ADDRESS}":
			return "10.96.0.50"
		case "${NODE_ROOT}":
			return v
		}
		return strings.ToLower(strings.ReplaceAll(strings.Trim(v, "${}"), "_", "-"))
	})
	type spec struct {
		Files              []writtenFile `yaml:"files"`
		PreKubeadmCommands []string      `yaml:"preKubeadmCommands"`
	}
	var specs []spec
	for _, part := range strings.Split(text, "\n---\n") {
		var doc struct {
			Spec struct {
				KubeadmConfigSpec spec `yaml:"kubeadmConfigSpec"`
				Template          struct {
					Spec spec `yaml:"spec"`
				} `yaml:"template"`
			} `yaml:"spec"`
		}
		if err := yaml.Unmarshal([]byte(part), &doc); err != nil {
			t.Fatal(err)
		}
		s := doc.Spec.KubeadmConfigSpec
		if len(s.Files) == 0 {
			s = doc.Spec.Template.Spec
		}
		specs = append(specs, s)
	}
	if len(specs) != 2 || cmp.Diff(specs[0], specs[1]) != "" {
		t.Fatalf("control plane and workers differ: %s", cmp.Diff(specs[0], specs[1]))
	}
	m := newMachine(t)
	m.writeAll(t, specs[0].Files)
	for _, c := range specs[0].PreKubeadmCommands {
		m.sh(t, m.inRoot(c))
	}
	m.check(t, "etc/containerd/certs.d", "docker.io", "registry.k8s.io")
}
