package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// Group is the API group of the resource.
	Group = "connectedregistry.io"
	// Version is the API version that this package describes.
	Version = "v1alpha1"
	// Kind is the kind of the resource.
	Kind = "ConnectedRegistry"
	// APIVersion is what a document's apiVersion must say.
	APIVersion = Group + "/" + Version
)

// ConnectedRegistry is a registry that keeps selected content of a parent
// registry close to the nodes that run it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=connectedregistries,singular=connectedregistry,scope=Namespaced
// +kubebuilder:printcolumn:name=Mode,type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Connection state",type=string,JSONPath=`.status.connectionState`
// +kubebuilder:printcolumn:name=Parent,type=string,JSONPath=`.status.parent.endpoint`
// +kubebuilder:printcolumn:name="Login server",type=string,JSONPath=`.status.loginServer.host`
// +kubebuilder:printcolumn:name="Last sync (UTC)",type=date,JSONPath=`.status.lastSyncTime`
type ConnectedRegistry struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// Spec is what the operator asks for.
	Spec Spec `json:"spec,omitempty"`
	// Status is what is there. It is written by the program; in a file it is
	// checked and otherwise of no effect, as with kubectl apply.
	Status Status `json:"status,omitempty"`
}

// Spec is what the operator asks for.
//
// +kubebuilder:validation:XValidation:rule="!has(self.repositories) || size(self.repositories) == 0 || has(self.parent)",message="name the registry that the repositories come from in parent"
// +kubebuilder:validation:XValidation:rule="!has(self.sync) || !has(self.sync.deletePropagation) || !self.sync.deletePropagation || !has(self.mode) || self.mode != 'ReadWrite'",message="sync.deletePropagation cannot stand beside mode ReadWrite, where it would remove what clients push"
// +kubebuilder:validation:XValidation:rule="!has(self.tls) || !has(self.tls.disabled) || !self.tls.disabled || has(self.trustDistribution) && has(self.trustDistribution.disabled) && self.trustDistribution.disabled",message="tls.disabled leaves nothing to trust: set trustDistribution.disabled as well"
type Spec struct {
	// Mode says whether clients may push. Default ReadOnly.
	Mode Mode `json:"mode,omitempty"`
	// LoginServer is the host, with a port unless it is 443, by which clients
	// reach this registry. Empty: the address it listens on.
	LoginServer string `json:"loginServer,omitempty"`
	// Parent is where the content comes from. Without one nothing is
	// synchronised.
	Parent *Parent `json:"parent,omitempty"`
	// Repositories is the content of the parent to keep here. Empty: none.
	Repositories []Repository `json:"repositories,omitempty"`
	// Upstreams are further registries whose content is kept here, beside the
	// parent's.
	//
	// +kubebuilder:validation:MaxItems=64
	Upstreams []Upstream `json:"upstreams,omitempty"`
	// Sync says when and how the content is brought here.
	Sync Sync `json:"sync,omitempty"`
	// AnonymousPull lets clients read without credentials.
	AnonymousPull bool `json:"anonymousPull,omitempty"`
	// ClientTokens are the credentials of this registry's clients.
	//
	// +listType=map
	// +listMapKey=name
	ClientTokens []ClientToken `json:"clientTokens,omitempty"`
	// Mirrors are the registries whose pulls nodes bring here first.
	//
	// +listType=map
	// +listMapKey=registry
	Mirrors []Mirror `json:"mirrors,omitempty"`
	// NodeCache bounds the cache on each node.
	NodeCache NodeCache `json:"nodeCache,omitempty"`
	// TLS says where the registry's certificate comes from.
	TLS TLS `json:"tls,omitempty"`
	// TrustDistribution says what nodes are made to trust.
	TrustDistribution TrustDistribution `json:"trustDistribution,omitempty"`
	// ImmutableTags are tags that, once they exist, neither move nor go, by
	// whatever client.
	ImmutableTags []ImmutableTags `json:"immutableTags,omitempty"`
	// Quota bounds what clients may push.
	Quota Quota `json:"quota,omitempty"`
	// GarbageCollection frees the space of content that nothing refers to.
	GarbageCollection GarbageCollection `json:"garbageCollection,omitempty"`
	// Notifications tell other programs of pushes and deletions.
	Notifications []Notification `json:"notifications,omitempty"`
	// Suspend stops synchronisation in both directions; what is here stays
	// pullable.
	Suspend bool `json:"suspend,omitempty"`
	// LogLevel is the least severe level that is logged. Default Information.
	LogLevel LogLevel `json:"logLevel,omitempty"`
}

