package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/connected-registry/connected-registry/agent"
	"github.com/connected-registry/connected-registry/trust"
)

// CacheDir is where a node's cache lies, inside its root.
const CacheDir = stateDir + "/cache"

// OnceConfig is for a node that joins no cluster yet.
type OnceConfig struct {
	// File is the NodeConfiguration. Required.
	File string
	// CAs are files with the registry's CA certificates, in place of the Secrets
	// that File names.
	CAs []string
	// NodeRoot, CertsDir, CacheURL and Logger are as in Config.
	NodeRoot, CertsDir, CacheURL string
	Logger                       *slog.Logger
	// Reserved are registries that the node's distribution looks after, and that
	// are not mirrored therefore.
	Reserved []string
}

// Once configures a node from files alone, and returns the paths that it
// changed, as seen inside NodeRoot. An agent that is started later goes on from
// there.
func Once(ctx context.Context, cfg OnceConfig) (changed []string, err error) {
	raw, err := readLimited(cfg.File)
	if err != nil {
		return nil, fmt.Errorf("reading the node's configuration: %w: give the node.yaml of ConfigMap connected-registry-node with --config", err)
	}
	c, err := loadConfiguration(cfg.File, raw)
	if err != nil {
		return nil, err
	}
	var own trust.Bundle
	for _, file := range cfg.CAs {
		pem, err := readLimited(file)
		if err != nil {
			return nil, fmt.Errorf("reading the registry's CA: %w: give a file with its certificates with --ca", err)
		}
		b, notes, err := trust.ParseBundle(pem, time.Now())
		if err != nil {
			return nil, fmt.Errorf("CA %s: %w", file, err)
		}
		for _, note := range notes {
			cfg.Logger.Warn(note, "file", file)
		}
		own = own.Union(b)
	}
	if c.wantsCA() && own.Empty() {
		return nil, errors.New("the registry's certificates come from a Secret: give its CA with --ca")
	}
	node := c.nodeConfig(authorities{own: own}, cfg.CacheURL)
	node.Mirrors = withoutReserved(node.Mirrors, cfg.Reserved)
	node.NodeRoot, node.CertsDir, node.Logger = cfg.NodeRoot, cfg.CertsDir, cfg.Logger
	a, err := agent.New(node)
	if err != nil {
		return nil, err
	}
	return a.Apply(ctx)
}

// Cleanup leaves the node as it was before the first agent, but for the cache.
// It may be repeated, and finishes what a killed one began.
func Cleanup(ctx context.Context, cfg agent.CleanupConfig) error {
	k, err := openKeep(cmpRoot(cfg.NodeRoot))
	if err != nil {
		return err
	}
	defer k.close()
	return k.cleanUp(ctx, cfg)
}

// cleanUp: what is kept goes first, since a running agent's record can only go
// with the directory that both are in.
func (k *keep) cleanUp(ctx context.Context, cfg agent.CleanupConfig) error {
	if err := k.remove(); err != nil {
		return err
	}
	if err := agent.Cleanup(ctx, cfg); err != nil {
		return err
	}
	k.removeStateDir()
	return nil
}

func cmpRoot(nodeRoot string) string {
	if nodeRoot == "" {
		return "/"
	}
	return nodeRoot
}

// RemoveCache removes the directory of a node's cache with all that is in it,
// and our own directory on the node if that leaves it empty. A cache that runs
// is an error.
func RemoveCache(nodeRoot, dir string) error {
	lock, err := os.Open(filepath.Join(dir, "lock"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("removing the cache: %w", err)
	default:
		defer lock.Close()
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return fmt.Errorf("removing the cache %s, which a process is using: %w: stop it first", dir, err)
		}
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("removing the cache: %w", err)
		}
	}
	k, err := openKeep(cmpRoot(nodeRoot))
	if err != nil {
		return err
	}
	defer k.close()
	k.removeStateDir()
	return nil
}
