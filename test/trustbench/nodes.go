package main

import (
	"context"
	"path/filepath"

	"k8s.io/client-go/kubernetes"

	"github.com/connected-registry/connected-registry/test/cluster"
	"github.com/connected-registry/connected-registry/test/e2e"
)

const (
	benchSecret = "bench-ca"
	benchHost   = "bench.example:5000"
)

const values = `
cert-manager: {enabled: false, install: false}
trustDistribution:
  caSecrets:
  - {name: ` + benchSecret + `, hosts: ["` + benchHost + `"]}
`

// twoNodes installs the product and changes a Secret that it was told of.
func twoNodes(ctx context.Context, o options, c *cluster.Cluster, kube kubernetes.Interface) (result, error) {
	product, err := e2e.Load(ctx, c)
	if err != nil {
		return result{}, err
	}
	if err := product.Install(ctx, values); err != nil {
		return result{}, err
	}
	var files []string
	for _, n := range c.Nodes() {
		files = append(files, filepath.Join(n.Root(), "etc", "containerd", "certs.d", benchHost, "server-ca.crt"))
	}
	// The first is not counted: its directories are still to be made.
	if _, err := change(ctx, kube, e2e.Namespace, benchSecret, files); err != nil {
		return result{}, err
	}
	took, err := measure(ctx, kube, e2e.Namespace, benchSecret, files, o.changes)
	if err != nil {
		return result{}, err
	}
	return result{took: took}, product.Uninstall(ctx)
}
