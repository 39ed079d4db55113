package registry

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// The files in a replica's directory, beside those of client tokens.
const (
	// ResourceFile is the ConnectedRegistry in force, as v1alpha1.Load reads it.
	ResourceFile = "resource.yaml"
	// SecretFile is what all replicas sign with, in hex.
	SecretFile = "secret"
	// NamesFile lists the hosts[:port] by which image references name the
	// registry, one to a line. It may be missing.
	NamesFile = "names"
)

// settingsPollInterval is how often the files are looked at: as often as those
// of the key pair and of the tokens.
const settingsPollInterval = 5 * time.Second

// SettingsConfig says where a replica's settings are.
type SettingsConfig struct {
	// Dir is a mounted Secret, or any directory with the same files. Required.
	Dir string
	// Changed is told of the settings when they have been read, first by
	// OpenSettings. Nil: nobody is told.
	Changed func(*v1alpha1.Spec)
	// Logger is told of changes. Nil discards them.
	Logger *slog.Logger
}

// Settings are what a replica is told by the files of a directory. They follow
// the files; while those cannot be used, the last good settings stay in force.
type Settings struct {
	cfg     SettingsConfig
	log     *slog.Logger
	secret  []byte
	current atomic.Pointer[settings]
	fault   atomic.Pointer[error] // why the files cannot be used now
	seen    []byte                // the files as they were last read; owned by whoever reads
}

type settings struct {
	spec  *v1alpha1.Spec
	rules *Rules
	names []string
}

// OpenSettings reads the directory. It starts nothing.
func OpenSettings(cfg SettingsConfig) (*Settings, error) {
	s := &Settings{cfg: cfg, log: cfg.Logger}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	path := filepath.Join(cfg.Dir, SecretFile)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading what replicas sign with: %w: mount the Secret connected-registry-replica, or name its directory with --replica", err)
	}
	if s.secret, err = hex.DecodeString(strings.TrimSpace(string(text))); err != nil || len(s.secret) < 16 {
		return nil, fmt.Errorf("%s does not hold 16 bytes or more in hex: make them with `openssl rand -hex 32`", path)
	}
	if err := s.load(); err != nil {
		return nil, err
	}
	return s, nil
}

// Secret is what all replicas sign with. It does not change.
func (s *Settings) Secret() []byte { return s.secret }

// Spec is the resource in force, with its defaults. It must not be changed.
func (s *Settings) Spec() *v1alpha1.Spec { return s.current.Load().spec }

// ReadOnly reports whether writes are refused.
func (s *Settings) ReadOnly() bool { return s.Spec().Mode != v1alpha1.ModeReadWrite }

// AnonymousPull reports whether clients without credentials may read.
func (s *Settings) AnonymousPull() bool { return s.Spec().AnonymousPull }

// Rules are the resource's rules.
func (s *Settings) Rules() *Rules { return s.current.Load().rules }

// AnonymousPullFor is that of the rules in force.
func (s *Settings) AnonymousPullFor(registry, repository string) bool {
	return s.Rules().AnonymousPullFor(registry, repository)
}

// Names are the hosts[:port] by which image references name the registry.
func (s *Settings) Names() []string { return s.current.Load().names }

// Err is why the files cannot be used now; nil when they are in force.
func (s *Settings) Err() error {
	if err := s.fault.Load(); err != nil {
		return *err
	}
	return nil
}

// Watch reads the files again when they change, until ctx ends.
func (s *Settings) Watch(ctx context.Context) {
	tick := time.NewTicker(settingsPollInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			_ = s.read() // logged, and in Err
		}
	}
}

// read puts the files in force. An error is logged once, not at every poll.
func (s *Settings) read() error {
	err := s.load()
	if err == nil {
		s.fault.Store(nil)
		return nil
	}
	if before := s.Err(); before == nil || before.Error() != err.Error() {
		s.log.Error("the settings cannot be used; the last ones stay in force", "error", err)
	}
	s.fault.Store(&err)
	return err
}

func (s *Settings) load() error {
	path := filepath.Join(s.cfg.Dir, ResourceFile)
	resource, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("reading the resource in force: %w: mount the Secret connected-registry-replica, or name its directory with --replica", err)
	}
	names, err := os.ReadFile(filepath.Join(s.cfg.Dir, NamesFile))
	if err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("reading the registry's names: %w: make it a file with a host[:port] to a line, or remove it", err)
	}
	all := bytes.Join([][]byte{resource, names}, []byte{0})
	if bytes.Equal(all, s.seen) {
		return nil
	}
	r, err := v1alpha1.Load(path, resource)
	if err != nil {
		return err
	}
	rules, err := NewRules(&r.Spec)
	if err != nil {
		return err
	}
	now := &settings{spec: &r.Spec, rules: rules, names: strings.Fields(string(names))}
	if before := s.current.Swap(now); before != nil {
		s.log.Info("settings changed", "mode", r.Spec.Mode, "anonymousPull", r.Spec.AnonymousPull)
	}
	s.seen = all
	if s.cfg.Changed != nil {
		s.cfg.Changed(&r.Spec)
	}
	return nil
}
