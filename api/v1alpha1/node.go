package v1alpha1

import (
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// NodeConfigurationKind is the kind of a NodeConfiguration.
const NodeConfigurationKind = "NodeConfiguration"

// NodeConfiguration is what the agent of a node is told. The syncer renders it
// from the ConnectedRegistry; a node that joins no cluster yet is given one in a
// file. It names Secrets and holds none.
type NodeConfiguration struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`

	// Registry is where the central registry is reached, host:port. Required.
	Registry string `json:"registry"`
	// PlainHTTP speaks HTTP to Registry.
	PlainHTTP bool `json:"plainHTTP,omitempty"`
	// Endpoints are the replicas behind Registry, each host:port. Empty: nodes
	// go through Registry alone.
	Endpoints []string `json:"endpoints,omitempty"`
	// Names are the hosts[:port] by which image references name the registry:
	// its cluster IP, its login server, its service's DNS names. Required.
	Names []string `json:"names"`
	// Push says that the registry takes pushes.
	Push bool `json:"push,omitempty"`
	// CASecrets are the Secrets whose certificates are trusted, in the agent's
	// namespace. Empty hosts: Names.
	CASecrets []CASecret `json:"caSecrets,omitempty"`
	// SystemTrust also puts the certificates of the registry's own names into
	// the node's trust store.
	SystemTrust bool `json:"systemTrust,omitempty"`
	// Mirrors are the registries whose pulls are brought here first.
	Mirrors []NodeMirror `json:"mirrors,omitempty"`
	// NodeCache bounds the cache.
	NodeCache NodeCache `json:"nodeCache,omitempty"`
	// Peers are the caches of all nodes, this one's included. Empty: nodes do
	// not ask one another.
	Peers []Peer `json:"peers,omitempty"`
	// Prefetch brings images to the caches of nodes before they are needed. It
	// stands for that of Mirrors, which is empty here, and for
	// NodeCache.PrefetchWorkloads, which is false.
	Prefetch []NodePrefetch `json:"prefetch,omitempty"`
	// ConfigureRuntime lets the agent change the container runtime's
	// configuration and restart it.
	ConfigureRuntime bool `json:"configureRuntime,omitempty"`
	// LogLevel is the least severe level that is logged. Default Information.
	LogLevel LogLevel `json:"logLevel,omitempty"`
}

// NodeMirror is a mirror with what a node needs to know of the registry behind
// it.
type NodeMirror struct {
	Mirror `json:",inline"`
	// Server is the URL of the registry itself, for what is not here. Empty:
	// as containerd derives it from the name.
	Server string `json:"server,omitempty"`
	// CA holds certificates in PEM that the registry itself is trusted by,
	// besides the system's.
	CA string `json:"ca,omitempty"`
}

// Peer is the cache of one node.
type Peer struct {
	// Node is the node's name. Required.
	Node string `json:"node"`
	// Address is where other nodes reach its cache, host:port. Required.
	Address string `json:"address"`
}

// NodePrefetch names images for nodes.
type NodePrefetch struct {
	// Images are references with the registry. Required.
	Images []string `json:"images"`
	// Nodes are the names of the nodes, sorted. Empty: every node but Except.
	Nodes []string `json:"nodes,omitempty"`
	// Except are the names of the nodes that are left out, sorted. Empty with
	// Nodes.
	Except []string `json:"except,omitempty"`
}

// AnnotationPeerAddress is on the Lease of a node's agent while other nodes may
// ask its cache: where they reach it, IP:port.
const AnnotationPeerAddress = Group + "/peer-address"

// LabelPrefetch is "true" on the workloads of NodeCache.PrefetchWorkloads. It is a
// label since the API server chooses objects by labels: the syncer is sent no
// other workload.
const LabelPrefetch = Group + "/prefetch"

// AnnotationPrefetch names further images of such a workload, as a pod names
// them, with commas between.
const AnnotationPrefetch = Group + "/prefetch-images"

// PrefetchFor returns the images that are to be brought to a node, each once.
func (c *NodeConfiguration) PrefetchFor(node string) []string {
	var images []string
	for _, p := range c.Prefetch {
		if len(p.Nodes) > 0 && !slices.Contains(p.Nodes, node) || slices.Contains(p.Except, node) {
			continue
		}
		for _, image := range p.Images {
			if !slices.Contains(images, image) {
				images = append(images, image)
			}
		}
	}
	return images
}

// SetDefaults writes the defaults into the fields that say nothing.
func (c *NodeConfiguration) SetDefaults() {
	setDefault(&c.LogLevel, LogLevelInformation)
	for i := range c.Mirrors {
		c.Mirrors[i].setDefaults()
	}
}

// Validate reports everything that is wrong with a configuration whose defaults
// are set, as ConnectedRegistry.Validate does.
func (c *NodeConfiguration) Validate() field.ErrorList {
	var errs field.ErrorList
	if c.Registry == "" {
		errs = append(errs, required(field.NewPath("registry"), `say where the registry is reached, for example "10.96.0.50:443"`))
	} else {
		errs = append(errs, validHost(field.NewPath("registry"), c.Registry)...)
	}
	if len(c.Names) == 0 {
		errs = append(errs, required(field.NewPath("names"), "give the registry's names as they stand in image references"))
	}
	for p, hosts := range map[string][]string{"names": c.Names, "endpoints": c.Endpoints} {
		for i, host := range hosts {
			errs = append(errs, validHost(field.NewPath(p).Index(i), host)...)
		}
	}
	errs = append(errs, validCASecrets(field.NewPath("caSecrets"), c.CASecrets)...)
	mirrors := make([]Mirror, len(c.Mirrors))
	for i := range c.Mirrors {
		mirrors[i] = c.Mirrors[i].Mirror
	}
	errs = append(errs, validMirrors(field.NewPath("mirrors"), mirrors)...)
	errs = append(errs, c.NodeCache.validate(field.NewPath("nodeCache"))...)
	for i, peer := range c.Peers {
		p := field.NewPath("peers").Index(i)
		if len(validation.IsDNS1123Subdomain(peer.Node)) > 0 {
			errs = append(errs, invalid(p.Child("node"), peer.Node, "is not the name of a node"))
		}
		errs = append(errs, validHost(p.Child("address"), peer.Address)...)
	}
	for i, f := range c.Prefetch {
		p := field.NewPath("prefetch").Index(i)
		if len(f.Images) == 0 {
			errs = append(errs, required(p.Child("images"), "name the images to bring"))
		}
		if len(f.Nodes) > 0 && len(f.Except) > 0 {
			errs = append(errs, invalid(p.Child("except"), strings.Join(f.Except, ","), "is given besides nodes: say which nodes there are, or which there are not"))
		}
	}
	return append(errs, oneOf(field.NewPath("logLevel"), c.LogLevel,
		LogLevelDebug, LogLevelInformation, LogLevelWarning, LogLevelError, LogLevelNone)...)
}

// LoadNodeConfiguration reads one NodeConfiguration as Load reads a
// ConnectedRegistry.
func LoadNodeConfiguration(file string, data []byte) (*NodeConfiguration, error) {
	return load[NodeConfiguration](file, NodeConfigurationKind, data)
}
