package certificates

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// The Secrets, in the resource's namespace.
const (
	RootSecret   = "connected-registry-root"
	IssuedSecret = "connected-registry-issued"
	TLSSecret    = "connected-registry-tls"
	CASecret     = "connected-registry-ca"
)

// The types of the conditions in [Result].
const (
	// ConditionCertificateReady: replicas have a certificate that holds.
	ConditionCertificateReady = "CertificateReady"
	// ConditionTrustDistributed: every node trusts what is published.
	ConditionTrustDistributed = "TrustDistributed"
)

// Config says what a Reconciler works with.
type Config struct {
	// Client reaches the cluster. Required.
	Client kubernetes.Interface
	// Dynamic reaches it for cert-manager's objects. Required.
	Dynamic dynamic.Interface
	// ClusterDomain ends the names of services. Zero: cluster.local.
	ClusterDomain string
	// Log takes what is done. Zero: nothing is logged.
	Log *slog.Logger
	// Now is the clock. Zero: time.Now.
	Now func() time.Time
	// Dial reaches replicas. Zero: that of a net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Service is what is known of the registry's Service.
type Service struct {
	// Name is its name. Required; the EndpointSlices with its label are the
	// replicas.
	Name string
	// ClusterIPs are its addresses. May be empty, and then the certificate names
	// none.
	ClusterIPs []netip.Addr
	// PortName is the port of the EndpointSlices that serves TLS. Zero: the only
	// one.
	PortName string
}

// Result is where things stand after a call of Reconcile.
type Result struct {
	// Trust is to be written to the resource's status. It is never nil.
	Trust *v1alpha1.TrustStatus
	// CABundle holds the CA certificates that nodes are made to trust, in PEM:
	// all that are published. Empty: none are needed or known.
	CABundle []byte
	// Conditions are ConditionCertificateReady and ConditionTrustDistributed,
	// without the time of their last transition.
	Conditions []metav1.Condition
	// Events are to be raised on the resource; each tells of a change and is
	// returned once.
	Events []Event
	// RequeueAfter is when to call again, though nothing changed.
	RequeueAfter time.Duration
}

// Event is a Kubernetes Event.
type Event struct {
	// Warning says that the type is Warning, not Normal.
	Warning bool
	Reason  string
	Message string
}

// Reconciler brings certificates and trust to where they should be, a step at a
// time. It keeps nothing that its successor would miss.
type Reconciler struct {
	config Config
	mu     sync.Mutex // one call at a time
	memory memory
}

// New checks the configuration and starts nothing.
func New(config Config) (*Reconciler, error) {
	if config.Client == nil || config.Dynamic == nil {
		return nil, errors.New("certificates: Client and Dynamic are required")
	}
	if config.ClusterDomain == "" {
		config.ClusterDomain = "cluster.local"
	}
	if config.Log == nil {
		config.Log = slog.New(slog.DiscardHandler)
	}
	if config.Now == nil {
		config.Now = time.Now
	}
	if config.Dial == nil {
		config.Dial = (&net.Dialer{}).DialContext
	}
	return &Reconciler{config: config}, nil
}

// Reconcile looks at what is there, makes the next step, and says where things
// stand. What cannot go on because of what the operator gave stands in the
// conditions; an error is a fault of the way to the API server, or a write that
// lost against another's, and the call is to be repeated. Whatever it returned
// before, it may be called at any time.
func (r *Reconciler) Reconcile(ctx context.Context, cr *v1alpha1.ConnectedRegistry, service Service) (Result, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.memory.of != cr.UID {
		r.memory = memory{of: cr.UID}
	}
	call := &run{
		Config: r.config, memory: &r.memory, cr: cr, service: service, now: r.config.Now(),
		hosts: hosts(service, cr.Namespace, r.config.ClusterDomain, cr.Spec.LoginServer),
	}
	result, err := call.run(ctx)
	if err != nil {
		return Result{}, fmt.Errorf("certificates of %s/%s: %w", cr.Namespace, cr.Name, err)
	}
	return result, nil
}
