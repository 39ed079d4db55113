package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// CertManagerChart writes cert-manager's own chart as an archive into dir and
// returns its path. The chart's images are those of LoadCertManager.
func (c *Cluster) CertManagerChart(ctx context.Context, dir string) (string, error) {
	source, version, err := certManagerModule(ctx)
	if err != nil {
		return "", err
	}
	// The module's chart carries no version; a release is given one like this.
	_, err = c.Helm(ctx, "package", filepath.Join(source, "deploy", "charts", "cert-manager"),
		"--version", version, "--app-version", version, "--destination", dir)
	return filepath.Join(dir, "cert-manager-"+version+".tgz"), err
}

// LoadCertManager loads the images that cert-manager's chart asks for into
// every node, under the names of the originals.
func (c *Cluster) LoadCertManager(ctx context.Context) error {
	_, version, err := certManagerModule(ctx)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "cert-manager-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, role := range []string{"controller", "webhook", "cainjector", "startupapicheck"} {
		image, err := Image(map[string]string{"cert-manager": c.programs.path("addons", "cert-manager")}, nil, "/cert-manager", role)
		if err != nil {
			return err
		}
		// The chart insists on a user other than root and leaves it to the
		// image which.
		if image, err = withUser(image, "1000"); err != nil {
			return err
		}
		path := filepath.Join(dir, role+".tar")
		if err := WriteImage(path, "quay.io/jetstack/cert-manager-"+role+":"+version, image); err != nil {
			return err
		}
		if err := c.LoadImage(ctx, path); err != nil {
			return err
		}
	}
	return nil
}

// certManagerModule returns the directory and version of the module that the
// add-ons are built from.
func certManagerModule(ctx context.Context) (dir, version string, err error) {
	source, err := moduleDir(ctx)
	if err != nil {
		return "", "", err
	}
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}} {{.Version}}", "github.com/cert-manager/cert-manager")
	cmd.Dir = filepath.Join(source, "tools", "addons")
	cmd.Env = append(os.Environ(), "GOWORK=off")
	out, err := output(cmd)
	if err != nil {
		return "", "", fmt.Errorf("finding cert-manager's module: %w", err)
	}
	dir, version, _ = strings.Cut(strings.TrimSpace(string(out)), " ")
	return dir, version, nil
}
