package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/test/cluster"
)

// testLife takes one installation with two replicas through what happens to it.
func (w *world) testLife(t *testing.T) {
	w.with(t, func(t *testing.T) {
		w.pulls(t)
		t.Run("rights", w.testRights)
		t.Run("parent stopped", w.testParentStopped)
		t.Run("replica killed", w.testReplicaKilled)
		t.Run("replica hung", w.testReplicaHung)
		t.Run("syncer gone", w.testSyncerGone)
		t.Run("agent killed", w.testAgentKilled)
		t.Run("API server stopped", w.testAPIStopped)
		t.Run("rotation", w.testRotation)
		t.Run("upgrade", w.testUpgrade)
		t.Run("node added", w.testNodeAdded)
	}, noManager, w.lifeValues())
}

func (w *world) lifeValues() string {
	return fmt.Sprintf("registry: {replicas: 2}\nmirrors: [{registry: %s, anonymousPull: true}]\n", parentHost)
}

// oneEach has a pod on every node pull an image that no node has.
func (w *world) oneEach(t *testing.T, host, secret string) {
	t.Helper()
	w.oneEachOf(t, host, secret, w.parent.take)
}

// oneEachOf is oneEach with tags that are taken from elsewhere.
func (w *world) oneEachOf(t *testing.T, host, secret string, take func() string) {
	t.Helper()
	var pods []pod
	for _, n := range w.c.Nodes() {
		tag := take()
		pods = append(pods, pod{tag + "-" + n.Name(), n.Name(), host + "/hello-world:" + tag, secret})
	}
	start(t, w.c, pods...)
	succeed(t, w.c, pods...)
}

// fetch has every node's containerd pull images that no node has, by both names
// of the registry, without a kubelet.
func (w *world) fetch(t *testing.T) {
	t.Helper()
	for _, n := range w.c.Nodes() {
		for ref, credentials := range w.refs() {
			if err := pull(t.Context(), n, ref, credentials); err != nil {
				t.Errorf("%s: %v", n.Name(), err)
			}
		}
	}
}

// refs are an image by each name of the registry, with the credentials for it.
func (w *world) refs() map[string]string {
	return map[string]string{
		w.host + "/hello-world:" + w.parent.take():     reader,
		parentHost + "/hello-world:" + w.parent.take(): "",
	}
}

// testParentStopped: images of the parent's name are served from here.
func (w *world) testParentStopped(t *testing.T) {
	w.parent.stop()
	defer w.parent.start(t)
	w.oneEach(t, parentHost, "")
	w.oneEach(t, w.host, "regcred")
}

// testReplicaKilled kills one of two replicas, and at once asks for images.
func (w *world) testReplicaKilled(t *testing.T) {
	w.parent.stop()
	defer w.parent.start(t)
	w.signal(t, w.replicaNode(t), "registry", "KILL")
	w.fetch(t)
	w.oneEach(t, w.host, "regcred")
	w.settled(t, "deployment/connected-registry")
}

// testReplicaHung has one of two replicas take connections and never answer.
func (w *world) testReplicaHung(t *testing.T) {
	w.parent.stop()
	defer w.parent.start(t)
	n := w.replicaNode(t)
	w.signal(t, n, "registry", "STOP")
	w.fetch(t)
	w.oneEach(t, w.host, "regcred")
	w.signal(t, n, "registry", "CONT")
	w.settled(t, "deployment/connected-registry")
}

// replicaNode is the node of the first replica.
func (w *world) replicaNode(t *testing.T) *cluster.Node {
	t.Helper()
	name := kubectl(t, w.c, "get", "pods", "-n", Namespace, "-l", "app.kubernetes.io/name=connected-registry", "-o", "jsonpath={.items[0].spec.nodeName}")
	for _, n := range w.c.Nodes() {
		if n.Name() == name {
			return n
		}
	}
	t.Fatalf("no replica runs on any node: %q", name)
	return nil
}

