package e2e

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/connected-registry/connected-registry/test/cluster"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	readerName     = "reader"
	readerPassword = "a reader's password"
	reader         = readerName + ":" + readerPassword
	// images is how many images the parent has that no node has: more than all
	// tests together take.
	images = 1200
)

// world is the cluster that all tests share, and what surrounds it.
type world struct {
	*Product
	c      *cluster.Cluster
	parent *parent
	host   string // the registry's, as images name it
	before map[string]map[string]string
}

func TestEndToEnd(t *testing.T) {
	c, err := cluster.New(t.Context(), cluster.Config{
		Name: fmt.Sprintf("e2e-%d", os.Getpid()),
		Log:  slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	product, err := Load(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Product: product, c: c, parent: newParent(t, c), host: c.ServiceAddr(50).String()}
	w.parent.push(t, "latest")
	w.parent.fill(t, images)
	w.prepare(t)

	t.Run("plain manifests", w.testManifests)
	t.Run("object storage", w.testObjects)
	t.Run("install", w.testInstalls)
	t.Run("built-in CA", w.testLife)
	t.Run("caches", w.testCaches)
}

// prepare makes what an operator has before the first installation: pull
// secrets, and files of its own on the nodes.
func (w *world) prepare(t *testing.T) {
	apply(t, w.c, fmt.Sprintf(`
apiVersion: v1
kind: Namespace
metadata: {name: %s}
---
apiVersion: v1
kind: Namespace
metadata: {name: %s}
---
apiVersion: v1
kind: Secret
metadata: {name: regcred, namespace: %s}
type: kubernetes.io/dockerconfigjson
stringData: {.dockerconfigjson: %q}
---
apiVersion: v1
kind: Secret
metadata: {name: %s, namespace: %s}
stringData: {password1: %q}
---
apiVersion: v1
kind: Secret
metadata: {name: parent-ca, namespace: %s}
stringData: {ca.crt: %q}
`, Namespace, pullers, pullers, dockerConfig(w.host), readerName, Namespace, readerPassword, Namespace, w.parent.pair.cert))
	w.before = map[string]map[string]string{}
	for _, n := range w.c.Nodes() {
		writeNode(t, n, "etc/containerd/certs.d/docker.io", "hosts.toml", "# the operator's\nserver = \"https://registry-1.docker.io\"\n\n[host.\"https://mirror.example.net\"]\n")
		writeNode(t, n, "etc/containerd/certs.d/"+parentHost, "hosts.toml", "# the operator's\nserver = \"https://"+parentHost+"\"\n")
		// What was put into the store by other means becomes as the store's own
		// program leaves it.
		if _, err := n.Run(t.Context(), "update-ca-certificates", "--fresh"); err != nil {
			t.Fatal(err)
		}
		w.before[n.Name()] = snapshot(t, n)
	}
}

func dockerConfig(host string) string {
	auth := base64.StdEncoding.EncodeToString([]byte(reader))
	data, err := json.Marshal(map[string]any{"auths": map[string]any{host: map[string]string{"auth": auth}}})
	if err != nil {
		panic(err) // strings alone
	}
	return string(data)
}

// values are what every installation is given.
func (w *world) values() string {
	return fmt.Sprintf(`
connectionString: "ConnectedRegistryName=edge;SyncTokenName=%s;SyncTokenPassword=%s;ParentGatewayEndpoint=%s;ParentEndpointProtocol=https"
parent: {caSecretRef: {name: parent-ca}}
service: {clusterIP: %s}
registry: {replicas: 1}
clientTokens:
- name: %s
  secretRef: {name: reader}
  scopeMap: [{repositories: ["**"], actions: [content/read, metadata/read]}]
`, parentUser, parentPassword, parentHost, w.host, readerName)
}

const noManager = "cert-manager: {enabled: false, install: false}\n"

// with runs test against an installation, and removes it.
func (w *world) with(t *testing.T, test func(t *testing.T), values ...string) {
	t.Helper()
	failed := true
	defer func() {
		if failed || t.Failed() {
			explain(t, w.c)
		}
		if err := w.Uninstall(t.Context()); err != nil {
			t.Errorf("uninstalling: %v", err)
		}
		w.unchanged(t)
	}()
	if err := w.Install(t.Context(), append([]string{w.values()}, values...)...); err != nil {
		t.Fatal(err)
	}
	w.online(t)
	test(t)
	failed = false
}

func (w *world) online(t *testing.T) {
	t.Helper()
	kubectl(t, w.c, "wait", "connectedregistry/connected-registry", "-n", Namespace, "--for=jsonpath={.status.connectionState}=Online", "--timeout=180s")
}

// unchanged compares every node with what it was before the first installation.
func (w *world) unchanged(t *testing.T) {
	t.Helper()
	for _, n := range w.c.Nodes() {
		want, ok := w.before[n.Name()]
		if !ok {
			continue
		}
		if diff := cmp.Diff(want, snapshot(t, n)); diff != "" {
			t.Errorf("%s before and after the installation (-before +after):\n%s", n.Name(), diff)
		}
	}
}

// pulls has a pod on every node pull the tutorial's image, with its secret and
// in vain without.
func (w *world) pulls(t *testing.T) {
	t.Helper()
	var with, without []pod
	for _, n := range w.c.Nodes() {
		image := w.host + "/hello-world:latest"
		with = append(with, pod{"with-" + n.Name(), n.Name(), image, "regcred"})
		without = append(without, pod{"without-" + n.Name(), n.Name(), image, ""})
	}
	start(t, w.c, append(with, without...)...)
	succeed(t, w.c, with...)
	refused(t, w.c, without...)
}

// testInstalls goes through the installations of Azure's tutorial.
func (w *world) testInstalls(t *testing.T) {
	own := newPair(t, nil, []net.IP{net.ParseIP(w.host)})
	b64 := base64.StdEncoding.EncodeToString
	usual := func(t *testing.T) {
		w.pulls(t)
		if out, err := w.c.Helm(t.Context(), "test", Release, "--namespace="+Namespace, "--timeout=2m"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
	t.Run("own certificate by values", func(t *testing.T) {
		w.parent.push(t, "latest")
		w.with(t, usual, noManager, fmt.Sprintf("tls: {crt: %s, key: %s, cacrt: %s}\n", b64(own.cert), b64(own.key), b64(own.cert)))
	})
	t.Run("own certificate in a Secret", func(t *testing.T) {
		w.parent.push(t, "latest")
		apply(t, w.c, fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: k8secret, namespace: %s}\ntype: kubernetes.io/tls\ndata: {tls.crt: %s, tls.key: %s, ca.crt: %s}\n",
			Namespace, b64(own.cert), b64(own.key), b64(own.cert)))
		w.with(t, usual, noManager, "tls: {secret: k8secret}\n")
	})
	t.Run("trust distribution off", func(t *testing.T) {
		w.parent.push(t, "latest")
		w.with(t, func(t *testing.T) {
			w.unchanged(t)
			defer w.byHand(t, "ca.crt", string(own.cert))()
			usual(t)
		}, noManager, "trustDistribution: {enabled: false}\ntls: {secret: k8secret}\n")
	})
	t.Run("plain HTTP", func(t *testing.T) {
		w.parent.push(t, "latest")
		w.with(t, func(t *testing.T) {
			w.unchanged(t)
			defer w.byHand(t, "hosts.toml", fmt.Sprintf("server = \"http://%s\"\n", w.host))()
			usual(t)
		}, noManager, "trustDistribution: {enabled: false}\nhttpEnabled: true\n")
	})
	if err := w.c.LoadCertManager(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Run("cert-manager with the chart", func(t *testing.T) {
		w.parent.push(t, "latest")
		// Helm keeps definitions, which are in the way of the next installation.
		defer kubectl(t, w.c, "delete", "crd", "--selector=app.kubernetes.io/name=cert-manager")
		w.with(t, usual)
	})
	t.Run("cert-manager that was there", func(t *testing.T) {
		w.parent.push(t, "latest")
		chart, err := w.c.CertManagerChart(t.Context(), t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.c.Helm(t.Context(), "install", "cert-manager", chart, "--namespace=cert-manager", "--create-namespace",
			"--set=crds.enabled=true", "--wait", "--timeout=3m"); err != nil {
			t.Fatal(err)
		}
		w.with(t, usual, "cert-manager: {install: false}\n")
		if _, err := w.c.Helm(t.Context(), "uninstall", "cert-manager", "--namespace=cert-manager", "--wait"); err != nil {
			t.Error(err)
		}
	})
}

// byHand configures the nodes as an operator does who wants no agent, and
// returns what undoes it.
func (w *world) byHand(t *testing.T, name, content string) (undo func()) {
	t.Helper()
	dir := "etc/containerd/certs.d/" + w.host
	for _, n := range w.c.Nodes() {
		writeNode(t, n, dir, name, content)
	}
	return func() {
		for _, n := range w.c.Nodes() {
			removeNode(t, n, dir)
		}
	}
}

// testManifests has the API server judge every object of the plain manifests,
// and of the chart, without keeping any.
func (w *world) testManifests(t *testing.T) {
	kubectl(t, w.c, "apply", "--server-side", "-f", "../../manifests/connectedregistry.io_connectedregistries.yaml")
	kubectl(t, w.c, "wait", "--for=condition=Established", "crd/connectedregistries.connectedregistry.io")
	every := filepath.Join(t.TempDir(), "every-value.yaml")
	rendered, err := w.c.Helm(t.Context(), "template", Release, w.Chart, "--namespace="+Namespace, "--no-hooks", "--kube-version=1.36.0",
		"--values=../chart/testdata/every-value.yaml", "--set=service.clusterIP="+w.host,
		"--set=serviceMonitor.enabled=false,cert-manager.enabled=false,cert-manager.install=false")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(every, rendered, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"-k", "../../manifests"},
		{"-f", "../../manifests/install.yaml"},
		{"-f", "../../manifests/connectedregistry.yaml"},
		{"-f", "../../manifests/uninstall.yaml"},
		{"-f", "../../manifests/prefetch-workloads.yaml"},
		{"-f", every},
	} {
		args = append([]string{"apply", "--server-side", "--dry-run=server", "--validate=strict", "--force-conflicts"}, args...)
		if out, err := w.c.Kubectl(t.Context(), args...); err != nil {
			t.Error(err)
		} else {
			t.Logf("%s", out)
		}
	}
}
