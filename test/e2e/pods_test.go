package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/test/cluster"
)

// patience is how long anything may take on a machine that is busy.
const patience = 3 * time.Minute

// pullers is where the pods run that pull.
const pullers = "pullers"

// pod is a pod that pulls one image and ends.
type pod struct {
	name, node, image, secret string
}

func (p pod) manifest() string {
	secret := ""
	if p.secret != "" {
		secret = fmt.Sprintf("imagePullSecrets: [{name: %s}]", p.secret)
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %q, namespace: %s}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  nodeSelector: {kubernetes.io/hostname: %s}
  %s
  containers:
  - name: hello-world
    image: %s
    imagePullPolicy: Always
    args: [-c, "true"]
---`, p.name, pullers, p.node, secret, p.image)
}

// start creates pods.
func start(t *testing.T, c *cluster.Cluster, pods ...pod) {
	t.Helper()
	var all strings.Builder
	for _, p := range pods {
		all.WriteString(p.manifest())
	}
	if err := c.Apply(t.Context(), strings.NewReader(all.String())); err != nil {
		t.Fatal(err)
	}
}

// succeed waits until the pods have run, and removes them.
func succeed(t *testing.T, c *cluster.Cluster, pods ...pod) {
	t.Helper()
	for _, p := range pods {
		eventually(t, func() error {
			got, err := c.Kubectl(t.Context(), "get", "pod", p.name, "-n", pullers, "-o",
				"jsonpath={.status.phase} {.status.containerStatuses[0].state}")
			if err == nil && !strings.HasPrefix(string(got), "Succeeded") {
				err = fmt.Errorf("pod %s with %s: %s", p.name, p.image, got)
			}
			return err
		})
	}
	remove(t, c, pods...)
}

// refused waits until the kubelet has said of each pod that its image cannot be
// pulled, and removes them.
func refused(t *testing.T, c *cluster.Cluster, pods ...pod) {
	t.Helper()
	for _, p := range pods {
		eventually(t, func() error {
			got, err := c.Kubectl(t.Context(), "get", "pod", p.name, "-n", pullers, "-o",
				"jsonpath={.status.phase} {.status.containerStatuses[0].state.waiting.reason}")
			if strings.HasPrefix(string(got), "Succeeded") {
				t.Fatalf("pod %s ran though it may not pull %s", p.name, p.image)
			}
			if err == nil && !strings.Contains(string(got), "ErrImagePull") && !strings.Contains(string(got), "ImagePullBackOff") {
				err = fmt.Errorf("pod %s with %s: %s", p.name, p.image, got)
			}
			return err
		})
	}
	remove(t, c, pods...)
}

func remove(t *testing.T, c *cluster.Cluster, pods ...pod) {
	t.Helper()
	args := []string{"delete", "pod", "-n", pullers, "--wait=false"}
	for _, p := range pods {
		args = append(args, p.name)
	}
	kubectl(t, c, args...)
}

// pull pulls an image on a node as containerd does for a pod, without a kubelet.
func pull(ctx context.Context, n *cluster.Node, image, credentials string) error {
	args := []string{"/opt/cluster/containerd/ctr", "--namespace=k8s.io", "images", "pull", "--hosts-dir=/etc/containerd/certs.d"}
	if credentials != "" {
		args = append(args, "--user="+credentials)
	}
	_, err := n.Run(ctx, args[0], append(args[1:], image)...)
	return err
}

func kubectl(t *testing.T, c *cluster.Cluster, args ...string) string {
	t.Helper()
	out, err := c.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func apply(t *testing.T, c *cluster.Cluster, manifests string) {
	t.Helper()
	if err := c.Apply(t.Context(), strings.NewReader(manifests)); err != nil {
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
func explain(t *testing.T, c *cluster.Cluster) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, args := range [][]string{
		{"get", "connectedregistries", "-A", "-o", "yaml"},
		{"get", "pods,leases,secrets,configmaps", "-n", Namespace, "-o", "wide"},
		{"get", "events", "-A", "--sort-by=.lastTimestamp"},
		{"describe", "pods", "-n", Namespace},
		{"logs", "-n", Namespace, "-l", "app.kubernetes.io/part-of=connected-registry", "--prefix", "--tail=60", "--all-containers"},
	} {
		out, err := c.Kubectl(ctx, args...)
		t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	for _, n := range c.Nodes() {
		out, err := n.Run(ctx, "sh", "-c", "grep -r . /etc/containerd/certs.d | grep -v -e CERT -e '[A-Za-z0-9+/=]\\{60\\}'; ls -l /usr/local/share/ca-certificates")
		t.Logf("%s: %v\n%s", n.Name(), err, out)
	}
}