func (w *world) testSyncerGone(t *testing.T) {
	kubectl(t, w.c, "scale", "deployment/connected-registry-syncer", "-n", Namespace, "--replicas=0")
	defer func() {
		kubectl(t, w.c, "scale", "deployment/connected-registry-syncer", "-n", Namespace, "--replicas=1")
		w.settled(t, "deployment/connected-registry-syncer")
	}()
	w.parent.stop()
	defer w.parent.start(t)
	kubectl(t, w.c, "wait", "pod", "-n", Namespace, "-l", "app.kubernetes.io/name=connected-registry-syncer", "--for=delete", "--timeout=120s")
	w.fetch(t)
	w.oneEach(t, w.host, "regcred")
}

func (w *world) testAgentKilled(t *testing.T) {
	w.parent.stop()
	defer w.parent.start(t)
	for _, n := range w.c.Nodes() {
		w.signal(t, n, "agent", "KILL")
	}
	w.fetch(t)
	w.oneEach(t, w.host, "regcred")
	w.settled(t, "daemonset/connected-registry-agent")
}

func (w *world) testAPIStopped(t *testing.T) {
	w.parent.stop()
	defer w.parent.start(t)
	if err := w.c.StopService(t.Context(), "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	w.fetch(t)
	// An agent that begins now has nobody to ask.
	w.signal(t, w.c.Nodes()[0], "agent", "KILL")
	w.fetch(t)
	if err := w.c.StartService(t.Context(), "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	if err := w.c.WaitAPI(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.settled(t, "daemonset/connected-registry-agent")
}

// signal sends a signal to one process of a subcommand on a node.
func (w *world) signal(t *testing.T, n *cluster.Node, subcommand, signal string) {
	t.Helper()
	if out, err := n.Run(t.Context(), "pkill", "-"+signal, "--oldest", "-f", "^/connected-registry "+subcommand+" "); err != nil {
		t.Fatalf("sending %s to %s on %s: %v\n%s", signal, subcommand, n.Name(), err, out)
	}
}

func (w *world) settled(t *testing.T, object string) {
	t.Helper()
	kubectl(t, w.c, "rollout", "status", object, "-n", Namespace, "--timeout=180s")
}

// testUpgrade pulls on every node, without a break, while every pod is replaced.
func (w *world) testUpgrade(t *testing.T) {
	w.parent.stop()
	defer w.parent.start(t)
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	counts := make([]int, len(w.c.Nodes()))
	for i, n := range w.c.Nodes() {
		group.Go(func() { counts[i] = w.pullOn(ctx, t, n) })
	}
	err := w.Upgrade(t.Context(), w.values(), noManager, w.lifeValues(), "image: {tag: "+NextTag+"}\n")
	if err == nil {
		err = w.replaced(ctx)
	}
	cancel()
	group.Wait()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("pulls during the upgrade, for each node: %v", counts)
}

// pullOn pulls one image after the other, none of which the node has, until ctx
// ends, and returns how many.
func (w *world) pullOn(ctx context.Context, t *testing.T, n *cluster.Node) (pulls int) {
	for ; ctx.Err() == nil; pulls += 2 {
		for ref, credentials := range w.refs() {
			if err := pull(ctx, n, ref, credentials); err != nil && ctx.Err() == nil {
				t.Errorf("%s, after %d pulls: %v", n.Name(), pulls, err)
				return pulls
			}
		}
	}
	return pulls
}

// rotations is how many CAs follow one another.
const rotations = 10

// testRotation changes the CA, key and all, again and again while nodes pull
// images that none has, by both names of the registry and without the parent.
func (w *world) testRotation(t *testing.T) {
	kubectl(t, w.c, "patch", "connectedregistry", "connected-registry", "-n", Namespace, "--type=merge",
		`-p={"spec":{"trustDistribution":{"hold":"PT1S"}}}`)
	w.parent.stop()
	defer w.parent.start(t)
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	counts := make([]int, len(w.c.Nodes()))
	for i, n := range w.c.Nodes() {
		group.Go(func() { counts[i] = w.pullSlowlyOn(ctx, t, n) })
	}
	seen := map[string]bool{w.trusted(t).fingerprint: true}
	began := time.Now()
	for i := range rotations {
		kubectl(t, w.c, "annotate", "connectedregistry", "connected-registry", "-n", Namespace, "--overwrite",
			fmt.Sprintf("connectedregistry.io/rotate-ca=%d", i))
		eventually(t, func() error {
			now := w.trusted(t)
			if now.phase != "Stable" || seen[now.fingerprint] {
				return fmt.Errorf("rotation %d: %+v", i, now)
			}
			seen[now.fingerprint] = true
			return nil
		})
		if t.Failed() {
			return
		}
	}
	cancel()
	group.Wait()
	t.Logf("%d rotations in %s; pulls meanwhile, for each node: %v", rotations, time.Since(began).Round(time.Second), counts)
}

// trust is what a resource says about the CA.
type trust struct{ phase, fingerprint, message string }

func (w *world) trusted(t *testing.T) trust {
	t.Helper()
	fields := strings.SplitN(kubectl(t, w.c, "get", "connectedregistry", "connected-registry", "-n", Namespace,
		"-o=jsonpath={.status.trust.phase}|{.status.trust.fingerprints}|{.status.trust.message}"), "|", 3)
	return trust{fields[0], fields[1], fields[2]}
}

// pullSlowlyOn is pullOn with a pause after each pull, for what takes minutes.
func (w *world) pullSlowlyOn(ctx context.Context, t *testing.T, n *cluster.Node) (pulls int) {
	for ctx.Err() == nil {
		for ref, credentials := range w.refs() {
			if err := pull(ctx, n, ref, credentials); err != nil && ctx.Err() == nil {
				t.Errorf("%s, after %d pulls: %v", n.Name(), pulls, err)
				return pulls
			}
			pulls++
			select {
			case <-ctx.Done():
			case <-time.After(1500 * time.Millisecond):
			}
		}
	}
	return pulls
}

// replaced waits until no pod of the old version is left.
func (w *world) replaced(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		images, err := w.c.Kubectl(ctx, "get", "pods", "-n", Namespace, "-o", "jsonpath={.items[*].spec.containers[0].image}")
		if err == nil && !slices.ContainsFunc(strings.Fields(string(images)), func(s string) bool { return !strings.HasSuffix(s, NextTag) }) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("pods of the old version stay: %s: %w", images, err)
		case <-time.After(time.Second):
		}
	}
}

