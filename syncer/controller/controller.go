package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/syncer/certificates"
)

// Config says what a Controller looks after. All of it is required but for what
// says otherwise.
type Config struct {
	// Client, Dynamic and Metadata reach the API server.
	Client   kubernetes.Interface
	Dynamic  dynamic.Interface
	Metadata metadata.Interface
	// Namespace and Name are those of the ConnectedRegistry. All other objects
	// are in the same namespace.
	Namespace, Name string
	// Service is the name of the replicas' Service.
	Service string
	// Identity tells this process from the others that want to lead.
	Identity string
	// Data is the directory that the content lies in, below registry. Only the
	// leader touches it.
	Data string
	// Bucket is what the content lies in instead; Data holds what is on its way
	// there. Nil: Data alone.
	Bucket bucket.Bucket
	// Version is the program's. Empty: unknown.
	Version string
	// Certificates sees to certificates. Nil: certificates.New.
	Certificates Certificates
	// Election is how the leader is found.
	Election Election
	// Changed is told of the spec in force, with its defaults, whenever it was
	// looked at. Nil: nobody is.
	Changed func(*v1alpha1.Spec)
	// Logger takes the log. Nil: none.
	Logger *slog.Logger
	// Metrics is where metrics are registered. Nil: nowhere.
	Metrics prometheus.Registerer
}

// Certificates sees to certificates; see certificates.Reconciler.
type Certificates interface {
	Reconcile(context.Context, *v1alpha1.ConnectedRegistry, certificates.Service) (certificates.Result, error)
}

// Controller looks after one ConnectedRegistry, whenever it leads.
type Controller struct {
	config Config
	log    *slog.Logger
}

// New validates the configuration. It starts nothing and asks nothing.
func New(config Config) (*Controller, error) {
	switch {
	case config.Client == nil || config.Dynamic == nil || config.Metadata == nil:
		return nil, errors.New("controller: Client, Dynamic and Metadata are required")
	case config.Namespace == "" || config.Name == "" || config.Service == "" || config.Identity == "" || config.Data == "":
		return nil, errors.New("controller: Namespace, Name, Service, Identity and Data are required")
	}
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	config.Election.setDefaults()
	if config.Certificates == nil {
		var err error
		config.Certificates, err = certificates.New(certificates.Config{
			Client: config.Client, Dynamic: config.Dynamic, Log: config.Logger,
		})
		if err != nil {
			return nil, err
		}
	}
	return &Controller{config: config, log: config.Logger}, nil
}

// lead does everything that only the leader may do, until ctx ends. Everything
// that it started has ended when it returns.
func (c *Controller) lead(ctx context.Context) error {
	r := newRecorder(ctx, c.config)
	defer r.close()
	return newLoop(c.config, r).run(ctx)
}

// requestTime bounds one request to the API server.
const requestTime = 15 * time.Second

// withRequestTime calls do with a context for one request.
func withRequestTime[T any](ctx context.Context, do func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTime, fmt.Errorf("the API server did not answer within %s", requestTime))
	defer cancel()
	return do(ctx)
}