// Mode says whether clients may push.
//
// +kubebuilder:validation:Enum=ReadOnly;ReadWrite
type Mode string

const (
	// ModeReadOnly serves what was synchronised and refuses pushes.
	ModeReadOnly Mode = "ReadOnly"
	// ModeReadWrite takes pushes as well.
	ModeReadWrite Mode = "ReadWrite"
)

// LogLevel is the least severe level that is logged, in Azure's words.
//
// +kubebuilder:validation:Enum=Debug;Information;Warning;Error;None
type LogLevel string

// The levels, from the most to the least talkative.
const (
	LogLevelDebug       LogLevel = "Debug"
	LogLevelInformation LogLevel = "Information"
	LogLevelWarning     LogLevel = "Warning"
	LogLevelError       LogLevel = "Error"
	LogLevelNone        LogLevel = "None"
)

// Parent is the registry that the content comes from. At most one of
// CredentialsSecretRef, ConnectionStringSecretRef and AzureIdentity is set; with
// none of them the parent is read anonymously.
//
// +kubebuilder:validation:XValidation:rule="has(self.connectionStringSecretRef) != (has(self.endpoint) && size(self.endpoint) > 0)",message="name the parent in endpoint, or in the connection string of connectionStringSecretRef, and not in both"
// +kubebuilder:validation:XValidation:rule="!(has(self.connectionStringSecretRef) && has(self.credentialsSecretRef)) && !(has(self.azureIdentity) && (has(self.connectionStringSecretRef) || has(self.credentialsSecretRef)))",message="credentialsSecretRef, connectionStringSecretRef and azureIdentity exclude one another"
// +kubebuilder:validation:XValidation:rule="!has(self.connectionStringSecretRef) || !has(self.insecure) || !self.insecure",message="insecure is in the connection string already, as ParentEndpointProtocol"
type Parent struct {
	// Endpoint is the parent's host, with a port unless it is the scheme's own;
	// "https://" or "http://" may stand in front. Required, unless a connection
	// string names the parent; then it stays empty.
	Endpoint string `json:"endpoint,omitempty"`
	// Insecure speaks plain HTTP to the parent, as an http:// endpoint does too.
	Insecure bool `json:"insecure,omitempty"`
	// CredentialsSecretRef names a Secret with the keys username and password,
	// or .dockerconfigjson.
	CredentialsSecretRef *SecretRef `json:"credentialsSecretRef,omitempty"`
	// ConnectionStringSecretRef names a Secret whose key connectionString holds
	// an Azure connection string; see ParseConnectionString.
	ConnectionStringSecretRef *SecretRef `json:"connectionStringSecretRef,omitempty"`
	// AzureIdentity reads an Azure container registry with a managed or workload
	// identity that has the role AcrPull there.
	AzureIdentity *AzureIdentity `json:"azureIdentity,omitempty"`
	// CASecretRef names a Secret whose key ca.crt holds the certificates that
	// the parent's chain is verified against, instead of the system's.
	CASecretRef *SecretRef `json:"caSecretRef,omitempty"`
}

// AzureIdentity is an identity that the machine or the pod has.
type AzureIdentity struct {
	// ClientID chooses one among several user-assigned identities. Empty: the
	// workload identity of the pod if it has one, else the only identity of the
	// machine.
	ClientID string `json:"clientID,omitempty"`
}

// Upstream is a registry besides the parent whose content is kept here.
type Upstream struct {
	Parent `json:",inline"`
	// Prefix stands before the name that the upstream's repositories have here,
	// as in "mirror/docker.io". Empty: they keep their names.
	Prefix string `json:"prefix,omitempty"`
	// Repositories is the content of the upstream to keep here. Required.
	Repositories []Repository `json:"repositories"`
}

// SecretRef names a Secret in the resource's namespace. In standalone mode that
// is a directory of this name with one file per key.
type SecretRef struct {
	// Name is the Secret's name, a DNS subdomain. Required.
	Name string `json:"name"`
}

// The keys that are read from Secrets.
const (
	SecretKeyUsername         = "username"
	SecretKeyPassword         = "password"
	SecretKeyDockerConfigJSON = ".dockerconfigjson"
	SecretKeyConnectionString = "connectionString"
	SecretKeyCA               = "ca.crt"
	SecretKeyPassword1        = "password1"
	SecretKeyPassword2        = "password2"
	SecretKeyTLSCertificate   = "tls.crt"
	SecretKeyTLSPrivateKey    = "tls.key"
	SecretKeyAuthorization    = "authorization"
)

