package v1alpha1

import (
	"strings"
	"unicode"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// The headers by which connected registries know one another.
const (
	// HeaderParent stands in the answer of a connected registry to GET /v2/. Its
	// value is the API version.
	HeaderParent = "Connected-Registry"
	// HeaderChild stands in requests that a connected registry makes of another:
	// a ChildHeader in JSON.
	HeaderChild = "Connected-Registry-Child"
)

// ChildHeader is what a connected registry says of itself to its parent.
//
// +kubebuilder:object:generate=false
type ChildHeader struct {
	Name            string          `json:"name"`
	Mode            Mode            `json:"mode,omitempty"`
	ConnectionState ConnectionState `json:"connectionState,omitempty"`
	LoginServer     string          `json:"loginServer,omitempty"`
	Version         string          `json:"version,omitempty"`
	LastSyncTime    *metav1.Time    `json:"lastSyncTime,omitempty"`
}

// Valid reports whether every field is of the form that it has in a resource.
func (h ChildHeader) Valid() bool {
	switch h.Mode {
	case "", ModeReadOnly, ModeReadWrite:
	default:
		return false
	}
	switch h.ConnectionState {
	case "", ConnectionStateOnline, ConnectionStateOffline, ConnectionStateSyncing, ConnectionStateUnhealthy:
	default:
		return false
	}
	return len(validation.IsDNS1123Subdomain(h.Name)) == 0 &&
		(h.LoginServer == "" || validateHost(h.LoginServer) == nil) &&
		len(h.Version) <= 128 && !strings.ContainsFunc(h.Version, func(r rune) bool { return !unicode.IsGraphic(r) })
}

// Child is a connected registry whose parent this one is.
type Child struct {
	// Name is what it calls itself.
	Name string `json:"name"`
	// ClientToken is the token that it reads with.
	ClientToken string `json:"clientToken,omitempty"`
	// Mode, ConnectionState, LoginServer and Version are as in its own status.
	Mode            Mode            `json:"mode,omitempty"`
	ConnectionState ConnectionState `json:"connectionState,omitempty"`
	LoginServer     string          `json:"loginServer,omitempty"`
	Version         string          `json:"version,omitempty"`
	// LastSyncTime is when its last synchronisation that brought everything
	// ended.
	LastSyncTime *metav1.Time `json:"lastSyncTime,omitempty"`
	// LastActivityTime is when it was last heard of.
	LastActivityTime *metav1.Time `json:"lastActivityTime,omitempty"`
}
