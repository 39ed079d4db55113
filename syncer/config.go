package syncer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

// Secrets reads the Secrets that a resource names.
//
// Those of the machine on which the program runs for itself may also have the
// method CredentialHelpers() bool: true lets a .dockerconfigjson name programs
// that give credentials (docker's credHelpers and credsStore).
type Secrets interface {
	// Secret returns one key of a Secret. The error names both, never what the
	// Secret holds; it wraps fs.ErrNotExist when one of them is not there.
	Secret(ctx context.Context, name, key string) ([]byte, error)
}

// FromSpec translates what a valid resource, with its defaults set, says about
// synchronisation. Store, Driver, and all that belongs to the process rather
// than to the resource, are left to the caller. The Source is the parent; nil
// when there is none, and then nothing can be synchronised unless the Config has
// Upstreams.
func FromSpec(ctx context.Context, spec *v1alpha1.Spec, secrets Secrets) (Config, *Source, error) {
	source, err := Resolve(ctx, spec.Parent, secrets)
	if err != nil {
		return Config{}, nil, fmt.Errorf("spec.parent: %w", err)
	}
	sync := spec.Sync
	config := Config{
		Repositories:      spec.Repositories,
		Schedule:          sync.Schedule,
		Concurrency:       sync.Concurrency,
		Referrers:         sync.Referrers == nil || *sync.Referrers,
		DeletePropagation: sync.DeletePropagation,
		MaxRemovals:       sync.MaxRemovals,

		ChunkSize:          int64(sync.ChunkSizeInMb) << 20,
		MaxRequestsPerHour: sync.MaxRequestsPerHour,
		OnDemand:           sync.OnDemand == nil || *sync.OnDemand,
		ReadWrite:          spec.Mode == v1alpha1.ModeReadWrite,
	}
	if source != nil {
		config.Parent = source.Parent
	}
	if sync.MaxBandwidth != nil {
		config.MaxBandwidth = sync.MaxBandwidth.Value()
	}
	for i := range spec.Upstreams {
		from := &spec.Upstreams[i]
		resolved, err := Resolve(ctx, &from.Parent, secrets)
		if err != nil {
			return Config{}, nil, fmt.Errorf("spec.upstreams[%d]: %w", i, err)
		}
		config.Upstreams = append(config.Upstreams, Upstream{resolved.Parent, from.Prefix, from.Repositories})
	}
	if sync.Window != "" {
		if config.Window, err = v1alpha1.ParseDuration(sync.Window); err != nil {
			return Config{}, nil, fmt.Errorf("spec.sync.window: %w", err)
		}
	}
	return config, source, nil
}

// Source is a registry that content comes from, and how nodes know it.
type Source struct {
	Parent
	// Namespace is its host as image references name it.
	Namespace string
	// Server is the URL that its API is found at.
	Server string
	// Gateway is the host that a connection string names. Empty: there is none.
	Gateway string
	// Bundle is what its certificate is verified against. Empty: the system's
	// roots.
	Bundle trust.Bundle
}

// Resolve reads what a parent refers to. It returns nil for nil.
func Resolve(ctx context.Context, spec *v1alpha1.Parent, secrets Secrets) (*Source, error) {
	if spec == nil {
		return nil, nil
	}
	r := resolver{ctx, secrets}
	s := &Source{}
	if err := r.address(s, spec); err != nil {
		return nil, err
	}
	if err := r.authority(s, spec); err != nil {
		return nil, err
	}
	if spec.AzureIdentity != nil {
		s.Credentials = newAzureIdentity(s.Parent, spec.AzureIdentity.ClientID).credentials
	}
	s.Namespace = s.Endpoint
	if isDockerHub(s.Endpoint) {
		// Docker Hub goes by one name in image references and by another on
		// the network.
		s.Namespace, s.Endpoint = "docker.io", "registry-1.docker.io"
	}
	s.Server = "https://" + s.Endpoint
	if s.Insecure {
		s.Server = "http://" + s.Endpoint
	}
	return s, nil
}

// NodeMirrors are the registries that nodes are to ask us for first: those the
// resource lists, or else the parent. source is nil when there is none.
func NodeMirrors(spec *v1alpha1.Spec, source *Source) []v1alpha1.NodeMirror {
	listed := spec.Mirrors
	if len(listed) == 0 && source != nil {
		listed = []v1alpha1.Mirror{{Registry: source.Namespace, ResolveTags: new(true), Fallback: new(true)}}
	}
	var all []v1alpha1.NodeMirror
	for _, m := range listed {
		mirror := v1alpha1.NodeMirror{Mirror: m}
		if source != nil && m.Registry == source.Namespace && (m.Fallback == nil || *m.Fallback) {
			mirror.Server, mirror.CA = source.Server, string(source.Bundle.PEM())
		}
		all = append(all, mirror)
	}
	return all
}

