package controller

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
	"github.com/connected-registry/connected-registry/syncer"
	"github.com/connected-registry/connected-registry/syncer/certificates"
)

// What is rendered for replicas and nodes, in the resource's namespace.
const (
	ReplicaSecret = "connected-registry-replica"
	NodeConfigMap = "connected-registry-node"

	keyResource = "resource.yaml"
	keySecret   = "secret"
	keyNames    = "names"
	keyNode     = "node.yaml"
)

// The Secret in which the operator may give what replicas sign with.
const (
	UploadSecret    = "connected-registry-upload"
	keyUploadSecret = "uploadSecret"
)

// service is what is known of the replicas' Service.
type service struct {
	name, namespace string
	clusterIPs      []netip.Addr
	port            int32
	portName        string
	// endpoints are the replicas that are ready, each host:port, sorted.
	endpoints []string
}

// address is where the replicas are reached.
func (s service) address() (string, error) {
	if len(s.clusterIPs) == 0 {
		return "", fmt.Errorf("Service %s has no cluster IP, by which nodes reach the registry", s.name)
	}
	return net.JoinHostPort(s.clusterIPs[0].String(), strconv.Itoa(int(s.port))), nil
}

// standardPort is the one that image references leave out.
func standardPort(plainHTTP bool) int32 {
	if plainHTTP {
		return 80
	}
	return 443
}

// names are the hosts[:port] by which image references name the registry: first
// the login server, then cluster IPs and DNS names.
func (s service) names(loginServer string, plainHTTP bool) []string {
	var names []string
	add := func(host string) {
		if s.port != standardPort(plainHTTP) {
			host = net.JoinHostPort(strings.Trim(host, "[]"), strconv.Itoa(int(s.port)))
		}
		if !slices.Contains(names, host) {
			names = append(names, host)
		}
	}
	if loginServer != "" {
		names = append(names, loginServer)
	}
	for _, ip := range s.clusterIPs {
		if ip.Is6() {
			add("[" + ip.String() + "]")
		} else {
			add(ip.String())
		}
	}
	for _, suffix := range []string{"", ".svc", ".svc.cluster.local"} {
		add(s.name + "." + s.namespace + suffix)
	}
	return names
}

// replicaData is what replicas are told: the content of ReplicaSecret, given what
// it holds now. Where a client token's Secret cannot be used, the token stays as
// it was; the error says so, and the data is good in spite of it.
func replicaData(ctx context.Context, cr *v1alpha1.ConnectedRegistry, names []string, uploadSecret []byte,
	now map[string][]byte, secrets syncer.Secrets, tokens *clienttoken.Renderer,
) (map[string][]byte, error) {
	resource, err := resourceYAML(cr)
	if err != nil {
		return nil, err
	}
	secret, err := signingSecret(uploadSecret, now[keySecret])
	if err != nil {
		return nil, err
	}
	data := map[string][]byte{
		keyResource: resource,
		keySecret:   secret,
		keyNames:    []byte(strings.Join(names, "\n") + "\n"),
	}
	var errs []error
	for i, t := range cr.Spec.ClientTokens {
		file := t.Name + clienttoken.Extension
		content, err := tokenFile(ctx, t, now[file], secrets, tokens)
		if err != nil {
			errs = append(errs, fmt.Errorf("spec.clientTokens[%d]: %w", i, err))
			content = now[file]
		}
		if content != nil {
			data[file] = content
		}
	}
	return data, errors.Join(errs...)
}

func tokenFile(ctx context.Context, t v1alpha1.ClientToken, was []byte, secrets syncer.Secrets, tokens *clienttoken.Renderer) ([]byte, error) {
	passwords, err := syncer.Passwords(ctx, t.SecretRef.Name, secrets)
	if err != nil {
		return nil, err
	}
	return tokens.Render(passwords, t.ScopeMap, was)
}

// resourceYAML is the resource in force, as v1alpha1.Load reads it.
func resourceYAML(cr *v1alpha1.ConnectedRegistry) ([]byte, error) {
	type metadata struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace,omitempty"`
	}
	return yaml.Marshal(struct {
		metav1.TypeMeta `json:",inline"`
		Metadata        metadata      `json:"metadata"`
		Spec            v1alpha1.Spec `json:"spec"`
	}{
		metav1.TypeMeta{APIVersion: v1alpha1.APIVersion, Kind: v1alpha1.Kind},
		metadata{cr.Name, cr.Namespace},
		cr.Spec,
	})
}

// minSecret is how many bytes replicas sign with at least.
const minSecret = 16

// signingSecret is what replicas sign with, in hex: what the operator gave, else
// what there is, else something new.
func signingSecret(given, now []byte) ([]byte, error) {
	given = bytes.TrimSpace(given)
	switch raw, err := hex.DecodeString(string(given)); {
	case len(given) == 0:
	case err == nil && len(raw) >= minSecret:
		return given, nil
	case len(given) < minSecret:
		return nil, fmt.Errorf("Secret %s: %s is shorter than %d bytes: make one with `openssl rand -hex 32`", UploadSecret, keyUploadSecret, minSecret)
	default: // any text will do
		return []byte(hex.EncodeToString(given)), nil
	}
	if raw, err := hex.DecodeString(string(now)); err == nil && len(raw) >= minSecret {
		return now, nil
	}
	secret := make([]byte, 32)
	rand.Read(secret)
	return []byte(hex.EncodeToString(secret)), nil
}

// nodeConfiguration is what nodes are told. Where they are not told all of it,
// the error says so, and the configuration is good in spite of it; without a
// configuration, it says why there is none.
func nodeConfiguration(spec *v1alpha1.Spec, s service, source *syncer.Source, f *fleet) (*v1alpha1.NodeConfiguration, error) {
	address, err := s.address()
	if err != nil {
		return nil, err
	}
	c := &v1alpha1.NodeConfiguration{
		APIVersion:       v1alpha1.APIVersion,
		Kind:             v1alpha1.NodeConfigurationKind,
		Registry:         address,
		PlainHTTP:        spec.TLS.Disabled,
		Endpoints:        s.endpoints,
		Names:            s.names(spec.LoginServer, spec.TLS.Disabled),
		Push:             spec.Mode == v1alpha1.ModeReadWrite,
		SystemTrust:      spec.TrustDistribution.SystemTrust == nil || *spec.TrustDistribution.SystemTrust,
		Mirrors:          syncer.NodeMirrors(spec, source),
		NodeCache:        spec.NodeCache,
		ConfigureRuntime: spec.TrustDistribution.ConfigureRuntime,
		LogLevel:         spec.LogLevel,
	}
	c.NodeCache.PrefetchWorkloads = false // nodes are told what it comes to
	for i := range c.Mirrors {
		c.Mirrors[i].Prefetch = nil
	}
	var incomplete error
	c.Prefetch, incomplete = planPrefetch(c, spec, f)
	if spec.NodeCache.Peers {
		c.Peers = f.peers()
	}
	if !spec.TLS.Disabled {
		c.CASecrets = []v1alpha1.CASecret{{Name: certificates.CASecret}}
	}
	for _, s := range spec.TrustDistribution.CASecrets {
		if s.Name != certificates.CASecret {
			c.CASecrets = append(c.CASecrets, s)
		}
	}
	c.SetDefaults()
	if errs := c.Validate(); len(errs) > 0 {
		return nil, fmt.Errorf("rendering what nodes are told: %w", errs.ToAggregate())
	}
	return c, incomplete
}
