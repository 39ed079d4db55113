package layouts

import (
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/test/cluster"
	"github.com/connected-registry/connected-registry/test/e2e"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// node is a node that the product is installed on.
type node struct {
	*cluster.Node
	layout cluster.Layout
	// distribution and runtime are what the agent is to find there.
	distribution, runtime string
	k3s                   bool
	// remedy is, where no hosts directory is read, a file, and what its operator
	// adds to it on being told so.
	remedy *remedy
	before map[string]string
}

type remedy struct{ file, text string }

const (
	v17 = "1.7.35"
	v2  = "2.4.2"
)

func nodes() []*node {
	return []*node{
		{layout: cluster.Kind, distribution: "kind", runtime: v2},
		{layout: cluster.AKS, distribution: "AKS", runtime: v2},
		{layout: cluster.AKS17, distribution: "AKS", runtime: v17},
		{layout: cluster.K3s, distribution: "K3s", runtime: v2, k3s: true},
		{layout: cluster.K3s17, distribution: "K3s", runtime: v17, k3s: true},
		{layout: cluster.Unset, distribution: "kubeadm", runtime: v2, remedy: &remedy{
			"etc/containerd/conf.d/connected-registry.toml",
			"version = 3\n\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = \"/etc/containerd/certs.d\"\n",
		}},
		{layout: cluster.Unset17, distribution: "kind", runtime: v17, remedy: &remedy{
			"etc/containerd/config.toml",
			"\n[plugins.'io.containerd.grpc.v1.cri'.registry]\n  config_path = \"/etc/containerd/certs.d\"\n",
		}},
	}
}

// world is the cluster: a node that the registries run on, and the others, on
// which their agents are.
type world struct {
	c      *cluster.Cluster
	parent *parent
	all    []*node
	sites  []*site
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{all: nodes()}
	kinds := []cluster.Layout{""}
	for _, n := range w.all {
		kinds = append(kinds, n.layout)
	}
	var err error
	w.c, err = cluster.New(t.Context(), cluster.Config{
		Name: fmt.Sprintf("layouts-%d", os.Getpid()), Nodes: len(kinds), Layouts: kinds,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.c.Close(); err != nil {
			t.Error(err)
		}
	})
	for i, n := range w.all {
		n.Node = w.c.Nodes()[i+1]
		label := sitePlain
		if n.k3s {
			label = siteK3s
		}
		w.kubectl(t, "label", "node", n.Name(), "site="+label)
		// What was put into the store by other means becomes as the store's own
		// program leaves it.
		if _, err := n.Run(t.Context(), "update-ca-certificates", "--fresh"); err != nil {
			t.Fatal(err)
		}
		n.before = snapshot(t, n.Node)
	}
	w.parent = newParent(t, w.c)
	w.parent.fill(t, 6*len(w.all))
	product, err := e2e.Load(t.Context(), w.c)
	if err != nil {
		t.Fatal(err)
	}
	w.sites = []*site{
		{world: w, chart: product.Chart, name: sitePlain, addr: w.c.ServiceAddr(50), values: "trustDistribution: {configureRuntime: true}\n"},
		{world: w, chart: product.Chart, name: siteK3s, addr: w.c.ServiceAddr(51), values: "agent: {containerdPath: /var/lib/rancher/k3s/agent/etc/containerd}\n"},
	}
	return w
}

// TestLayouts takes all layouts through one life.
func TestLayouts(t *testing.T) {
	w := newWorld(t)
	defer w.explain(t)
	w.forSites(t, (*site).install)
	w.parent.stop()
	w.checkLeases(t, false)
	w.checkWritten(t)
	w.followRemedies(t)
	w.pull(t)

	w.forNodes(t, w.restartRuntime)
	w.pull(t)

	for _, n := range w.all {
		if err := w.c.StopNode(t.Context(), n.Node); err != nil {
			t.Fatal(err)
		}
	}
	w.forNodes(t, func(n *node) error { return w.c.StartNode(t.Context(), n.Node) })
	w.pull(t)
	w.checkLeases(t, true)

	w.undoRemedies(t)
	w.forSites(t, (*site).uninstall)
	for _, n := range w.all {
		if diff := cmp.Diff(n.before, snapshot(t, n.Node)); diff != "" {
			t.Errorf("%s before and after (-before +after):\n%s", n.layout, diff)
		}
	}
}

func (w *world) forSites(t *testing.T, do func(*site, *testing.T) error) {
	t.Helper()
	var g errgroup.Group
	for _, s := range w.sites {
		g.Go(func() error { return do(s, t) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

func (w *world) forNodes(t *testing.T, do func(*node) error) {
	t.Helper()
	var g errgroup.Group
	for _, n := range w.all {
		g.Go(func() error {
			if err := do(n); err != nil {
				return fmt.Errorf("%s: %w", n.layout, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

// pull has a pod on every node run an image of the parent's name that no node
// has; the parent does not answer.
func (w *world) pull(t *testing.T) {
	t.Helper()
	var pods []pod
	for _, n := range w.all {
		pods = append(pods, pod{n.Name(), w.parent.take()})
	}
	w.start(t, pods...)
	w.succeed(t, pods...)
}

// checkLeases compares what every agent says of its node with what that is,
// before or after its operator has done what was to be done.
func (w *world) checkLeases(t *testing.T, remedied bool) {
	t.Helper()
	for _, n := range w.all {
		eventually(t, func() error {
			report, fault, err := w.lease(t, n)
			if err != nil {
				return err
			}
			if report.Distribution != n.distribution || strings.TrimPrefix(report.Version, "v") != n.runtime {
				return fmt.Errorf("%s: the agent found %q with containerd %q", n.layout, report.Distribution, report.Version)
			}
			well := n.remedy == nil || remedied
			if well && (fault != "" || report.Verdict == "fault") {
				return fmt.Errorf("%s: the agent says %q and %q", n.layout, report.Verdict, fault)
			}
			if !well && (report.Verdict != "fault" || !strings.Contains(fault, "restart") || !strings.Contains(fault, "/"+n.remedy.file)) {
				return fmt.Errorf("%s: the agent says %q and %q, which does not tell of /%s and a restart", n.layout, report.Verdict, fault, n.remedy.file)
			}
			return nil
		})
	}
}

// checkWritten finds on every node, where its platform has it, what an
// uninstallation has to take away.
func (w *world) checkWritten(t *testing.T) {
	t.Helper()
	for _, n := range w.all {
		name := "etc/containerd/certs.d/" + parentHost + "/hosts.toml"
		if n.k3s {
			name = "var/lib/rancher/k3s/agent/" + name
		}
		after := snapshot(t, n.Node)
		if !strings.Contains(after[name], "[host") {
			t.Errorf("%s: /%s: %q", n.layout, name, after[name])
		}
		const bundle = "etc/ssl/certs/ca-certificates.crt"
		if after[bundle] == n.before[bundle] {
			t.Errorf("%s: the system's trust store has no new certificate", n.layout)
		}
	}
}

// followRemedies sees that pulls fail on the nodes that read no hosts directory,
// and that nobody has touched their configuration, for want of something that
// restarts their runtime; then their operator does what the agents say.
func (w *world) followRemedies(t *testing.T) {
	t.Helper()
	var pods []pod
	for _, n := range w.all {
		if n.remedy != nil {
			pods = append(pods, pod{n.Name(), w.parent.take()})
		}
	}
	w.start(t, pods...)
	w.refused(t, pods...)
	for _, n := range w.all {
		if n.remedy == nil {
			continue
		}
		for _, name := range []string{"etc/containerd/config.toml", n.remedy.file} {
			if diff := cmp.Diff(n.before[name], snapshot(t, n.Node)[name]); diff != "" {
				t.Errorf("%s: %s was changed (-before +after):\n%s", n.layout, name, diff)
			}
		}
		appendFile(t, n.Node, n.remedy.file, n.remedy.text)
		if err := w.restartRuntime(n); err != nil {
			t.Fatalf("%s: %v", n.layout, err)
		}
	}
}

// undoRemedies is the operator's part of the cleanup.
func (w *world) undoRemedies(t *testing.T) {
	t.Helper()
	for _, n := range w.all {
		if n.remedy != nil {
			cutFile(t, n.Node, n.remedy.file, n.remedy.text)
		}
	}
}
