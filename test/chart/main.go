// Command chart keeps what follows from the Helm chart in step with it: the
// chart's dependency, the schema of its values, and the plain manifests. Its
// tests render the chart. The helm it runs is the real one, built from the
// module that test/cluster pins.
//
//	chart deps       packages cert-manager's chart, from its Go module
//	chart manifests  writes the values' schema, the chart's copy of the
//	                 resource's definition, and the manifests
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v4"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "chart:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		return err
	}
	switch strings.Join(args, " ") {
	case "deps":
		return deps(ctx, root)
	case "manifests":
		return manifests(ctx, root)
	}
	return errors.New("usage: chart deps | manifests")
}

const (
	chartDir = "charts/connected-registry"
	crdFile  = "connectedregistry.io_connectedregistries.yaml"
)

// helm runs helm and returns what it wrote.
func helm(ctx context.Context, root string, args ...string) ([]byte, error) {
	program, err := output(ctx, root, "go", "tool", "-modfile=test/cluster/tools/helm/go.mod", "-n", "helm")
	if err != nil {
		return nil, err
	}
	return output(ctx, root, strings.TrimSpace(string(program)), args...)
}

func output(ctx context.Context, dir, program string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w\n%s", filepath.Base(program), strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}

// deps packages cert-manager's chart where helm looks for it.
func deps(ctx context.Context, root string) error {
	const module = "github.com/cert-manager/cert-manager"
	addons := filepath.Join(root, "test", "cluster", "tools", "addons")
	if _, err := output(ctx, addons, "go", "mod", "download", module); err != nil {
		return err
	}
	out, err := output(ctx, addons, "go", "list", "-m", "-f", "{{.Dir}} {{.Version}}", module)
	if err != nil {
		return err
	}
	source, version, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	wanted, err := dependency(root)
	if err != nil {
		return err
	}
	if wanted != version {
		return fmt.Errorf("%s/Chart.yaml depends on cert-manager %s, and test/cluster/tools/addons/go.mod requires %s: make them equal", chartDir, wanted, version)
	}
	charts := filepath.Join(root, chartDir, "charts")
	archive := filepath.Join(charts, "cert-manager-"+version+".tgz")
	if _, err := os.Stat(archive); err == nil {
		return nil
	}
	if err := os.RemoveAll(charts); err != nil {
		return err
	}
	// The module's chart carries no version; a release is given one like this.
	_, err = helm(ctx, root, "package", filepath.Join(source, "deploy", "charts", "cert-manager"),
		"--version", version, "--app-version", version, "--destination", charts)
	return err
}

// dependency returns the version of cert-manager that the chart depends on.
func dependency(root string) (string, error) {
	data, err := os.ReadFile(filepath.Join(root, chartDir, "Chart.yaml"))
	if err != nil {
		return "", err
	}
	var chart struct {
		Dependencies []struct{ Name, Version string }
	}
	if err := yaml.Unmarshal(data, &chart); err != nil {
		return "", err
	}
	for _, d := range chart.Dependencies {
		if d.Name == "cert-manager" {
			return d.Version, nil
		}
	}
	return "", fmt.Errorf("%s/Chart.yaml does not depend on cert-manager", chartDir)
}

// manifests writes every file that follows from the chart and from the
// resource's definition.
func manifests(ctx context.Context, root string) error {
	crd, err := os.ReadFile(filepath.Join(root, "manifests", crdFile))
	if err != nil {
		return err
	}
	base, err := os.ReadFile(filepath.Join(root, "test", "chart", "values.schema.yaml"))
	if err != nil {
		return err
	}
	schema, err := valuesSchema(base, crd)
	if err != nil {
		return err
	}
	if err := write(root, map[string][]byte{
		chartDir + "/crds/" + crdFile:    crd,
		chartDir + "/values.schema.json": schema,
	}); err != nil {
		return err
	}
	if err := deps(ctx, root); err != nil {
		return err
	}
	files, err := plain(ctx, root, crd)
	if err != nil {
		return err
	}
	return write(root, files)
}

func write(root string, files map[string][]byte) error {
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(root, name), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}
