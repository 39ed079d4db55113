package main

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
)

const (
	namespace = "connected-registry"
	// kubeVersion is what charts are rendered for without a cluster.
	kubeVersion = "1.36.0"
)

// plain renders the manifests. The resource itself is a file of its own, since
// kubectl cannot apply it together with its definition; so is what only those
// need who prefetch the images of workloads.
func plain(ctx context.Context, root string, crd []byte) (map[string][]byte, error) {
	rendered, err := renderPlain(ctx, root)
	if err != nil {
		return nil, err
	}
	more, err := renderPlain(ctx, root, "nodeCache.prefetchWorkloads=true")
	if err != nil {
		return nil, err
	}
	var install, registry, uninstall, prefetch bytes.Buffer
	fmt.Fprintf(&install, "%s# Everything but the ConnectedRegistry; see connectedregistry.yaml.\n", header)
	fmt.Fprintf(&install, "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: %s\n", namespace)
	fmt.Fprintf(&install, "---\n%s", bytes.TrimPrefix(crd, []byte("---\n")))
	fmt.Fprintf(&registry, "%s# What to keep where; see kubectl explain connectedregistry.spec.\n", header)
	fmt.Fprintf(&uninstall, "%s# Puts every node back as it was. Apply it, wait for its Job, then delete\n# install.yaml.\n", header)
	fmt.Fprintf(&prefetch, "%s# The right that spec.nodeCache.prefetchWorkloads needs besides install.yaml: to\n# list workloads in all namespaces.\n", header)
	for _, doc := range rendered {
		to := &install
		switch {
		case isRegistry(doc):
			to = &registry
		case strings.Contains(doc, "helm.sh/hook: pre-delete"):
			to = &uninstall
		}
		fmt.Fprintf(to, "---\n%s", withoutHooks(doc))
	}
	for _, doc := range more {
		if !isRegistry(doc) && !slices.Contains(rendered, doc) {
			fmt.Fprintf(&prefetch, "---\n%s", doc)
		}
	}
	return map[string][]byte{
		"manifests/install.yaml":            install.Bytes(),
		"manifests/connectedregistry.yaml":  registry.Bytes(),
		"manifests/uninstall.yaml":          uninstall.Bytes(),
		"manifests/prefetch-workloads.yaml": prefetch.Bytes(),
	}, nil
}

// renderPlain renders the chart with the built-in CA, and --set for each of sets.
func renderPlain(ctx context.Context, root string, sets ...string) ([]string, error) {
	sets = append(sets, "cert-manager.enabled=false", "cert-manager.install=false")
	rendered, err := helm(ctx, root, "template", "connected-registry", chartDir, "--namespace="+namespace, "--skip-tests", "--kube-version="+kubeVersion,
		"--set="+strings.Join(sets, ","))
	return documents(rendered), err
}

func isRegistry(doc string) bool { return strings.Contains(doc, "\nkind: ConnectedRegistry\n") }

const header = "# Made from charts/connected-registry by make manifests.\n"

// documents splits what helm wrote, without its comments and empty documents.
func documents(rendered []byte) []string {
	var all []string
	for doc := range strings.SplitSeq(string(rendered), "\n---\n") {
		var lines []string
		for line := range strings.Lines(strings.TrimPrefix(doc, "---\n")) {
			if !strings.HasPrefix(line, "# Source: ") && strings.TrimSpace(line) != "" {
				lines = append(lines, strings.TrimSuffix(line, "\n")+"\n")
			}
		}
		if text := strings.Join(lines, ""); strings.Contains(text, "kind: ") {
			all = append(all, text)
		}
	}
	return all
}

// withoutHooks drops what means something to helm alone: the annotations of
// hooks, which have no others.
func withoutHooks(doc string) string {
	if !strings.Contains(doc, "helm.sh/hook:") {
		return doc
	}
	var b strings.Builder
	for line := range strings.Lines(doc) {
		if !strings.Contains(line, "helm.sh/hook") && line != "  annotations:\n" {
			b.WriteString(line)
		}
	}
	return b.String()
}
