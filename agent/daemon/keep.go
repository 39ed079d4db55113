package daemon

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/connected-registry/connected-registry/trust"
)

const (
	// stateDir is ours on a node; package trust keeps its record there too.
	stateDir = "/var/lib/connected-registry"
	// keepName is the directory in it that holds the last good copies.
	keepName   = "agent"
	keptConfig = "node.yaml"
	keptCA     = "ca.crt" // of the registry itself, for the cache
	keptOf     = "secrets"
)

// keep is the last good copy of what the node works by. Each file is whole at
// any moment, and good by itself: a mixture of old and new ones is as well.
type keep struct {
	root *os.Root
	dir  string // inside root
	path string // as this process reaches it
	// before, if set, is called ahead of every change. Tests end there.
	before func()
}

// openKeep touches nothing yet.
func openKeep(nodeRoot string) (*keep, error) {
	root, err := os.OpenRoot(nodeRoot)
	if err != nil {
		return nil, fmt.Errorf("node root: %w: give another with --node-root", err)
	}
	dir, err := trust.ResolvePath(root, stateDir)
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("node root %s: %w", nodeRoot, err)
	}
	dir = path.Join(dir, keepName)
	return &keep{root: root, dir: dir, path: filepath.Join(nodeRoot, dir)}, nil
}

func (k *keep) close() { k.root.Close() }

// caFile is where the registry's CA is, for the cache to read.
func (k *keep) caFile() string { return filepath.Join(k.path, keptCA) }

// load returns what was kept. What cannot be read is as if it had not been, and
// told in the error.
func (k *keep) load(now time.Time) (config *configuration, bundles map[string]trust.Bundle, err error) {
	var errs []error
	raw, err := k.read(keptConfig)
	if err == nil {
		config, err = loadConfiguration(filepath.Join(k.path, keptConfig), raw)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	bundles = make(map[string]trust.Bundle)
	if config == nil {
		return nil, bundles, errors.Join(errs...)
	}
	for _, s := range config.CASecrets {
		pem, err := k.read(path.Join(keptOf, s.Name))
		if err == nil {
			var b trust.Bundle
			if b, _, err = trust.ParseBundle(pem, now); err == nil {
				bundles[s.Name] = b
			}
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("last good copy of Secret %s: %w", s.Name, err))
		}
	}
	return config, bundles, errors.Join(errs...)
}

func (k *keep) read(name string) ([]byte, error) {
	f, err := k.root.Open(path.Join(k.dir, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 2*trust.MaxBundleBytes))
}

// save keeps the certificates, and then the configuration that names them.
// Certificates of Secrets that it does not name go.
func (k *keep) save(config *configuration, bundles map[string]trust.Bundle, own trust.Bundle) error {
	if err := k.root.MkdirAll(path.Join(k.dir, keptOf), 0o700); err != nil {
		return fmt.Errorf("keeping the last good configuration: %w", err)
	}
	files := map[string]trust.Bundle{keptCA: own}
	for _, s := range config.CASecrets {
		files[path.Join(keptOf, s.Name)] = bundles[s.Name]
	}
	for name, b := range files {
		if err := k.put(name, b.PEM()); err != nil {
			return err
		}
	}
	if err := k.put(keptConfig, config.raw); err != nil {
		return err
	}
	return k.removeOthers(files)
}

// put writes a file, or removes it if there is nothing to be in it.
func (k *keep) put(name string, data []byte) error {
	k.step()
	name = path.Join(k.dir, name)
	var err error
	if len(data) == 0 {
		_, err = trust.RemoveFile(k.root, name)
	} else {
		_, err = trust.WriteFile(k.root, name, data, 0o600)
	}
	if err != nil {
		return fmt.Errorf("keeping the last good configuration: %w", err)
	}
	return nil
}

// removeOthers also removes what a killed process left half-written.
func (k *keep) removeOthers(files map[string]trust.Bundle) error {
	for _, dir := range []string{".", keptOf} {
		entries, err := fs.ReadDir(k.root.FS(), path.Join(k.dir, dir))
		if err != nil {
			return err
		}
		for _, e := range entries {
			name := path.Join(dir, e.Name())
			if _, ok := files[name]; ok || name == keptConfig || name == keptOf {
				continue
			}
			k.step()
			if err := k.root.RemoveAll(path.Join(k.dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// remove leaves nothing. The configuration goes first: without it, the rest is
// not looked at.
func (k *keep) remove() error {
	k.step()
	if _, err := trust.RemoveFile(k.root, path.Join(k.dir, keptConfig)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	k.step()
	return k.root.RemoveAll(k.dir)
}

func (k *keep) step() {
	if k.before != nil {
		k.before()
	}
}

// removeStateDir removes the directory that is ours if nothing is left in it.
func (k *keep) removeStateDir() {
	_ = k.root.Remove(path.Dir(k.dir)) // not empty, or mounted: it stays
}
