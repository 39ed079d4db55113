package v1alpha1

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/api/resource"
)

func TestLoadNodeConfiguration(t *testing.T) {
	got, err := LoadNodeConfiguration("node.yaml", []byte(`
apiVersion: connectedregistry.io/v1alpha1
kind: NodeConfiguration
registry: 10.96.0.50:443
endpoints: ["10.244.1.7:8443"]
names: [10.96.0.50, "[fd00::1]:5000", edge.example.com]
push: true
caSecrets:
- name: connected-registry-ca
systemTrust: true
mirrors:
- registry: docker.io
  fallback: false
  server: https://registry-1.docker.io
nodeCache: {maxSize: 20Gi, peers: true}
peers: [{node: edge-1, address: "192.0.2.1:5051"}]
prefetch:
- images: [docker.io/library/nginx:1, docker.io/library/redis:7]
- {images: [docker.io/team/app:1, docker.io/library/nginx:1], nodes: [edge-1, edge-2]}
- {images: [docker.io/team/other:1], except: [edge-2]}
`))
	if err != nil {
		t.Fatal(err)
	}
	size := resource.MustParse("20Gi")
	want := &NodeConfiguration{
		APIVersion:  APIVersion,
		Kind:        NodeConfigurationKind,
		Registry:    "10.96.0.50:443",
		Endpoints:   []string{"10.244.1.7:8443"},
		Names:       []string{"10.96.0.50", "[fd00::1]:5000", "edge.example.com"},
		Push:        true,
		CASecrets:   []CASecret{{Name: "connected-registry-ca"}},
		SystemTrust: true,
		Mirrors: []NodeMirror{{
			Mirror: Mirror{Registry: "docker.io", ResolveTags: new(true), Fallback: new(false)},
			Server: "https://registry-1.docker.io",
		}},
		NodeCache: NodeCache{MaxSize: &size, Peers: true},
		Peers:     []Peer{{Node: "edge-1", Address: "192.0.2.1:5051"}},
		Prefetch: []NodePrefetch{
			{Images: []string{"docker.io/library/nginx:1", "docker.io/library/redis:7"}},
			{Images: []string{"docker.io/team/app:1", "docker.io/library/nginx:1"}, Nodes: []string{"edge-1", "edge-2"}},
			{Images: []string{"docker.io/team/other:1"}, Except: []string{"edge-2"}},
		},
		LogLevel: LogLevelInformation,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for node, images := range map[string][]string{
		"edge-2": {"docker.io/library/nginx:1", "docker.io/library/redis:7", "docker.io/team/app:1"},
		"edge-3": {"docker.io/library/nginx:1", "docker.io/library/redis:7", "docker.io/team/other:1"},
	} {
		if diff := cmp.Diff(images, got.PrefetchFor(node)); diff != "" {
			t.Errorf("%s: -want +got:\n%s", node, diff)
		}
	}
}

func TestLoadNodeConfigurationProblems(t *testing.T) {
	const head = "apiVersion: connectedregistry.io/v1alpha1\nkind: NodeConfiguration\n"
	for name, test := range map[string]struct{ doc, want string }{
		"another kind": {"apiVersion: connectedregistry.io/v1alpha1\nkind: ConnectedRegistry\n", "f:2: kind: must be NodeConfiguration"},
		"empty":        {"", `f:1: is empty: write a NodeConfiguration, beginning with "apiVersion: connectedregistry.io/v1alpha1"`},
		"nothing": {head, "f:1: registry: is required: say where the registry is reached, for example \"10.96.0.50:443\"\n" +
			"f:1: names: is required: give the registry's names as they stand in image references"},
		"host": {head + "registry: a\nnames: [../etc]\n", "f:4: names[0]: is more than a host: leave out the scheme, the path and credentials"},
		"peer": {head + "registry: a\nnames: [a]\npeers: [{node: A_, address: 'b:70000'}]\n", "f:5: peers[0].node: \"A_\" is not the name of a node\n" +
			"f:5: peers[0].address: \"b:70000\" is not a host with or without a port: use for example \"registry.example.com:5000\""},
		"nodes and others": {head + "registry: a\nnames: [a]\nprefetch: [{images: [a/b], nodes: [c], except: [d]}]\n", "f:5: prefetch[0].except: \"d\" is given besides nodes: say which nodes there are, or which there are not"},
		"prefetch":         {head + "registry: a\nnames: [a]\nprefetch: [{images: []}]\n", "f:5: prefetch[0].images: is required: name the images to bring"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := LoadNodeConfiguration("f", []byte(test.doc))
			if err == nil {
				t.Fatal("no error")
			}
			if diff := cmp.Diff(test.want, err.Error()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}
