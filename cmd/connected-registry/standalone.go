package main

import (
	"context"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/standalone"
)

func standaloneCommand() *cobra.Command {
	var flags resourceFlags
	var listen, cacheListen, healthListen, nodeRoot string
	cmd := &cobra.Command{
		Use:   "standalone",
		Short: "Run registry, syncer, node cache and node configuration in one process",
		Long: `Runs the registry, the syncer, the node cache and the configuration of this
node's containerd in one process, without Kubernetes.

What is written to the node stays when the process ends, since pulls fall
through to the image's own registry then; "agent cleanup" takes it away.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := flags.load(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			config.Listen, config.CacheListen, config.NodeRoot = listen, cacheListen, nodeRoot
			config.Version = version
			var h *health
			if healthListen != "" {
				if h, err = newHealth(healthListen); err != nil {
					return err
				}
				defer h.listener.Close()
				config.Metrics = h.metrics
			}
			s, err := standalone.Open(cmd.Context(), config)
			if err != nil {
				return err
			}
			defer s.Close()
			log := config.Logger
			if h != nil {
				log = log.With("health", h.listener.Addr())
			}
			log.Info("serving", "registry", "https://"+s.LoginServer, "cache", s.CacheURL, "node", nodeRoot)
			return runWithHealth(cmd.Context(), s, h)
		},
	}
	flags.register(cmd)
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:5443", "address of the registry (HTTPS)")
	cmd.Flags().StringVar(&cacheListen, "cache-listen", "127.0.0.1:5050", "loopback address of the node cache; empty for no cache")
	cmd.Flags().StringVar(&healthListen, "health-listen", "", "address of /healthz, /readyz and /metrics; empty for none")
	cmd.Flags().StringVar(&nodeRoot, "node-root", "/", "where the node's /etc/containerd is found; empty to leave the node alone")
	cmd.Flags().BoolVar(&flags.anonymous, "anonymous", false, "let everybody pull, as spec.anonymousPull does")
	return cmd
}

// runWithHealth runs s, and h beside it unless it is nil.
func runWithHealth(ctx context.Context, s *standalone.Standalone, h *health) error {
	if h == nil {
		return s.Run(ctx)
	}
	h.readyWhen(func(context.Context) error { return nil }) // it serves from the beginning
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var g errgroup.Group
	g.Go(func() error {
		defer stop()
		return h.run(ctx)
	})
	g.Go(func() error {
		defer stop()
		return s.Run(ctx)
	})
	return g.Wait()
}
