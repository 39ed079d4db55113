package trust

import (
	"errors"
	"time"
)

// Authority is the built-in certificate authority, kept in a directory.
type Authority struct{}

// LoadOrCreateAuthority reads ca.crt and ca.key from dir, which must exist, or
// makes them.
func LoadOrCreateAuthority(dir string, now time.Time) (*Authority, error) {
	return nil, errors.ErrUnsupported
}

// Bundle holds the authority's own certificate.
func (a *Authority) Bundle() Bundle { return Bundle{} }

// EnsureServing makes sure that dir holds a current tls.crt and tls.key for
// hosts, DNS names or IP addresses without port.
func (a *Authority) EnsureServing(dir string, hosts []string, now time.Time) (changed bool, err error) {
	return false, errors.ErrUnsupported
}
