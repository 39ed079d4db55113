// Package provisioner makes ReadWriteMany volumes for a test cluster: one
// directory per claim, in a directory that every node sees at the same place.
// It speaks to the API server with the standard library alone.
package provisioner

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// Name is what StorageClass.provisioner has to say for this provisioner.
const Name = "connected-registry.test/shared"

const (
	interval    = 500 * time.Millisecond
	provisioned = "pv.kubernetes.io/provisioned-by"
)

// Config says where claims come from and volumes go. Every field is required.
type Config struct {
	// Server is the API server, https://host:port.
	Server string
	// CAFile, CertFile and KeyFile are PEM files.
	CAFile, CertFile, KeyFile string
	// Class is the StorageClass whose claims are served.
	Class string
	// Dir is where a volume's directory is made, NodeDir the same place as
	// the nodes see it.
	Dir, NodeDir string
}

// Provisioner serves the claims of one StorageClass.
type Provisioner struct {
	config Config
	client *http.Client
}

// New reads the credentials and starts nothing.
func New(config Config) (*Provisioner, error) {
	cert, err := tls.LoadX509KeyPair(config.CertFile, config.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("reading the client certificate: %w", err)
	}
	ca, err := os.ReadFile(config.CAFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s holds no certificate", config.CAFile)
	}
	return &Provisioner{config: config, client: &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}},
		},
	}}, nil
}

// Run serves claims until ctx ends. It asks again and again rather than
// watching: there are few claims, and an API server that is away needs no care.
func (p *Provisioner) Run(ctx context.Context) error {
	for {
		if err := p.pass(ctx); err != nil && ctx.Err() == nil {
			slog.Error("pass over the claims", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(interval):
		}
	}
}

// The parts of the API's objects that matter here.
type (
	meta struct {
		Name        string            `json:"name,omitempty"`
		Namespace   string            `json:"namespace,omitempty"`
		UID         string            `json:"uid,omitempty"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	claim struct {
		Metadata meta `json:"metadata"`
		Spec     struct {
			StorageClassName string          `json:"storageClassName"`
			VolumeName       string          `json:"volumeName"`
			AccessModes      json.RawMessage `json:"accessModes"`
			Resources        struct {
				Requests map[string]string `json:"requests"`
			} `json:"resources"`
		} `json:"spec"`
	}
	volume struct {
		APIVersion string     `json:"apiVersion"`
		Kind       string     `json:"kind"`
		Metadata   meta       `json:"metadata"`
		Spec       volumeSpec `json:"spec"`
		Status     struct {
			Phase string `json:"phase,omitempty"`
		} `json:"status,omitzero"`
	}
	volumeSpec struct {
		AccessModes                   json.RawMessage   `json:"accessModes"`
		Capacity                      map[string]string `json:"capacity"`
		ClaimRef                      claimRef          `json:"claimRef"`
		HostPath                      hostPath          `json:"hostPath"`
		PersistentVolumeReclaimPolicy string            `json:"persistentVolumeReclaimPolicy"`
		StorageClassName              string            `json:"storageClassName"`
	}
	claimRef struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Namespace  string `json:"namespace"`
		Name       string `json:"name"`
		UID        string `json:"uid"`
	}
	hostPath struct {
		Path string `json:"path"`
		Type string `json:"type"`
	}
)

func (p *Provisioner) pass(ctx context.Context) error {
	var claims struct {
		Items []claim `json:"items"`
	}
	if err := p.do(ctx, http.MethodGet, "/api/v1/persistentvolumeclaims", nil, &claims); err != nil {
		return err
	}
	var errs []error
	for _, c := range claims.Items {
		if c.Spec.StorageClassName == p.config.Class && c.Spec.VolumeName == "" {
			errs = append(errs, p.create(ctx, c))
		}
	}
	var volumes struct {
		Items []volume `json:"items"`
	}
	errs = append(errs, p.do(ctx, http.MethodGet, "/api/v1/persistentvolumes", nil, &volumes))
	for _, v := range volumes.Items {
		if v.Metadata.Annotations[provisioned] == Name && v.Status.Phase == "Released" {
			errs = append(errs, p.remove(ctx, v))
		}
	}
	return errors.Join(errs...)
}

// create makes the directory, writable by all as network file systems are
// usually exported, and the volume that is bound to the claim.
func (p *Provisioner) create(ctx context.Context, c claim) error {
	name := "shared-" + c.Metadata.UID
	dir := filepath.Join(p.config.Dir, name)
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o777); err != nil { // whatever the umask
		return err
	}
	err := p.do(ctx, http.MethodPost, "/api/v1/persistentvolumes", volume{
		APIVersion: "v1",
		Kind:       "PersistentVolume",
		Metadata:   meta{Name: name, Annotations: map[string]string{provisioned: Name}},
		Spec: volumeSpec{
			AccessModes: c.Spec.AccessModes,
			Capacity:    c.Spec.Resources.Requests,
			ClaimRef: claimRef{
				APIVersion: "v1", Kind: "PersistentVolumeClaim",
				Namespace: c.Metadata.Namespace, Name: c.Metadata.Name, UID: c.Metadata.UID,
			},
			HostPath:                      hostPath{Path: filepath.Join(p.config.NodeDir, name), Type: "Directory"},
			PersistentVolumeReclaimPolicy: "Delete",
			StorageClassName:              p.config.Class,
		},
	}, nil)
	var status statusError
	if errors.As(err, &status) && status.code == http.StatusConflict {
		return nil // made in an earlier pass and about to be bound
	}
	return err
}

func (p *Provisioner) remove(ctx context.Context, v volume) error {
	if err := p.do(ctx, http.MethodDelete, "/api/v1/persistentvolumes/"+v.Metadata.Name, nil, nil); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(p.config.Dir, filepath.Base(v.Metadata.Name)))
}

// statusError is an answer of the API server other than success.
type statusError struct {
	code int
	text string
}

func (e statusError) Error() string { return e.text }

func (p *Provisioner) do(ctx context.Context, method, path string, body, into any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, p.config.Server+path, bytes.NewReader(data))
	if err != nil {
		return err
	}
	if body == nil {
		req.Body, req.ContentLength = http.NoBody, 0
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := p.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode/100 != 2 {
		return statusError{resp.StatusCode, fmt.Sprintf("%s %s: %s: %.500s", method, path, resp.Status, answer)}
	}
	if into == nil {
		return nil
	}
	if err := json.Unmarshal(answer, into); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}
