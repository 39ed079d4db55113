package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/registry"
	"github.com/connected-registry/connected-registry/registry/auth"
	"github.com/connected-registry/connected-registry/standalone"
	"github.com/connected-registry/connected-registry/storage"
	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/syncer"
)

// replicaFlags are those of the command registry.
type replicaFlags struct {
	replica, tls, data, listen, healthListen string
	storage                                  storageFlag
	plainHTTP                                bool
	drainDelay, drainTimeout                 time.Duration
}

func registryCommand() *cobra.Command {
	var flags replicaFlags
	cmd := &cobra.Command{
		Use:   "registry",
		Short: "Run one replica of the registry in a cluster",
		Long: `Runs one replica of the registry. Everything it needs lies in files, which the
syncer renders and the kubelet mounts; they are read again when they change. It
talks to nobody to serve a request.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return flags.run(cmd.Context(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&flags.replica, "replica", "/etc/connected-registry/replica", "directory with the settings: resource.yaml, secret, names and a file for each client token")
	f.StringVar(&flags.tls, "tls", "/etc/connected-registry/tls", "directory with tls.crt and tls.key")
	f.StringVar(&flags.data, "data", "/var/lib/connected-registry", "directory that the content lies in, below registry; with --storage, what is on its way there")
	flags.storage.register(cmd)
	f.StringVar(&flags.listen, "listen", ":8443", "address of the registry")
	f.BoolVar(&flags.plainHTTP, "plain-http", false, "serve without TLS")
	f.StringVar(&flags.healthListen, "health-listen", ":8081", "address of /healthz, /readyz and /metrics")
	f.DurationVar(&flags.drainDelay, "drain-delay", 5*time.Second, "how long to go on serving when told to end, until nobody sends new requests")
	f.DurationVar(&flags.drainTimeout, "drain-timeout", 50*time.Second, "how long transfers in flight may take after that")
	return cmd
}

func (f *replicaFlags) run(ctx context.Context, stderr io.Writer) error {
	if f.data == "" {
		return errors.New("no data directory: give one with --data")
	}
	level := new(slog.LevelVar)
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	settings, err := registry.OpenSettings(registry.SettingsConfig{
		Dir:     f.replica,
		Changed: func(spec *v1alpha1.Spec) { level.Set(logLevel(spec.LogLevel)) },
		Logger:  log,
	})
	if err != nil {
		return err
	}
	h, err := newHealth(f.healthListen)
	if err != nil {
		return err
	}
	defer h.listener.Close()
	objects, err := f.storage.open(ctx)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	// Health answers from here on until the last transfer has ended.
	until, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	answering := make(chan error, 1)
	go func() {
		defer stop()
		answering <- h.run(until)
	}()
	err = f.serve(ctx, settings, objects, h, log)
	end()
	return errors.Join(err, <-answering)
}

// serve serves what is stored, until a while after ctx ends.
func (f *replicaFlags) serve(ctx context.Context, settings *registry.Settings, objects bucket.Bucket, h *health, log *slog.Logger) error {
	store, err := f.open(ctx, objects, h, log)
	if err != nil {
		return err
	}
	if store == nil {
		return nil
	}
	defer func() { _ = store.Close() }() // never fails
	traces, stopTraces, err := newTracing(ctx)
	if err != nil {
		return err
	}
	defer stopTraces()
	server, err := f.server(ctx, settings, store, h, traces, log)
	if err != nil {
		return err
	}
	var leaving atomic.Bool
	h.readyWhen(func(ctx context.Context) error {
		if leaving.Load() {
			return errors.New("about to end")
		}
		return store.Ready(ctx)
	})
	// The replica ends a while after it was told to, so that requests which are
	// on their way find it.
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	g, serving := errgroup.WithContext(serving)
	g.Go(func() error {
		select {
		case <-ctx.Done():
			leaving.Store(true)
			log.Info("ending", "delay", f.drainDelay)
			sleep(serving, f.drainDelay)
			stop()
		case <-serving.Done():
		}
		return nil
	})
	g.Go(func() error {
		settings.Watch(serving)
		return nil
	})
	g.Go(func() error { return server.Run(serving) })
	return g.Wait()
}

// storagePause is how long after an attempt an object store is tried again.
const storagePause = 2 * time.Second

// open opens the storage; nil when ctx has ended. An object store that is not
// there yet, as after a power failure, is waited for: a process that ended would
// be started again later and later.
func (f *replicaFlags) open(ctx context.Context, objects bucket.Bucket, h *health, log *slog.Logger) (*storage.Store, error) {
	for ctx.Err() == nil {
		store, err := storage.Open(ctx, storage.Config{Root: filepath.Join(f.data, "registry"), Bucket: objects, Logger: log})
		if err == nil || objects == nil {
			return store, err
		}
		log.Error("waiting for the object store", "error", err)
		h.readyWhen(func(context.Context) error { return err })
		sleep(ctx, storagePause)
	}
	return nil, nil
}

func (f *replicaFlags) server(ctx context.Context, settings *registry.Settings, store *storage.Store, h *health, traces trace.TracerProvider, log *slog.Logger) (*registry.Server, error) {
	authority, err := auth.New(auth.Config{
		Dir:              f.replica,
		Secret:           settings.Secret(),
		AnonymousPull:    settings.AnonymousPull,
		AnonymousPullFor: settings.AnonymousPullFor,
		Hosts:            settings.Names,
		Logger:           log,
	})
	if err != nil {
		return nil, err
	}
	config := registry.Config{
		Store:     store,
		ReadOnly:  settings.ReadOnly,
		Rules:     settings.Rules,
		Auth:      authority,
		Missing:   syncer.NewOnDemand(store, settings.Spec, log).Missing,
		DrainTime: f.drainTimeout,
		Traces:    traces,
		Logger:    log,
		Metrics:   h.metrics,
	}
	if !f.plainHTTP {
		config.CertFile, config.KeyFile = filepath.Join(f.tls, v1alpha1.SecretKeyTLSCertificate), filepath.Join(f.tls, v1alpha1.SecretKeyTLSPrivateKey)
	}
	if config.Listener, err = standalone.Listen(ctx, f.listen, "--listen"); err != nil {
		return nil, err
	}
	server, err := registry.New(config)
	if err != nil {
		config.Listener.Close()
		return nil, err
	}
	log.Info("serving", "registry", config.Listener.Addr(), "health", h.listener.Addr(), "mode", settings.Spec().Mode, "version", version)
	return server, nil
}

// sleep returns after d, or when ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
