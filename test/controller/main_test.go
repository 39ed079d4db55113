package controller_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/connected-registry/connected-registry/test/cluster"
)

// patience is how long anything is waited for: other work may share the
// processors.
const patience = 3 * time.Minute

var (
	program    string // the executable
	kubeConfig *rest.Config
	kube       kubernetes.Interface
	objects    dynamic.Interface
	kubectl    func(ctx context.Context, args ...string) ([]byte, error) // as administrator
)

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "controller-test-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "connected-registry")
	build := exec.Command("go", "build", "-o", program, "./cmd/connected-registry")
	build.Dir = filepath.Join("..", "..")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("building the program: %w\n%s", err, out)
	}
	ctx := context.Background()
	c, err := cluster.New(ctx, cluster.Config{Name: "controller", Nodes: -1})
	if err != nil {
		return 0, err
	}
	defer func() {
		if closing := c.Close(); err == nil {
			err = closing
		}
	}()
	kubectl = c.Kubectl
	crd, err := os.Open("../../manifests/connectedregistry.io_connectedregistries.yaml")
	if err != nil {
		return 0, err
	}
	defer crd.Close()
	if err := c.Apply(ctx, crd); err != nil {
		return 0, fmt.Errorf("the definition of the resource: %w", err)
	}
	if _, err := c.Kubectl(ctx, "wait", "--for=condition=Established", "--timeout=60s", "crd/connectedregistries.connectedregistry.io"); err != nil {
		return 0, err
	}
	if kubeConfig, err = clientcmd.BuildConfigFromFlags("", c.Kubeconfig()); err != nil {
		return 0, err
	}
	if kube, err = kubernetes.NewForConfig(kubeConfig); err != nil {
		return 0, err
	}
	if objects, err = dynamic.NewForConfig(kubeConfig); err != nil {
		return 0, err
	}
	return m.Run(), nil
}
