package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/pprof"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/connected-registry/connected-registry/agent/daemon"
)

const (
	agentNamespace = "bench"
	registryHost   = "10.255.255.1:443"
	// restTime is how long nothing happens while requests are counted.
	restTime = 20 * time.Second
	// memory is a file system in memory, so that one disk does not stand for
	// those of all nodes.
	memory = "/dev/shm"
	// instances is how many directories a user may watch at once, of which each
	// agent has some; on a node of its own an agent comes by with the default.
	instances = "/proc/sys/fs/inotify/max_user_instances"
)

const configuration = `apiVersion: connectedregistry.io/v1alpha1
kind: NodeConfiguration
registry: 127.0.0.1:1
names: ["` + registryHost + `"]
caSecrets:
- name: ` + daemon.ControlSecret + `
`

// manyAgents runs the whole agents, with node roots of their own.
func manyAgents(ctx context.Context, o options, config *rest.Config, kube kubernetes.Interface) (r result, err error) {
	restore, err := allowInstances(8 * o.agents)
	if err != nil {
		return r, err
	}
	defer restore()
	dir, err := os.MkdirTemp(memory, "trustbench-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "node.yaml")
	if err := os.WriteFile(file, []byte(configuration), 0o600); err != nil {
		return r, err
	}
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: agentNamespace}}
	if _, err := kube.CoreV1().Namespaces().Create(ctx, namespace, metav1.CreateOptions{}); err != nil {
		return r, err
	}
	group, running := errgroup.WithContext(ctx)
	running, stop := context.WithCancel(running)
	defer func() {
		stop()
		err = errors.Join(err, group.Wait())
	}()
	var files []string
	for i := range o.agents {
		name := fmt.Sprintf("bench-%04d", i)
		root := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Join(root, "etc", "containerd", "certs.d"), 0o755); err != nil {
			return r, err
		}
		d, err := daemon.New(daemon.Config{File: file, API: own(config), Namespace: agentNamespace, Node: name, Pod: name, NodeRoot: root})
		if err != nil {
			return r, err
		}
		group.Go(func() error { return d.Run(running) })
		files = append(files, filepath.Join(root, "etc", "containerd", "certs.d", registryHost, "ca.crt"))
	}
	if _, err := change(running, kube, agentNamespace, daemon.ControlSecret, files); err != nil {
		return r, err
	}
	stopProfile, err := startProfile(o.profile)
	if err != nil {
		return r, err
	}
	defer stopProfile()
	if r.took, err = measure(running, kube, agentNamespace, daemon.ControlSecret, files, o.agentChanges); err != nil {
		return r, err
	}
	end, err := r.rest(running, kube)
	if err != nil {
		return r, err
	}
	stop()
	if err := group.Wait(); err != nil {
		return r, err
	}
	time.Sleep(calm) // for the API server to notice
	without, err := load(ctx, kube)
	r.watches = end.watching - without.watching
	return r, err
}

// rest counts what agents ask for while nothing changes, and returns the last
// count.
func (r *result) rest(ctx context.Context, kube kubernetes.Interface) (requests, error) {
	time.Sleep(5 * time.Second) // for the last Leases
	begin, err := load(ctx, kube)
	if err != nil {
		return begin, err
	}
	time.Sleep(restTime)
	end, err := load(ctx, kube)
	r.asked = end.asked - begin.asked
	return end, err
}

// requests are those for Secrets, as the API server counts them.
type requests struct {
	watching int // watches under way
	asked    int // GETs and LISTs so far
}

func load(ctx context.Context, kube kubernetes.Interface) (requests, error) {
	var n requests
	data, err := kube.Discovery().RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	if err != nil {
		return n, fmt.Errorf("reading the API server's metrics: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), "} ")
		if !ok || !strings.Contains(name, `resource="secrets"`) {
			continue
		}
		count, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return n, fmt.Errorf("the API server's metrics: %w", err)
		}
		switch {
		case strings.HasPrefix(name, "apiserver_longrunning_requests{") && strings.Contains(name, `verb="WATCH"`):
			n.watching += int(count)
		case strings.HasPrefix(name, "apiserver_request_total{") && (strings.Contains(name, `verb="GET"`) || strings.Contains(name, `verb="LIST"`)):
			n.asked += int(count)
		}
	}
	return n, nil
}

// allowInstances raises the limit and returns what puts it back.
func allowInstances(n int) (restore func(), err error) {
	data, err := os.ReadFile(instances)
	if err != nil {
		return nil, err
	}
	if have, err := strconv.Atoi(strings.TrimSpace(string(data))); err == nil && have >= n {
		return func() {}, nil
	}
	if err := os.WriteFile(instances, []byte(strconv.Itoa(n)), 0); err != nil {
		return nil, err
	}
	return func() { _ = os.WriteFile(instances, data, 0) }, nil
}

func startProfile(file string) (stop func(), err error) {
	if file == "" {
		return func() {}, nil
	}
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() {
		pprof.StopCPUProfile()
		_ = f.Close()
	}, nil
}
