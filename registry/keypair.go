package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

// keyPollInterval is how often the key pair's files are looked at. A look costs
// two stats. Watching would have to follow the symbolic links by which a mounted
// Secret is exchanged, and would still need a poll where no events come through.
const keyPollInterval = 5 * time.Second

// keyPair is a serving certificate that follows its files. While the files do
// not make a valid pair, as half way through a renewal, the last pair that was
// valid stays in use.
type keyPair struct {
	certFile, keyFile string
	log               *slog.Logger
	current           atomic.Pointer[tls.Certificate]
	seen              fingerprint // of the files last tried; owned by watch
}

// fingerprint is what a change of either file changes.
type fingerprint struct {
	cert, key stamp
}

type stamp struct {
	modified time.Time
	size     int64
}

func newKeyPair(certFile, keyFile string, log *slog.Logger) (*keyPair, error) {
	k := &keyPair{certFile: certFile, keyFile: keyFile, log: log}
	k.seen = k.fingerprint()
	if err := k.load(); err != nil {
		return nil, err
	}
	return k, nil
}

// get is tls.Config.GetCertificate.
func (k *keyPair) get(*tls.ClientHelloInfo) (*tls.Certificate, error) { return k.current.Load(), nil }

// watch loads the files again when they change, until ctx ends.
func (k *keyPair) watch(ctx context.Context) {
	tick := time.NewTicker(keyPollInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			k.poll()
		}
	}
}

func (k *keyPair) poll() {
	now := k.fingerprint()
	if now == k.seen {
		return
	}
	k.seen = now
	if err := k.load(); err != nil {
		k.log.Warn("serving certificate changed but cannot be used; the last one stays in use", "error", err)
		return
	}
	leaf := k.current.Load().Leaf
	k.log.Info("serving certificate loaded", "subject", leaf.Subject, "notAfter", leaf.NotAfter)
}

func (k *keyPair) load() error {
	pair, err := tls.LoadX509KeyPair(k.certFile, k.keyFile)
	if err != nil {
		return fmt.Errorf("loading serving certificate %s with key %s: %w: %s", k.certFile, k.keyFile, err, keyPairRemedy(err))
	}
	if pair.Leaf == nil {
		if pair.Leaf, err = x509.ParseCertificate(pair.Certificate[0]); err != nil {
			return fmt.Errorf("loading serving certificate %s: %w", k.certFile, err)
		}
	}
	k.current.Store(&pair)
	if time.Now().After(pair.Leaf.NotAfter) {
		k.log.Error("the serving certificate has expired, and clients refuse it: renew it", "file", k.certFile, "notAfter", pair.Leaf.NotAfter)
	}
	return nil
}

// keyPairRemedy says what to do about an error of [tls.LoadX509KeyPair].
func keyPairRemedy(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "put both there, or give the directory that holds tls.crt and tls.key"
	case errors.Is(err, fs.ErrPermission):
		return fmt.Sprintf("let user %d read both", os.Geteuid())
	case strings.Contains(err.Error(), "does not match"):
		return "put the key there that the certificate was made for"
	}
	return "put a certificate in PEM and its key, without a passphrase, there"
}

func (k *keyPair) fingerprint() fingerprint {
	return fingerprint{stampOf(k.certFile), stampOf(k.keyFile)}
}

func stampOf(path string) stamp {
	fi, err := os.Stat(path)
	if err != nil {
		return stamp{}
	}
	return stamp{modified: fi.ModTime(), size: fi.Size()}
}
