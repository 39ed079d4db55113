package standalone

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/syncer"
	"github.com/connected-registry/connected-registry/trust"
)

// maxSecretBytes is what Kubernetes allows a whole Secret to hold.
const maxSecretBytes = 1 << 20

// parent is the parent registry with its Secrets read.
type parent struct {
	syncer.Parent
	ca trust.Bundle
	// namespace is the registry's host as image references name it, server the
	// URL that its API is found at.
	namespace, server string
}

// parentOf resolves what spec.parent refers to; nil when there is no parent.
func parentOf(spec *v1alpha1.Parent, secrets string) (*parent, error) {
	if spec == nil {
		return nil, nil
	}
	p := &parent{}
	if err := p.readAddress(spec, secrets); err != nil {
		return nil, err
	}
	if err := p.readCA(spec, secrets); err != nil {
		return nil, err
	}
	p.namespace = p.Endpoint
	if isDockerHub(p.Endpoint) {
		// Docker Hub goes by one name in image references and by another on
		// the network.
		p.namespace, p.Endpoint = "docker.io", "registry-1.docker.io"
	}
	p.server = "https://" + p.Endpoint
	if p.Insecure {
		p.server = "http://" + p.Endpoint
	}
	return p, nil
}

// readAddress finds the parent's host and the credentials for it.
func (p *parent) readAddress(spec *v1alpha1.Parent, secrets string) (err error) {
	if spec.ConnectionStringSecretRef != nil {
		return p.readConnectionString(secret{secrets, spec.ConnectionStringSecretRef.Name})
	}
	if p.Endpoint, p.Insecure, err = spec.Address(); err != nil {
		return fmt.Errorf("spec.parent.endpoint: %w", err)
	}
	if spec.CredentialsSecretRef != nil {
		p.Username, p.Password, err = secret{secrets, spec.CredentialsSecretRef.Name}.credentials(p.Endpoint)
	}
	return err
}

func (p *parent) readConnectionString(s secret) error {
	text, err := s.key(v1alpha1.SecretKeyConnectionString)
	if err != nil {
		return err
	}
	cs, err := v1alpha1.ParseConnectionString(strings.TrimSpace(text))
	if err != nil {
		return fmt.Errorf("Secret %s: %w", s.name, err)
	}
	if cs.ManagedIdentityClientID != "" {
		return fmt.Errorf("Secret %s: the connection string asks for a managed identity, which standalone mode has none of: use one with a sync token", s.name)
	}
	p.Endpoint, p.Insecure = cs.LoginServer(), cs.ParentEndpointProtocol == "http"
	p.Username, p.Password = cs.SyncTokenName, cs.SyncTokenPassword
	return nil
}

// readCA reads the parent's own CA. The pool holds these certificates alone.
func (p *parent) readCA(spec *v1alpha1.Parent, secrets string) error {
	if spec.CASecretRef == nil {
		return nil
	}
	s := secret{secrets, spec.CASecretRef.Name}
	pem, err := s.key(v1alpha1.SecretKeyCA)
	if err != nil {
		return err
	}
	bundle, _, err := trust.ParseBundle([]byte(pem), time.Now())
	if err != nil {
		return fmt.Errorf("Secret %s, key %s: %w", s.name, v1alpha1.SecretKeyCA, err)
	}
	p.ca, p.CA = bundle, bundle.Pool()
	return nil
}

// secret is a directory that holds a file for each key, as a mounted Secret.
type secret struct{ dir, name string }

// key reads one key. Errors name the file, never its content.
func (s secret) key(key string) (string, error) {
	name := filepath.Join(s.dir, s.name, key)
	f, err := os.Open(name)
	if err != nil {
		return "", fmt.Errorf("Secret %s: %w: in standalone mode a Secret is a directory with a file for each key", s.name, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSecretBytes+1))
	if err != nil {
		return "", fmt.Errorf("Secret %s: reading %s: %w", s.name, name, err)
	}
	if len(data) > maxSecretBytes {
		return "", fmt.Errorf("Secret %s: %s is larger than a Secret may be (1 MiB)", s.name, name)
	}
	return string(data), nil
}

// credentials reads username and password, or the entry for host in a
// .dockerconfigjson. An editor's line end after a value is not part of it.
func (s secret) credentials(host string) (username, password string, err error) {
	docker, err := s.key(v1alpha1.SecretKeyDockerConfigJSON)
	if err == nil {
		username, password, err = dockerCredentials([]byte(docker), host)
		if err != nil {
			return "", "", fmt.Errorf("Secret %s, key %s: %w", s.name, v1alpha1.SecretKeyDockerConfigJSON, err)
		}
		return username, password, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", "", err
	}
	if username, err = s.key(v1alpha1.SecretKeyUsername); err != nil {
		return "", "", err
	}
	if password, err = s.key(v1alpha1.SecretKeyPassword); err != nil {
		return "", "", err
	}
	return strings.TrimRight(username, "\r\n"), strings.TrimRight(password, "\r\n"), nil
}

// dockerCredentials finds host in a docker configuration file. Errors never
// quote the file.
func dockerCredentials(config []byte, host string) (username, password string, err error) {
	var file struct {
		Auths map[string]struct {
			Auth     string `json:"auth"`
			Username string `json:"username"`
			Password string `json:"password"`
		} `json:"auths"`
	}
	if err := json.Unmarshal(config, &file); err != nil {
		return "", "", errors.New("not a docker configuration file in JSON")
	}
	for name, entry := range file.Auths {
		if !sameRegistry(name, host) {
			continue
		}
		if entry.Auth == "" {
			return entry.Username, entry.Password, nil
		}
		pair, err := base64.StdEncoding.DecodeString(entry.Auth)
		if err != nil {
			return "", "", fmt.Errorf("auths[%q].auth is not base64", name)
		}
		username, password, ok := strings.Cut(string(pair), ":")
		if !ok {
			return "", "", fmt.Errorf("auths[%q].auth is not user:password", name)
		}
		return username, password, nil
	}
	return "", "", fmt.Errorf("auths has no entry for %s", host)
}

// sameRegistry compares a docker configuration's key, which may be a URL such
// as Docker Hub's https://index.docker.io/v1/, with a registry's host.
func sameRegistry(key, host string) bool {
	if _, rest, ok := strings.Cut(key, "://"); ok {
		key = rest
	}
	key, _, _ = strings.Cut(key, "/")
	return key == host || isDockerHub(key) && isDockerHub(host)
}

func isDockerHub(host string) bool {
	return host == "docker.io" || host == "index.docker.io" || host == "registry-1.docker.io"
}