// testNodeAdded has an application wait for a node that is yet to come, whose
// image nobody but we can give it.
func (w *world) testNodeAdded(t *testing.T) {
	w.parent.stop()
	defer w.parent.start(t)
	node := fmt.Sprintf("node%d", len(w.c.Nodes())+1)
	pods := []pod{
		{"own-" + node, node, w.host + "/hello-world:" + w.parent.take(), "regcred"},
		{"mirrored-" + node, node, parentHost + "/hello-world:" + w.parent.take(), ""},
	}
	start(t, w.c, pods...)
	n, err := w.c.AddNode(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if n.Name() != node {
		t.Fatalf("the new node is %s", n.Name())
	}
	succeed(t, w.c, pods...)
}

// testRights asks the API server what the service accounts may do.
func (w *world) testRights(t *testing.T) {
	agent := "system:serviceaccount:" + Namespace + ":connected-registry-agent"
	replica := "system:serviceaccount:" + Namespace + ":connected-registry"
	can := func(who string, want bool, args ...string) {
		t.Helper()
		out, err := w.c.Kubectl(t.Context(), append([]string{"auth", "can-i", "--as=" + who, "-n", Namespace}, args...)...)
		if got := strings.HasPrefix(string(out), "yes"); got != want || !got && !strings.HasPrefix(string(out), "no") {
			t.Errorf("%s may %v: %s (%v), want %v", who, args, strings.TrimSpace(string(out)), err, want)
		}
	}
	for _, verb := range []string{"get", "list", "watch"} {
		can(agent, true, verb, "secrets/connected-registry-ca")
		for _, secret := range []string{"connected-registry-tls", "connected-registry-root", "connected-registry-replica", "connected-registry-connection-string", readerName, "parent-ca"} {
			can(agent, false, verb, "secrets/"+secret)
		}
		can(agent, false, verb, "secrets")
		can(agent, false, verb, "secrets", "--all-namespaces")
		can(agent, false, verb, "configmaps")
		can(agent, false, verb, "connectedregistries")
		can(agent, false, verb, "pods")
		can(agent, false, verb, "nodes")
		can(replica, false, verb, "secrets/connected-registry-ca")
	}
	for _, verb := range []string{"create", "update", "patch", "delete"} {
		can(agent, false, verb, "secrets/connected-registry-ca")
		can(agent, false, verb, "nodes")
		can(agent, false, verb, "pods")
	}
	can(agent, false, "list", "leases")
	can(agent, false, "delete", "leases")
	syncer := "system:serviceaccount:" + Namespace + ":connected-registry-syncer"
	can(syncer, false, "list", "secrets", "--namespace="+pullers)
	can(syncer, false, "list", "secrets", "--all-namespaces")
	can(syncer, false, "update", "nodes")
	can(syncer, false, "create", "pods")
	w.testLeases(t)
}

// testLeases uses the token of one node's agent for the Lease of another.
func (w *world) testLeases(t *testing.T) {
	one, other := w.c.Nodes()[0], w.c.Nodes()[1]
	agentPod := kubectl(t, w.c, "get", "pods", "-n", Namespace, "-l", "app.kubernetes.io/name=connected-registry-agent",
		"--field-selector=spec.nodeName="+one.Name(), "-o", "jsonpath={.items[0].metadata.name}")
	token := kubectl(t, w.c, "create", "token", "connected-registry-agent", "-n", Namespace,
		"--bound-object-kind=Pod", "--bound-object-name="+agentPod)
	loose := kubectl(t, w.c, "create", "token", "connected-registry-agent", "-n", Namespace)
	as := func(token string, args ...string) error {
		file := w.kubeconfig(t, token)
		_, err := w.c.Kubectl(t.Context(), append([]string{"--kubeconfig=" + file, "-n", Namespace}, args...)...)
		return err
	}
	annotate := func(lease string) []string {
		return []string{"annotate", "lease", lease, fmt.Sprint("test=", time.Now().UnixNano()), "--overwrite"}
	}
	if err := as(token, annotate("connected-registry-node-"+one.Name())...); err != nil {
		t.Errorf("the agent's own Lease: %v", err)
	}
	const refusal = "Lease of its own node alone"
	for what, err := range map[string]error{
		"another node's Lease":        as(token, annotate("connected-registry-node-"+other.Name())...),
		"the syncer's Lease":          as(token, annotate("connected-registry-syncer")...),
		"a Lease without a node":      as(loose, annotate("connected-registry-node-"+one.Name())...),
		"a new Lease of another node": as(token, "create", "-f", "testdata/lease.yaml"),
	} {
		if err == nil || !strings.Contains(err.Error(), refusal) {
			t.Errorf("%s: %v, want a refusal", what, err)
		}
	}
}

// kubeconfig writes the administrator's kubeconfig with a token in place of the
// certificate.
func (w *world) kubeconfig(t *testing.T, token string) string {
	t.Helper()
	server := kubectl(t, w.c, "config", "view", "--minify", "--raw", "-o", "jsonpath={.clusters[0].cluster.server}")
	ca := kubectl(t, w.c, "config", "view", "--minify", "--raw", "-o", "jsonpath={.clusters[0].cluster.certificate-authority-data}")
	file := filepath.Join(t.TempDir(), "kubeconfig")
	content := fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": [{"name": "c", "cluster": {"server": %q, "certificate-authority-data": %q}}],
		"users": [{"name": "c", "user": {"token": %q}}],
		"contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}]}`, server, ca, strings.TrimSpace(token))
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
