// Package e2e installs the product on a real cluster as its users do, by helm,
// and tests it there: kubelets pull, replicas are killed, nodes come and go.
//
// The image is built without a container engine and loaded into the nodes; the
// chart is the one in charts. Nothing else of the product is imported.
package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/connected-registry/connected-registry/test/cluster"
)

const (
	// Namespace is where the product is installed, Release the name that helm
	// knows it by.
	Namespace = "connected-registry"
	Release   = "edge"
	// image is the one that the chart names by default, NextTag another tag of
	// the same.
	image   = "ghcr.io/connected-registry/connected-registry"
	tag     = "0.1.0"
	NextTag = "0.1.0-next"
)

// Product is the product on a cluster.
type Product struct {
	Cluster *cluster.Cluster
	// Chart is the chart's directory.
	Chart string
}

// Load builds the product from its sources and loads its image into every node
// of c, also into those that are added later.
func Load(ctx context.Context, c *cluster.Cluster) (*Product, error) {
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "product-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, "connected-registry")
	if err := goRun(ctx, root, "build", "-trimpath", "-ldflags=-s -w -X main.version=e2e", "-o", binary, "./cmd/connected-registry"); err != nil {
		return nil, err
	}
	for _, t := range []string{tag, NextTag} {
		archive := filepath.Join(dir, t+".tar")
		if err := goRun(ctx, root, "run", "./test/image", "-binary", binary, "-o", archive, "-name", image+":"+t); err != nil {
			return nil, err
		}
		if err := c.LoadImage(ctx, archive); err != nil {
			return nil, err
		}
	}
	if err := goRun(ctx, filepath.Join(root, "test", "chart"), "run", ".", "deps"); err != nil {
		return nil, err
	}
	return &Product{Cluster: c, Chart: filepath.Join(root, "charts", "connected-registry")}, nil
}

func goRun(ctx context.Context, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out.Bytes())
	}
	return nil
}

// Install installs the chart with values in YAML, each over the ones before,
// and waits until everything is ready.
func (p *Product) Install(ctx context.Context, values ...string) error {
	return p.helm(ctx, values, "install", "--create-namespace")
}

// Upgrade changes an installation to values and waits until all of it has
// followed.
func (p *Product) Upgrade(ctx context.Context, values ...string) error {
	return p.helm(ctx, values, "upgrade")
}

func (p *Product) helm(ctx context.Context, values []string, command string, args ...string) error {
	dir, err := os.MkdirTemp("", "values-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	args = append([]string{command, Release, p.Chart, "--namespace=" + Namespace, "--wait", "--timeout=4m"}, args...)
	for i, v := range values {
		file := filepath.Join(dir, fmt.Sprint(i, ".yaml"))
		if err := os.WriteFile(file, []byte(v), 0o600); err != nil {
			return err
		}
		args = append(args, "--values="+file)
	}
	_, err = p.Cluster.Helm(ctx, args...)
	return err
}

// Uninstall removes the installation.
func (p *Product) Uninstall(ctx context.Context) error {
	_, err := p.Cluster.Helm(ctx, "uninstall", Release, "--namespace="+Namespace, "--wait", "--timeout=4m")
	return err
}