// Passwords reads password1 and password2 of a client token's Secret, of which
// one may be missing.
func Passwords(ctx context.Context, name string, secrets Secrets) ([]string, error) {
	var all []string
	var missing error
	for _, key := range []string{v1alpha1.SecretKeyPassword1, v1alpha1.SecretKeyPassword2} {
		value, err := secrets.Secret(ctx, name, key)
		if errors.Is(err, fs.ErrNotExist) {
			missing = err
			continue
		}
		if err != nil {
			return nil, err
		}
		password := strings.TrimRight(string(value), "\r\n")
		if password == "" {
			return nil, fmt.Errorf("Secret %s: %s is empty: put a password into it or remove it", name, key)
		}
		all = append(all, password)
	}
	if len(all) == 0 {
		return nil, missing
	}
	return all, nil
}

// resolver reads Secrets for one call of Resolve.
type resolver struct {
	ctx     context.Context //nolint:containedctx // lives as long as one call
	secrets Secrets
}

func (r resolver) key(name, key string) (string, error) {
	data, err := r.secrets.Secret(r.ctx, name, key)
	return string(data), err
}

// address finds the parent's host and the credentials for it.
func (r resolver) address(s *Source, spec *v1alpha1.Parent) (err error) {
	if spec.ConnectionStringSecretRef != nil {
		return r.connectionString(s, spec.ConnectionStringSecretRef.Name)
	}
	if s.Endpoint, s.Insecure, err = spec.Address(); err != nil {
		return fmt.Errorf("endpoint: %w", err)
	}
	if spec.CredentialsSecretRef != nil {
		return r.credentials(s, spec.CredentialsSecretRef.Name)
	}
	return nil
}

func (r resolver) connectionString(s *Source, name string) error {
	text, err := r.key(name, v1alpha1.SecretKeyConnectionString)
	if err != nil {
		return err
	}
	cs, err := v1alpha1.ParseConnectionString(strings.TrimSpace(text))
	if err != nil {
		return fmt.Errorf("Secret %s: %w", name, err)
	}
	s.Endpoint, s.Insecure = cs.LoginServer(), cs.ParentEndpointProtocol == "http"
	s.Username, s.Password = cs.SyncTokenName, cs.SyncTokenPassword
	if cs.ManagedIdentityClientID != "" {
		s.Credentials = newAzureIdentity(s.Parent, cs.ManagedIdentityClientID).credentials
	}
	s.Gateway = cs.ParentGatewayEndpoint
	return nil
}

// authority reads the parent's own CA. The pool holds these certificates alone.
func (r resolver) authority(s *Source, spec *v1alpha1.Parent) error {
	if spec.CASecretRef == nil {
		return nil
	}
	name := spec.CASecretRef.Name
	pem, err := r.key(name, v1alpha1.SecretKeyCA)
	if err != nil {
		return err
	}
	bundle, _, err := trust.ParseBundle([]byte(pem), time.Now())
	if err != nil {
		return fmt.Errorf("Secret %s, key %s: %w", name, v1alpha1.SecretKeyCA, err)
	}
	s.Bundle, s.CA = bundle, bundle.Pool()
	return nil
}

// credentials reads username and password, or the entry for the registry in a
// .dockerconfigjson. An editor's line end after a value is not part of it.
func (r resolver) credentials(s *Source, name string) error {
	docker, err := r.key(name, v1alpha1.SecretKeyDockerConfigJSON)
	if err == nil {
		helpers, ok := r.secrets.(interface{ CredentialHelpers() bool })
		if err := dockerCredentials([]byte(docker), &s.Parent, ok && helpers.CredentialHelpers()); err != nil {
			return fmt.Errorf("Secret %s, key %s: %w", name, v1alpha1.SecretKeyDockerConfigJSON, err)
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	username, err := r.key(name, v1alpha1.SecretKeyUsername)
	if err != nil {
		return err
	}
	password, err := r.key(name, v1alpha1.SecretKeyPassword)
	if err != nil {
		return err
	}
	s.Username, s.Password = strings.TrimRight(username, "\r\n"), strings.TrimRight(password, "\r\n")
	return nil
}

func isDockerHub(host string) bool {
	return host == "docker.io" || host == "index.docker.io" || host == "registry-1.docker.io"
}