// Repository selects content of the parent. Where several entries match one
// repository, what any of them selects is kept.
type Repository struct {
	// Name is a repository's name, or a glob over the parent's catalogue; see
	// ParseGlob. Required.
	Name string `json:"name"`
	// Tags selects among the repository's tags.
	Tags Tags `json:"tags,omitempty"`
	// Prefix stands before the name that the repository has here. Empty: it
	// keeps its name.
	Prefix string `json:"prefix,omitempty"`
	// Platforms selects among the children of an image index, as
	// os/architecture or os/architecture/variant ("linux/amd64",
	// "linux/arm/v7"). Empty: all of them.
	Platforms []string `json:"platforms,omitempty"`
}

// Tags selects tags: those that match Include and do not match Exclude, and of
// these the newest.
type Tags struct {
	// Include are tags, globs ("1.*"), regular expressions ("regex:v[0-9]+") or
	// ranges of versions ("semver:>=1.2 <2"); see ParseTagPattern. Empty: every
	// tag.
	Include []string `json:"include,omitempty"`
	// Exclude are patterns as in Include.
	Exclude []string `json:"exclude,omitempty"`
	// Newest keeps so many of the tags that Include and Exclude leave: those
	// with the highest versions, as semantic versioning orders them. Tags that
	// are not versions cannot be ordered and are left out, unless Include names
	// them, without a wildcard; such tags are kept beside the newest. When an
	// image was made plays no part: asking for that would take several requests
	// for each tag that is not even wanted. 0: all of them.
	//
	// +kubebuilder:validation:Minimum=0
	Newest int `json:"newest,omitempty"`
}

// Sync says when and how content is brought here.
type Sync struct {
	// Schedule is a cron line of five fields, in UTC. Default "* * * * *".
	Schedule string `json:"schedule,omitempty"`
	// Window is how long one synchronisation may last, as an ISO 8601 duration
	// between PT1M and P7D. What is not done by then goes on in the next.
	// Empty: as long as it takes.
	Window string `json:"window,omitempty"`
	// Concurrency is how many blobs are fetched at once, from 1 to 64.
	// Default 6.
	//
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=64
	Concurrency int `json:"concurrency,omitempty"`
	// ChunkSizeInMb is how much of a blob one request asks for, in MiB, from 1
	// to 1024. What is verified so far is never fetched again. Default 16.
	//
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1024
	ChunkSizeInMb int `json:"chunkSizeInMb,omitempty"`
	// MaxBandwidth is the most that all transfers together take from the
	// parents, in bytes per second, for example "2Mi". Empty: no limit.
	MaxBandwidth *resource.Quantity `json:"maxBandwidth,omitempty"`
	// MaxRequestsPerHour is how many requests a parent is asked at most in any
	// hour; what does not fit waits. 0: no limit but the parent's own.
	//
	// +kubebuilder:validation:Minimum=0
	MaxRequestsPerHour int `json:"maxRequestsPerHour,omitempty"`
	// MessageTTL is how long what clients pushed or deleted here is kept for
	// the parent, as an ISO 8601 duration between P1D and P90D. Default P2D.
	MessageTTL string `json:"messageTTL,omitempty"`
	// OnDemand brings what a client asked for, and is selected but not here yet,
	// before everything else. Default true.
	OnDemand *bool `json:"onDemand,omitempty"`
	// Referrers brings the signatures, attestations and other referrers of
	// every manifest that is kept. Default true.
	Referrers *bool `json:"referrers,omitempty"`
	// DeletePropagation removes tags here that are gone at the parent or no
	// longer selected; nothing is removed of a repository whose tags the parent
	// does not list, or while something of it that is wanted cannot be brought.
	// Images without a tag stay until garbage is collected. It cannot stand
	// beside mode ReadWrite.
	DeletePropagation bool `json:"deletePropagation,omitempty"`
	// MaxRemovals is how much of a repository's tags DeletePropagation removes
	// at once, in percent, from 1 to 100. More are held, and stand in the
	// status, until a resync by hand. Default 50.
	//
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100
	MaxRemovals int `json:"maxRemovals,omitempty"`
}

