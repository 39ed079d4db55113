package main

import (
	_ "embed"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/standalone"
)

//go:embed default.yaml
var defaultResource []byte

// resourceFlags are shared by the commands that work on one machine from a
// ConnectedRegistry in a file.
type resourceFlags struct {
	config, data, secrets string
	anonymous             bool
}

func (f *resourceFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.config, "config", "", "ConnectedRegistry in YAML; without it one small image of Docker Hub is kept")
	cmd.Flags().StringVar(&f.data, "data", "/var/lib/connected-registry", "directory that everything kept lies in")
	cmd.Flags().StringVar(&f.secrets, "secrets", "", "directory with one directory for each Secret that the configuration names (default DATA/secrets)")
}

// load returns the configuration of standalone mode that the flags describe.
// The log goes to stderr, at the level that the configuration asks for.
func (f *resourceFlags) load(stderr io.Writer) (standalone.Config, error) {
	name, data := "default", defaultResource
	if f.config != "" {
		var err error
		if data, err = readConfig(f.config); err != nil {
			return standalone.Config{}, fmt.Errorf("reading the configuration: %w: give a file that you may read with --config", err)
		}
		name = f.config
	}
	resource, err := v1alpha1.Load(name, data)
	if err != nil {
		return standalone.Config{}, err
	}
	if f.anonymous {
		resource.Spec.AnonymousPull = true
	}
	return standalone.Config{
		Resource: resource,
		Data:     f.data,
		Secrets:  f.secrets,
		Logger:   logger(stderr, resource.Spec.LogLevel),
	}, nil
}

// maxConfig is more than v1alpha1.Load takes, in bytes.
const maxConfig = 2 << 20

// readConfig reads a file, and no more of it than is needed to see that it is
// too large.
func readConfig(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxConfig))
}

// levelNone is above every level.
const levelNone = slog.LevelError + 1000

func logLevel(level v1alpha1.LogLevel) slog.Level {
	return map[v1alpha1.LogLevel]slog.Level{ // Information: the zero Level
		v1alpha1.LogLevelDebug:   slog.LevelDebug,
		v1alpha1.LogLevelWarning: slog.LevelWarn,
		v1alpha1.LogLevelError:   slog.LevelError,
		v1alpha1.LogLevelNone:    levelNone,
	}[level]
}

func logger(w io.Writer, level v1alpha1.LogLevel) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: logLevel(level)}))
}
