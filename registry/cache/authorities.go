package cache

import (
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// authorities reads a CA bundle again whenever the file changes, so that a
// rotated authority counts from the next connection on.
type authorities struct {
	path string // "": the system's authorities
	log  *slog.Logger

	mu      sync.Mutex // guards everything below
	changed time.Time
	size    int64
	own     *x509.CertPool
	all     *x509.CertPool // own and the system's
}

// pool returns the authorities of the bundle, with the system's as well if asked
// to; nil means the system's. The last good bundle is used while there is no
// good one; without any the error is errAuthorities.
func (a *authorities) pool(withSystem bool) (*x509.CertPool, error) {
	if a.path == "" {
		return nil, nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.reload(); err != nil {
		if a.own == nil {
			return nil, fmt.Errorf("%w: %w", errAuthorities, err)
		}
		a.log.Warn("the CA bundle cannot be read; the last good one is used", "path", a.path, "error", err)
	}
	if withSystem {
		return a.all, nil
	}
	return a.own, nil
}

func (a *authorities) reload() error {
	fi, err := os.Stat(a.path)
	if err != nil {
		return err
	}
	if a.own != nil && fi.ModTime().Equal(a.changed) && fi.Size() == a.size {
		return nil
	}
	pem, err := os.ReadFile(a.path)
	if err != nil {
		return err
	}
	own := x509.NewCertPool()
	if !own.AppendCertsFromPEM(pem) {
		return fmt.Errorf("%s holds no certificate", a.path)
	}
	all, err := x509.SystemCertPool()
	if err != nil {
		all = x509.NewCertPool()
	}
	all.AppendCertsFromPEM(pem)
	a.own, a.all, a.changed, a.size = own, all, fi.ModTime(), fi.Size()
	return nil
}