// ClientToken is the credential of a client of this registry.
type ClientToken struct {
	// Name is the user name. Required.
	Name string `json:"name"`
	// SecretRef names a Secret with the keys password1 and password2, of which
	// one may be missing. Required.
	SecretRef SecretRef `json:"secretRef"`
	// ScopeMap is what the client may do. Required.
	ScopeMap []Scope `json:"scopeMap"`
}

// Scope lets a client do some actions on some repositories.
type Scope struct {
	// Repositories are globs; see ParseGlob. Required.
	Repositories []string `json:"repositories"`
	// Actions are what is allowed there. Required.
	Actions []Action `json:"actions"`
}

// Action is one of Azure's scope-map actions.
//
// +kubebuilder:validation:Enum=content/read;content/write;content/delete;metadata/read;metadata/write
type Action string

// The actions.
const (
	ActionContentRead   Action = "content/read"
	ActionContentWrite  Action = "content/write"
	ActionContentDelete Action = "content/delete"
	ActionMetadataRead  Action = "metadata/read"
	ActionMetadataWrite Action = "metadata/write"
)

// Mirror is a registry whose pulls nodes bring here first.
type Mirror struct {
	// Registry is its host as it stands in image names, with a port if it has
	// one there. Required.
	Registry string `json:"registry"`
	// ResolveTags lets this registry answer what a tag stands for. False: tags
	// are always asked of the registry itself. Default true.
	ResolveTags *bool `json:"resolveTags,omitempty"`
	// Fallback lets a node go to the registry itself for what is not here.
	// Default true.
	Fallback *bool `json:"fallback,omitempty"`
	// AnonymousPull lets everybody who reaches this registry read what it holds
	// under the mirrored name, though other names ask for credentials: nodes
	// have none of ours for images of another registry. Without it, and without
	// spec.anonymousPull, such pulls go to the registry itself.
	AnonymousPull bool `json:"anonymousPull,omitempty"`
	// Prefetch brings images to the caches of nodes before they are needed, as
	// far as they may be read without credentials: see AnonymousPull.
	Prefetch []Prefetch `json:"prefetch,omitempty"`
}

// Prefetch names images for nodes.
type Prefetch struct {
	// Images are references without the registry: "team/app:1.2" or
	// "team/app@sha256:…". Required.
	Images []string `json:"images"`
	// NodeSelector chooses nodes by their labels. Empty: every node.
	NodeSelector map[string]string `json:"nodeSelector,omitempty"`
}

// TLS says where the registry's certificate comes from.
//
// +kubebuilder:validation:XValidation:rule="(has(self.source) && self.source == 'Secret') == (has(self.secretName) && size(self.secretName) > 0)",message="secretName belongs to source Secret, and is required there"
type TLS struct {
	// Source is who makes it. Default BuiltIn.
	Source TLSSource `json:"source,omitempty"`
	// SecretName is the operator's Secret with the keys tls.crt and tls.key, and
	// ca.crt unless the certificate is self-signed or a public CA's. Replicas
	// serve a copy of it, which follows once every node trusts its CA; only a
	// Secret named connected-registry-tls they serve themselves, at once. Only
	// with source Secret, and required there.
	SecretName string `json:"secretName,omitempty"`
	// Disabled serves plain HTTP. Nodes must be told by hand then.
	Disabled bool `json:"disabled,omitempty"`
}

// TLSSource is who makes the registry's certificate.
//
// +kubebuilder:validation:Enum=BuiltIn;CertManager;Secret
type TLSSource string

// The sources.
const (
	// TLSSourceBuiltIn: the syncer, with a CA of its own.
	TLSSourceBuiltIn TLSSource = "BuiltIn"
	// TLSSourceCertManager: cert-manager, with objects that the syncer applies.
	TLSSourceCertManager TLSSource = "CertManager"
	// TLSSourceSecret: the operator.
	TLSSourceSecret TLSSource = "Secret"
)

