package controller_test

import (
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestDefinition asks the API server what it accepts. That it accepted the
// definition itself, with the cost of its rules, the other tests show.
func TestDefinition(t *testing.T) {
	s := newSite(t)
	for _, test := range []struct{ name, spec, refused string }{
		{"nothing", `{}`, ""},
		{"a parent", `{"parent": {"endpoint": "registry.example.com"}, "repositories": [{"name": "team/*", "tags": {"include": ["v*"], "newest": 3}}]}`, ""},
		{"a connection string", `{"parent": {"connectionStringSecretRef": {"name": "azure"}}, "repositories": [{"name": "team/app"}]}`, ""},
		{"an upstream", `{"upstreams": [{"endpoint": "ghcr.io", "prefix": "ghcr", "repositories": [{"name": "team/app"}]}]}`, ""},
		{"quantities", `{"nodeCache": {"maxSize": "20Gi"}, "sync": {"maxBandwidth": "2Mi"}}`, ""},
		{"a Secret's certificate", `{"tls": {"source": "Secret", "secretName": "mine"}}`, ""},
		{"plain HTTP", `{"tls": {"disabled": true}, "trustDistribution": {"disabled": true}}`, ""},

		{"no parent", `{"repositories": [{"name": "team/app"}]}`, "name the registry that the repositories come from"},
		{"parent without an address", `{"parent": {"caSecretRef": {"name": "ca"}}}`, "name the parent in endpoint"},
		{"two addresses", `{"parent": {"endpoint": "registry.example.com", "connectionStringSecretRef": {"name": "azure"}}}`, "and not in both"},
		{"two credentials", `{"parent": {"endpoint": "registry.example.com", "credentialsSecretRef": {"name": "a"}, "azureIdentity": {}}}`, "exclude one another"},
		{"an upstream without an address", `{"upstreams": [{"repositories": [{"name": "team/app"}]}]}`, "name the parent in endpoint"},
		{"removals beside pushes", `{"mode": "ReadWrite", "sync": {"deletePropagation": true}}`, "cannot stand beside mode ReadWrite"},
		{"nothing to trust", `{"tls": {"disabled": true}}`, "set trustDistribution.disabled as well"},
		{"source without a Secret", `{"tls": {"source": "Secret"}}`, "secretName belongs to source Secret"},
		{"Secret without a source", `{"tls": {"secretName": "mine"}}`, "secretName belongs to source Secret"},
		{"mode", `{"mode": "WriteOnly"}`, "spec.mode: Unsupported value"},
		{"action", `{"clientTokens": [{"name": "ci", "secretRef": {"name": "ci"}, "scopeMap": [{"repositories": ["**"], "actions": ["content/eat"]}]}]}`, "actions[0]: Unsupported value"},
		{"concurrency", `{"sync": {"concurrency": 65}}`, "spec.sync.concurrency"},
		{"the same token twice", `{"clientTokens": [{"name": "ci", "secretRef": {"name": "a"}, "scopeMap": []}, {"name": "ci", "secretRef": {"name": "b"}, "scopeMap": []}]}`, "Duplicate value"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := s.resource().Create(t.Context(), s.object(test.spec), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			switch {
			case test.refused == "" && err != nil:
				t.Errorf("refused: %v", err)
			case test.refused != "" && (err == nil || !strings.Contains(err.Error(), test.refused)):
				t.Errorf("error %v, expected one with %q", err, test.refused)
			}
		})
	}
}
