package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/cobra"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/klog/v2"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/syncer/controller"
)

// syncerFlags are those of the command syncer.
type syncerFlags struct {
	controller   controller.Config
	storage      storageFlag
	healthListen string
	verbose      bool
}

func syncerCommand() *cobra.Command {
	var flags syncerFlags
	cmd := &cobra.Command{
		Use:   "syncer",
		Short: "Look after a ConnectedRegistry in a cluster",
		Long: `Looks after a ConnectedRegistry in a cluster, whenever it leads: renders what
replicas and nodes are told, sees to certificates, synchronises with the parent
and says in the resource's status how things stand. Of several, one leads; the
others wait. It reaches the API server as a pod does, or as $KUBECONFIG says.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return flags.run(cmd.Context(), cmd.ErrOrStderr())
		},
	}
	host, _ := os.Hostname() // empty: --identity is required
	f, c := cmd.Flags(), &flags.controller
	f.StringVar(&c.Namespace, "namespace", "", "namespace of the ConnectedRegistry and of everything that belongs to it (required)")
	f.StringVar(&c.Name, "name", "connected-registry", "name of the ConnectedRegistry")
	f.StringVar(&c.Service, "service", "connected-registry", "name of the Service before the replicas")
	f.StringVar(&c.Data, "data", "/var/lib/connected-registry", "directory that the content lies in, below registry; with --storage, what is on its way there")
	flags.storage.register(cmd)
	f.StringVar(&c.Identity, "identity", host, "what tells this process from others that want to lead: the pod's name")
	f.StringVar(&flags.healthListen, "health-listen", ":8081", "address of /healthz, /readyz and /metrics")
	f.BoolVar(&flags.verbose, "verbose", false, "log at level Debug, whatever spec.logLevel says")
	return cmd
}

func (f *syncerFlags) run(ctx context.Context, stderr io.Writer) error {
	switch {
	case f.controller.Namespace == "":
		return errors.New("--namespace is missing: give that of the ConnectedRegistry")
	case f.controller.Data == "":
		return errors.New("no data directory: give one with --data")
	}
	level := new(slog.LevelVar)
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	klog.SetSlogLogger(log)
	h, err := newHealth(f.healthListen)
	if err != nil {
		return err
	}
	defer h.listener.Close()
	h.readyWhen(func(context.Context) error { return nil }) // it waits for nothing but its turn
	config := f.controller
	config.Version, config.Logger, config.Metrics = version, log, h.metrics
	if config.Bucket, err = f.storage.open(ctx); err != nil {
		return err
	}
	if f.verbose {
		level.Set(slog.LevelDebug)
	} else {
		config.Changed = func(spec *v1alpha1.Spec) { level.Set(logLevel(spec.LogLevel)) }
	}
	if err := connect(&config); err != nil {
		return err
	}
	c, err := controller.New(config)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	answering := make(chan error, 1)
	go func() {
		defer stop()
		answering <- h.run(ctx)
	}()
	err = c.Run(ctx)
	if errors.Is(err, controller.ErrLost) {
		return err // at once: another may lead
	}
	stop()
	return errors.Join(err, <-answering)
}

// connect makes the clients of the API server.
func connect(c *controller.Config) error {
	kube, err := kubeConfig()
	if err != nil {
		return err
	}
	kube.UserAgent = "connected-registry/" + version
	kube.QPS, kube.Burst = 20, 40
	if c.Client, err = kubernetes.NewForConfig(kube); err != nil {
		return fmt.Errorf("client of the API server: %w", err)
	}
	if c.Dynamic, err = dynamic.NewForConfig(kube); err != nil {
		return fmt.Errorf("client of the API server: %w", err)
	}
	if c.Metadata, err = metadata.NewForConfig(kube); err != nil {
		return fmt.Errorf("client of the API server: %w", err)
	}
	return nil
}