// TrustDistribution says what nodes are made to trust.
type TrustDistribution struct {
	// Disabled leaves nodes alone: no agent runs.
	Disabled bool `json:"disabled,omitempty"`
	// CASecrets are Secrets with certificates that nodes trust for the hosts
	// named, besides this registry's own.
	//
	// +listType=map
	// +listMapKey=name
	CASecrets []CASecret `json:"caSecrets,omitempty"`
	// SystemTrust also puts the certificates into the trust store of the node's
	// operating system, for its other programs. Default true; a standalone
	// registry leaves that store alone.
	SystemTrust *bool `json:"systemTrust,omitempty"`
	// ConfigureRuntime lets the agent change the configuration of a container
	// runtime that does not read hosts.d, and restart it. Default false: it
	// reports what is to be done.
	ConfigureRuntime bool `json:"configureRuntime,omitempty"`
	// NodeSelector are the labels of the nodes that an agent runs on; a rotation
	// waits for no others. Empty: every node.
	NodeSelector map[string]string `json:"nodeSelector,omitempty"`
	// NodeTimeout is how long a rotation of certificates waits for a node that
	// does not answer, as an ISO 8601 duration. Default PT15M.
	NodeTimeout string `json:"nodeTimeout,omitempty"`
	// Hold is how long the old certificates stay trusted after every replica
	// serves the new one, as an ISO 8601 duration. Default PT5M.
	Hold string `json:"hold,omitempty"`
}

// CASecret is a Secret whose key ca.crt holds certificates.
type CASecret struct {
	// Name is the Secret's name. Required.
	Name string `json:"name"`
	// Hosts are the registries, each host[:port], that the certificates are
	// trusted for. Empty: this registry's own names.
	Hosts []string `json:"hosts,omitempty"`
}

// ImmutableTags are tags that neither move nor go.
type ImmutableTags struct {
	// Repositories are globs; see ParseGlob. Required.
	Repositories []string `json:"repositories"`
	// Tags are patterns; see ParseTagPattern. Empty: every tag.
	Tags []string `json:"tags,omitempty"`
}

// Quota bounds what clients may push, in bytes of distinct content.
type Quota struct {
	// Total is for all repositories together. Empty: no bound.
	Total *resource.Quantity `json:"total,omitempty"`
	// PerRepository is for each repository. Empty: no bound.
	PerRepository *resource.Quantity `json:"perRepository,omitempty"`
}

// GarbageCollection frees the space of content that nothing refers to.
type GarbageCollection struct {
	// Enabled runs it on Schedule. Default true.
	Enabled *bool `json:"enabled,omitempty"`
	// Schedule is a cron line of five fields, in UTC. Default "0 3 * * *".
	Schedule string `json:"schedule,omitempty"`
	// MinAge is how old content must be before it is taken away, as an ISO 8601
	// duration: longer than any push takes. Default PT24H.
	MinAge string `json:"minAge,omitempty"`
}

// Notification tells a program of pushes and deletions.
type Notification struct {
	// Events are patterns of the form name[:tag][@digest]:(push|delete), in
	// which "*" stands for anything. Required.
	Events []string `json:"events"`
	// URL takes the events as CloudEvents over HTTP. Required.
	URL string `json:"url"`
	// SecretRef names a Secret whose key authorization is sent as the
	// Authorization header. Absent: none is sent.
	SecretRef *SecretRef `json:"secretRef,omitempty"`
}

// NodeCache bounds the cache on each node.
type NodeCache struct {
	// MaxSize is the most that the cache may occupy, for example "20Gi".
	// Empty: bounded by MinFreeDisk alone.
	MaxSize *resource.Quantity `json:"maxSize,omitempty"`
	// MinFreeDisk is what the cache leaves free on its file system, for example
	// "5Gi". Empty: the cache's own default.
	MinFreeDisk *resource.Quantity `json:"minFreeDisk,omitempty"`
	// OfflineAccess is for how long a client goes on to read what it was allowed
	// to read while the registry cannot be asked, counted from the registry's
	// last word: an ISO 8601 duration between PT1M and P366D. Default P30D.
	OfflineAccess string `json:"offlineAccess,omitempty"`
	// Peers lets nodes ask one another's caches before the registry.
	Peers bool `json:"peers,omitempty"`
	// PrefetchBandwidth is the most that prefetching takes on each node, in
	// bytes per second. Empty: no limit.
	PrefetchBandwidth *resource.Quantity `json:"prefetchBandwidth,omitempty"`
	// PrefetchWorkloads brings the images of workloads in any namespace that
	// bear the label connectedregistry.io/prefetch: "true" to the nodes that
	// their pods may run on: Deployments, StatefulSets, DaemonSets, Jobs and
	// CronJobs. The annotation connectedregistry.io/prefetch-images names more of
	// them, such as those of the next version. Only images that nodes take from
	// here are brought. Nodes may read the repositories of those that this
	// registry's own names name. Default false.
	PrefetchWorkloads bool `json:"prefetchWorkloads,omitempty"`
}
