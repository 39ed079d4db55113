package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// TrustStatus says which CA certificates nodes are made to trust, and how far a
// rotation of them got. A new leader goes on from it and from what is there.
type TrustStatus struct {
	// Phase is how far a rotation got; Stable while there is none.
	Phase TrustPhase `json:"phase,omitempty"`
	// Since is when the phase began. Waiting for nodes, and holding, are counted
	// from it.
	Since *metav1.Time `json:"since,omitempty"`
	// Message says what is being waited for, in one line.
	Message string `json:"message,omitempty"`
	// Fingerprints are the SHA-256 sums, in hex, of the CA certificates that
	// nodes are to trust in the end. Empty with a certificate of a public CA.
	Fingerprints []string `json:"fingerprints,omitempty"`
	// OldFingerprints are those that nodes trust until the rotation has ended.
	OldFingerprints []string `json:"oldFingerprints,omitempty"`
	// CANotAfter is when the first of the CA certificates to be trusted ends.
	CANotAfter *metav1.Time `json:"caNotAfter,omitempty"`
	// CertificateNotAfter is when the certificate that replicas serve ends.
	CertificateNotAfter *metav1.Time `json:"certificateNotAfter,omitempty"`
	// Nodes is how many nodes are asked to trust the certificates.
	Nodes int `json:"nodes,omitempty"`
	// NodesTrusting is how many of them said that they trust all that is
	// published.
	NodesTrusting int `json:"nodesTrusting,omitempty"`
	// NodesWaitedFor are nodes that have not said so yet, the first 50 by name.
	NodesWaitedFor []string `json:"nodesWaitedFor,omitempty"`
	// NodesPassed are nodes that a rotation did not wait for any longer and that
	// have not caught up yet, the first 50 by name.
	NodesPassed []string `json:"nodesPassed,omitempty"`
	// ReplicasWaitedFor are the addresses of replicas that are not yet seen to
	// serve the new certificate, with the reason, the first 50 by address.
	ReplicasWaitedFor []string `json:"replicasWaitedFor,omitempty"`
}

// TrustPhase is how far a rotation of CA certificates got.
type TrustPhase string

// The phases, in their order.
const (
	// TrustPhaseDisabled: the registry serves plain HTTP.
	TrustPhaseDisabled TrustPhase = "Disabled"
	// TrustPhasePending: there is no usable certificate to begin with yet.
	TrustPhasePending TrustPhase = "Pending"
	// TrustPhaseWaitingForNodes: the old and the new CA certificates are
	// published, and replicas serve the old certificate until every node trusts
	// both.
	TrustPhaseWaitingForNodes TrustPhase = "WaitingForNodes"
	// TrustPhaseWaitingForReplicas: the new certificate is given out, and every
	// replica is watched until it serves it.
	TrustPhaseWaitingForReplicas TrustPhase = "WaitingForReplicas"
	// TrustPhaseHolding: every replica serves the new certificate; the old CA
	// certificates stay trusted for the time of TrustDistribution.Hold.
	TrustPhaseHolding TrustPhase = "Holding"
	// TrustPhaseStable: only what is needed is trusted.
	TrustPhaseStable TrustPhase = "Stable"
)

// AnnotationRotateCA on a ConnectedRegistry asks for a new CA whenever its value
// is one that was not there before.
const AnnotationRotateCA = Group + "/rotate-ca"
