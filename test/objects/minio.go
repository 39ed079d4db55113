package objects

import (
	"context"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
)

// The credentials of a MinIO.
const (
	AccessKeyID     = "connected"
	SecretAccessKey = "not-a-secret-at-all"
)

// MinIO says how to run one.
type MinIO struct {
	// Address is HOST:PORT. Empty: a free port on 127.0.0.1.
	Address string
	// Data is an empty directory, or one that a MinIO has used.
	Data string
	// Buckets are made in it.
	Buckets []string
	// Certificates is a directory with public.crt and private.key. Empty: plain HTTP.
	Certificates string
	// CA is a file with the authority that signed public.crt.
	CA string
}

// Start compiles MinIO when that was not done before, which takes minutes, and
// starts it.
func (m MinIO) Start(ctx context.Context) (*Server, error) {
	program, err := tool("minio", "minio")
	if err != nil {
		return nil, err
	}
	address := m.Address
	if address == "" {
		if address, err = freeAddress(); err != nil {
			return nil, err
		}
	}
	if err := makeBuckets(m.Data, m.Buckets); err != nil {
		return nil, err
	}
	s := &Server{URL: "http://" + address, CA: m.CA}
	certificates := filepath.Join(m.Data, ".no-certificates")
	var roots *x509.CertPool
	if m.Certificates != "" {
		certificates, s.URL = m.Certificates, "https://"+address
		pem, err := os.ReadFile(m.CA)
		if err != nil {
			return nil, err
		}
		roots = x509.NewCertPool()
		roots.AppendCertsFromPEM(pem)
	}
	s.ready = answers(newClient(roots), s.URL+"/minio/health/cluster", http.StatusOK)
	s.command = func() *exec.Cmd {
		cmd := exec.Command(program, "server", "--quiet", "--certs-dir", certificates, "--address", address, m.Data)
		cmd.Env = append(os.Environ(), "MINIO_ROOT_USER="+AccessKeyID, "MINIO_ROOT_PASSWORD="+SecretAccessKey,
			"MINIO_BROWSER=off", "MINIO_UPDATE=off", "HOME="+m.Data, "MINIO_SCANNER_SPEED=slowest")
		return cmd
	}
	if err := s.start(ctx); err != nil {
		return nil, fmt.Errorf("MinIO: %w", err)
	}
	return s, nil
}
