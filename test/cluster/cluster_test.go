package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

// helperVariable makes the test executable start a cluster and wait, to be
// killed.
const helperVariable = "CLUSTER_TEST_NAME"

func TestMain(m *testing.M) {
	if name := os.Getenv(helperVariable); name != "" {
		if err := helper(name); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func helper(name string) error {
	if _, err := New(context.Background(), Config{Name: name, Nodes: 1}); err != nil {
		return err
	}
	fmt.Println("up")
	select {}
}

func testConfig(t *testing.T, name string) Config {
	return Config{
		Name: fmt.Sprintf("%s-%d", name, os.Getpid()),
		Log:  slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
}

// TestCluster follows one cluster through its life.
func TestCluster(t *testing.T) {
	before := host(t)
	config := testConfig(t, "whole")
	config.CertManager = true
	c, err := New(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	nodes := c.Nodes()
	if len(nodes) != 2 {
		t.Fatalf("%d nodes, want 2", len(nodes))
	}
	loadBusybox(t, c)
	apply(t, c, "workload.yaml")
	kubectl(t, c, "rollout", "status", "daemonset/tools", "deployment/web", "--timeout=180s")

	t.Run("a pod reaches its own node's files and no other's", func(t *testing.T) {
		for _, n := range nodes {
			if got := readNode(t, n, "etc/written-by-pod"); got != n.Name()+"\n" {
				t.Errorf("%s has %q", n.Name(), got)
			}
		}
		if _, err := os.Stat("/etc/written-by-pod"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the host's /etc was written to: %v", err)
		}
	})
	t.Run("a service answers from the other node", func(t *testing.T) {
		addr := kubectl(t, c, "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
		for _, from := range nodes {
			for _, to := range nodes {
				eventually(t, func() error {
					got, err := c.Kubectl(t.Context(), "exec", pod(t, c, from), "--", "wget", "-q", "-O", "-", "http://"+addr)
					return is(string(got), err, to.Name()+"\n")
				})
			}
		}
	})
	t.Run("the host reaches services", func(t *testing.T) {
		addr := kubectl(t, c, "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
		eventually(t, func() error {
			got, err := get(t.Context(), "http://"+addr)
			return is(got, err, nodes[1].Name()+"\n")
		})
	})
	t.Run("pods and nodes reach the host", func(t *testing.T) {
		url := serve(t, net.JoinHostPort(c.HostAddr().String(), "0"), "from the host")
		got := kubectl(t, c, "exec", pod(t, c, nodes[0]), "--", "wget", "-q", "-O", "-", url)
		if got != "from the host" {
			t.Errorf("the pod got %q", got)
		}
		out, err := nodes[1].Run(t.Context(), "busybox", "wget", "-q", "-O", "-", url)
		if err := is(string(out), err, "from the host"); err != nil {
			t.Error(err)
		}
	})
	t.Run("services have names", func(t *testing.T) {
		addr := kubectl(t, c, "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
		eventually(t, func() error {
			out, err := c.Kubectl(t.Context(), "exec", pod(t, c, nodes[0]), "--", "nslookup", "web.default.svc.cluster.local")
			if err == nil && !strings.Contains(string(out), addr) {
				err = fmt.Errorf("no %s in %s", addr, out)
			}
			return err
		})
		got := kubectl(t, c, "exec", pod(t, c, nodes[0]), "--", "wget", "-q", "-O", "-", "http://web")
		if !strings.HasPrefix(got, "node") {
			t.Errorf("by its short name, the service answers %q", got)
		}
	})
	t.Run("the host's services have names", func(t *testing.T) {
		url := serve(t, net.JoinHostPort(c.HostAddr().String(), "0"), "by name")
		if err := c.AddHost("parent.example.com", c.HostAddr()); err != nil {
			t.Fatal(err)
		}
		url = strings.Replace(url, c.HostAddr().String(), "parent.example.com", 1)
		eventually(t, func() error {
			out, err := nodes[0].Run(t.Context(), "busybox", "wget", "-q", "-O", "-", url)
			return is(string(out), err, "by name")
		})
		if got := kubectl(t, c, "exec", pod(t, c, nodes[1]), "--", "wget", "-q", "-O", "-", url); got != "by name" {
			t.Errorf("the pod got %q", got)
		}
	})
	t.Run("logs", func(t *testing.T) {
		got := kubectl(t, c, "logs", "deployment/web", "--all-pods", "--prefix=false")
		for _, n := range nodes {
			if want := "serving on " + n.Name(); !strings.Contains(got, want) {
				t.Errorf("no %q in %q", want, got)
			}
		}
	})
	t.Run("a volume is shared between nodes", func(t *testing.T) {
		for _, n := range nodes {
			got := kubectl(t, c, "exec", pod(t, c, n), "--", "cat", "/shared/node1", "/shared/node2")
			if got != "node1\nnode2\n" {
				t.Errorf("%s sees %q", n.Name(), got)
			}
		}
	})
	t.Run("cert-manager issues", func(t *testing.T) {
		apply(t, c, "certificates.yaml")
		kubectl(t, c, "wait", "--for=condition=Ready", "certificate/root", "certificate/leaf", "--timeout=90s")
		if kubectl(t, c, "get", "secret", "leaf", "-o", `jsonpath={.data.tls\.crt}`) == "" {
			t.Error("the Secret of the leaf holds no certificate")
		}
	})
	t.Run("a service of a node restarts under its containers", func(t *testing.T) {
		name := pod(t, c, nodes[0])
		for _, service := range []string{"containerd", "kubelet"} {
			if err := nodes[0].StopService(t.Context(), service); err != nil {
				t.Fatal(err)
			}
			if err := nodes[0].StartService(t.Context(), service); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, func() error {
			_, err := c.Kubectl(t.Context(), "exec", name, "--", "true")
			return err
		})
	})
	t.Run("the API server goes and comes back", func(t *testing.T) {
		if err := c.StopService(t.Context(), "kube-apiserver"); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Kubectl(t.Context(), "get", "nodes", "--request-timeout=2s"); err == nil {
			t.Error("the API server answers though it was stopped")
		}
		if err := c.StartService(t.Context(), "kube-apiserver"); err != nil {
			t.Fatal(err)
		}
		if err := c.WaitAPI(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("a third node", func(t *testing.T) {
		n, err := c.AddNode(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		// Until the node is counted, the rollout is complete without it.
		eventually(t, func() error {
			got, err := c.Kubectl(t.Context(), "get", "daemonset/tools", "-o", "jsonpath={.status.desiredNumberScheduled}")
			return is(string(got), err, "3")
		})
		kubectl(t, c, "rollout", "status", "daemonset/tools", "--timeout=180s")
		if got := readNode(t, n, "etc/written-by-pod"); got != n.Name()+"\n" {
			t.Errorf("%s has %q", n.Name(), got)
		}
	})
	t.Run("a node loses power", func(t *testing.T) {
		n := nodes[1]
		if err := c.StopNode(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		kubectl(t, c, "wait", "--for=condition=Ready=Unknown", "node/"+n.Name(), "--timeout=90s")
		if err := c.StartNode(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		if got := readNode(t, n, "etc/written-by-pod"); got != n.Name()+"\n" {
			t.Errorf("after the start, %s has %q", n.Name(), got)
		}
		eventually(t, func() error {
			got, err := c.Kubectl(t.Context(), "exec", pod(t, c, n), "--", "cat", "/host/etc/hostname", "/host/etc/written-by-pod")
			if err == nil && !strings.HasSuffix(string(got), n.Name()+"\n") {
				err = fmt.Errorf("got %q", got)
			}
			return err
		})
	})
	t.Run("a volume goes with its claim", func(t *testing.T) {
		kubectl(t, c, "delete", "daemonset/tools", "deployment/web", "pvc/shared", "--cascade=foreground", "--timeout=90s")
		eventually(t, func() error {
			left, err := os.ReadDir(c.path("shared"))
			if err == nil && len(left) > 0 {
				err = fmt.Errorf("%d directories are left", len(left))
			}
			return err
		})
	})
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("closing again: %v", err)
	}
	if diff := cmp.Diff(before, host(t)); diff != "" {
		t.Errorf("the host before and after (-before +after):\n%s", diff)
	}
	noTrace(t, config)
}

// TestKilled kills the process that started a cluster, which leaves it no time
// to clean up.
func TestKilled(t *testing.T) {
	before := host(t)
	config := testConfig(t, "killed")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), helperVariable+"="+config.Name)
	cmd.Stderr = t.Output()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "up\n" {
		t.Fatalf("the helper said %q, %v", line, err)
	}
	if _, err := New(t.Context(), config); err == nil || !strings.Contains(err.Error(), "is up") {
		t.Errorf("starting a cluster that is up: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	eventually(t, func() error { return processes(t, config) })
	if err := Down(t.Context(), Config{Name: "another-" + config.Name}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, host(t)); diff != "" {
		t.Errorf("the host before and after (-before +after):\n%s", diff)
	}
	noTrace(t, config)
}

// TestCutOff ends a start at several points on its way.
func TestCutOff(t *testing.T) {
	before := host(t)
	for _, after := range []time.Duration{0, time.Second, 3 * time.Second, 7 * time.Second} {
		config := testConfig(t, "cut")
		ctx, cancel := context.WithCancel(t.Context())
		step := make(chan struct{})
		config.Log = slog.New(slog.DiscardHandler)
		go func() {
			defer close(step)
			select {
			case <-time.After(after):
				cancel()
			case <-ctx.Done():
			}
		}()
		c, err := New(ctx, config)
		cancel()
		<-step
		if err == nil {
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
		}
		noTrace(t, config)
	}
	if diff := cmp.Diff(before, host(t)); diff != "" {
		t.Errorf("the host before and after (-before +after):\n%s", diff)
	}
}

// TestDetach finds a cluster again.
func TestDetach(t *testing.T) {
	config := testConfig(t, "kept")
	config.Nodes = -1
	c, err := New(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Down(context.Background(), config) })
	if _, err := Open(t.Context(), config); err == nil {
		t.Error("a cluster that is not detached was opened")
	}
	if err := c.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	again, err := Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	c.lifeline.close()
	status, err := again.Status(t.Context())
	if err != nil || len(status) != 1 || !status[0].Running {
		t.Errorf("status %+v, %v", status, err)
	}
	if _, err := again.AddNode(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	noTrace(t, config)
}

func loadBusybox(t *testing.T, c *Cluster) {
	t.Helper()
	image, err := Busybox()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "busybox.tar")
	if err := WriteImage(path, "connected-registry.test/busybox:1", image); err != nil {
		t.Fatal(err)
	}
	if err := c.LoadImage(t.Context(), path); err != nil {
		t.Fatal(err)
	}
}

func apply(t *testing.T, c *Cluster, file string) {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := c.Apply(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

func kubectl(t *testing.T, c *Cluster, args ...string) string {
	t.Helper()
	out, err := c.Kubectl(t.Context(), args...)
	if err != nil {
		pods, _ := c.Kubectl(t.Context(), "describe", "pods")
		t.Fatalf("%v\n%s", err, pods)
	}
	return string(out)
}

// pod returns the tools pod of a node.
func pod(t *testing.T, c *Cluster, n *Node) string {
	t.Helper()
	return kubectl(t, c, "get", "pods", "-l", "app=tools", "--field-selector=spec.nodeName="+n.Name(),
		"-o", "jsonpath={.items[0].metadata.name}")
}

func readNode(t *testing.T, n *Node, path string) string {
	t.Helper()
	root, err := os.OpenRoot(n.Root())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	data, err := root.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func is(got string, err error, want string) error {
	if err == nil && got != want {
		err = fmt.Errorf("got %q, want %q", got, want)
	}
	return err
}

// eventually repeats check until it succeeds.
func eventually(t *testing.T, check func() error) {
	t.Helper()
	deadline := time.Now().Add(90 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func get(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return "", err
	}
	req.Close = true // each request may meet another pod
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return string(data), err
}

func serve(t *testing.T, addr, answer string) string {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, answer) })}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
	return "http://" + l.Addr().String()
}

// host is what a cluster could change of the host.
func host(t *testing.T) map[string]string {
	t.Helper()
	got := map[string]string{}
	for _, cmd := range [][]string{
		{"ip", "-brief", "link"}, {"ip", "route"}, {"ip", "rule"},
		{"iptables-save"}, {"sysctl", "net.ipv4.ip_forward", "net.ipv4.conf.all.route_localnet"},
	} {
		out, err := exec.Command(cmd[0], cmd[1:]...).Output()
		if err != nil {
			t.Fatal(err)
		}
		lines := slices.DeleteFunc(strings.Split(string(out), "\n"), func(s string) bool { return strings.HasPrefix(s, "#") })
		got[strings.Join(cmd, " ")] = strings.Join(lines, "\n")
	}
	for _, key := range tunables() {
		data, err := os.ReadFile(filepath.Join("/proc/sys", key))
		if err != nil {
			t.Fatal(err)
		}
		got[key] = string(data)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	got["mounts"] = string(mounts)
	return got
}

// processes fails while a process of the cluster lives, by the paths that all
// of them have in their arguments or their mounts.
func processes(t *testing.T, config Config) error {
	t.Helper()
	config, err := config.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	dir := store{config.Dir}.cluster(config.Name)
	for _, p := range dirs {
		for _, file := range []string{"cmdline", "mountinfo"} {
			data, err := os.ReadFile(filepath.Join(p, file))
			if err == nil && strings.Contains(string(data), dir) {
				return fmt.Errorf("%s is left: its %s names %s", p, file, dir)
			}
		}
	}
	return nil
}

// noTrace checks that nothing of the cluster is left.
func noTrace(t *testing.T, config Config) {
	t.Helper()
	if err := processes(t, config); err != nil {
		t.Error(err)
	}
	config, err := config.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(store{config.Dir}.cluster(config.Name)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory of the cluster is left: %v", err)
	}
	all, err := mounted()
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range all {
		if _, err := os.Stat(filepath.Join(h.mount, cgroupOf(config.Name))); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a control group is left in %s: %v", h.mount, err)
		}
	}
}
