package layouts

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/test/cluster"
)

const (
	// patience is how long anything may take on a machine that is busy.
	patience  = 3 * time.Minute
	sitePlain = "plain"
	siteK3s   = "k3s"
)

// site is one installation, in a namespace of its own, for the nodes that bear
// its name as a label.
type site struct {
	*world
	chart, name, values string
	addr                netip.Addr
}

func (s *site) install(t *testing.T) error {
	values := fmt.Sprintf(`
connectionString: "ConnectedRegistryName=edge;SyncTokenName=%s;SyncTokenPassword=%s;ParentGatewayEndpoint=%s;ParentEndpointProtocol=https"
parent: {caSecretRef: {name: parent-ca}}
mirrors: [{registry: %s, anonymousPull: true}]
service: {clusterIP: %s}
cert-manager: {enabled: false, install: false}
registry: {replicas: 1, nodeSelector: {kubernetes.io/hostname: node1}}
syncer: {nodeSelector: {kubernetes.io/hostname: node1}}
`, parentUser, parentPassword, parentHost, parentHost, s.addr)
	where := fmt.Sprintf("agent: {nodeSelector: {site: %s}}\n", s.name)
	args := []string{"install", "edge", s.chart, "--namespace=" + s.name, "--create-namespace", "--wait", "--timeout=4m"}
	for i, v := range []string{values, where, s.values} {
		file := filepath.Join(t.TempDir(), fmt.Sprint(i, ".yaml"))
		if err := os.WriteFile(file, []byte(v), 0o600); err != nil {
			return err
		}
		args = append(args, "--values="+file)
	}
	if err := s.c.Apply(t.Context(), strings.NewReader(fmt.Sprintf(`
apiVersion: v1
kind: Namespace
metadata: {name: %s}
---
apiVersion: v1
kind: Secret
metadata: {name: parent-ca, namespace: %s}
stringData: {ca.crt: %q}
`, s.name, s.name, s.parent.pair.cert))); err != nil {
		return err
	}
	if _, err := s.c.Helm(t.Context(), args...); err != nil {
		return err
	}
	_, err := s.c.Kubectl(t.Context(), "wait", "connectedregistry/connected-registry", "-n", s.name,
		"--for=jsonpath={.status.connectionState}=Online", "--timeout=180s")
	return err
}

func (s *site) uninstall(t *testing.T) error {
	_, err := s.c.Helm(t.Context(), "uninstall", "edge", "--namespace="+s.name, "--wait", "--timeout=4m")
	return err
}

// report is of connectedregistry.io/runtime what is looked at here.
type report struct{ Distribution, Version, Verdict string }

// lease returns what a node's agent says there.
func (w *world) lease(t *testing.T, n *node) (r report, fault string, err error) {
	site := sitePlain
	if n.k3s {
		site = siteK3s
	}
	out, err := w.c.Kubectl(t.Context(), "get", "lease", "connected-registry-node-"+n.Name(), "-n", site, "-o", "jsonpath={.metadata.annotations}")
	if err != nil {
		return r, "", err
	}
	var annotations map[string]string
	if err := json.Unmarshal(out, &annotations); err != nil {
		return r, "", err
	}
	text, ok := annotations["connectedregistry.io/runtime"]
	if !ok {
		return r, "", fmt.Errorf("%s: the agent says nothing of the runtime yet", n.layout)
	}
	return r, annotations["connectedregistry.io/error"], json.Unmarshal([]byte(text), &r)
}

// restartRuntime restarts containerd on a node, and waits until it answers.
func (w *world) restartRuntime(n *node) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := n.StopService(ctx, "containerd"); err != nil {
		return err
	}
	if err := n.StartService(ctx, "containerd"); err != nil {
		return err
	}
	socket := "/run/containerd/containerd.sock"
	if n.k3s {
		socket = "/run/k3s/containerd/containerd.sock"
	}
	for {
		_, err := n.Run(ctx, "/opt/cluster/containerd/ctr", "--address="+socket, "version")
		if err == nil || ctx.Err() != nil {
			return err
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// pod is a pod that pulls one of the parent's images on a node and ends.
type pod struct{ node, tag string }

func (w *world) start(t *testing.T, pods ...pod) {
	t.Helper()
	var all strings.Builder
	for _, p := range pods {
		fmt.Fprintf(&all, `
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  nodeSelector: {kubernetes.io/hostname: %s}
  containers:
  - name: hello-world
    image: %s/hello-world:%s
    imagePullPolicy: Always
    args: [-c, "true"]
---`, p.tag, p.node, parentHost, p.tag)
	}
	if err := w.c.Apply(t.Context(), strings.NewReader(all.String())); err != nil {
		t.Fatal(err)
	}
}

// succeed waits until the pods have run, and removes them.
func (w *world) succeed(t *testing.T, pods ...pod) {
	t.Helper()
	w.await(t, pods, func(status string) bool { return strings.HasPrefix(status, "Succeeded") })
}

// refused waits until the kubelet has said of each pod that its image cannot be
// pulled, and removes them.
func (w *world) refused(t *testing.T, pods ...pod) {
	t.Helper()
	w.await(t, pods, func(status string) bool {
		if strings.HasPrefix(status, "Succeeded") {
			t.Fatalf("a pod ran where no hosts directory is read")
		}
		return strings.Contains(status, "ErrImagePull") || strings.Contains(status, "ImagePullBackOff")
	})
}

func (w *world) await(t *testing.T, pods []pod, reached func(status string) bool) {
	t.Helper()
	for _, p := range pods {
		eventually(t, func() error {
			got, err := w.c.Kubectl(t.Context(), "get", "pod", p.tag, "-o", "jsonpath={.status.phase} {.status.containerStatuses[0].state}")
			if err == nil && !reached(string(got)) {
				err = fmt.Errorf("pod %s on %s (%s): %s", p.tag, p.node, w.layoutOf(p.node), got)
			}
			return err
		})
		w.kubectl(t, "delete", "pod", p.tag, "--wait=false")
	}
}

func (w *world) layoutOf(name string) cluster.Layout {
	for _, n := range w.all {
		if n.Name() == name {
			return n.layout
		}
	}
	return ""
}

func (w *world) kubectl(t *testing.T, args ...string) {
	t.Helper()
	if _, err := w.c.Kubectl(t.Context(), args...); err != nil {
		t.Fatal(err)
	}
}

// eventually repeats check until it succeeds.
func eventually(t *testing.T, check func() error) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// explain logs what the cluster knows of a failure.
func (w *world) explain(t *testing.T) {
	if !t.Failed() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, args := range [][]string{
		{"get", "nodes", "-o", "wide", "--show-labels"},
		{"get", "pods", "-A", "-o", "wide"},
		{"get", "leases", "-A", "-o", "yaml", "-l", "app.kubernetes.io/component=node-agent"},
		{"get", "events", "-A", "--sort-by=.lastTimestamp"},
	} {
		out, err := w.c.Kubectl(ctx, args...)
		t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	for _, s := range w.sites {
		out, err := w.c.Kubectl(ctx, "logs", "-n", s.name, "-l", "app.kubernetes.io/part-of=connected-registry", "--prefix", "--tail=40", "--all-containers")
		t.Logf("logs of %s: %v\n%s", s.name, err, out)
	}
}
