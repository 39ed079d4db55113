package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/agent"
	"github.com/connected-registry/connected-registry/agent/daemon"
	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/registry/cache"
	"github.com/connected-registry/connected-registry/standalone"
)

func agentCommand() *cobra.Command {
	var f agentFlags
	cmd := group("agent", "Look after one node")
	help := cmd.RunE
	cmd.Long = `Looks after one node of a cluster: makes its container runtime ask the node's
cache, then the connected registry, then the image's own registry; keeps the
certificates of the named Secrets trusted; and serves the cache.

What is written to the node stays when the process ends, since pulls fall
through to the image's own registry then; "agent cleanup" takes it away.`
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case f.config == "" && cmd.Flags().NFlag() > 0:
			return errors.New("--config is missing: give the node's configuration, the node.yaml of ConfigMap connected-registry-node")
		case f.config == "":
			return help(cmd, args)
		case f.once:
			return f.runOnce(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		default:
			cache.TuneMemory()
			return f.run(cmd.Context(), cmd.ErrOrStderr())
		}
	}
	f.register(cmd)
	cmd.AddCommand(agentCleanupCommand(), agentUninstallCommand())
	return cmd
}

type agentFlags struct {
	config, namespace, node, pod string
	nodeRoot, certsDir           string
	checkImage                   string
	startupTaint                 bool
	data, containerd             string
	cacheListen, healthListen    string
	nodeIP, peerTLS              string
	prefetchCredentials          string
	peerPort                     uint16
	secretGrace                  time.Duration
	once                         bool
	cas                          []string
}

func (f *agentFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.config, "config", "", "NodeConfiguration in YAML, read again when it changes (required)")
	flags.StringVar(&f.namespace, "namespace", "", "namespace of the agent, its Secrets and its Lease (default $POD_NAMESPACE)")
	flags.StringVar(&f.node, "node", "", "the node's name in the cluster (default $NODE_NAME)")
	flags.StringVar(&f.pod, "pod", "", "the agent's own pod (default $POD_NAME, or the host name)")
	flags.StringVar(&f.nodeRoot, "node-root", "/", "directory in which the node's file system is found")
	flags.StringVar(&f.certsDir, "certs-dir", "", "containerd's hosts directory on the node (default the one that is found to be read)")
	flags.BoolVar(&f.startupTaint, "remove-startup-taint", false, "take the taint "+daemon.StartupTaint+" from the node once it is configured")
	flags.StringVar(&f.checkImage, "check-image", "", "image that is pulled before and after the runtime's configuration is changed")
	flags.StringVar(&f.data, "data", "", "directory of the cache (default NODE-ROOT/var/lib/connected-registry/cache)")
	flags.StringVar(&f.containerd, "containerd", "", "containerd's socket, for the cache to read what containerd has already (default: the usual ones inside NODE-ROOT)")
	flags.StringVar(&f.cacheListen, "cache-listen", "127.0.0.1:5050", "loopback address of the cache; empty for no cache")
	flags.StringVar(&f.healthListen, "health-listen", "127.0.0.1:8082", "address of /healthz, /readyz and /metrics; empty for none")
	flags.Uint16Var(&f.peerPort, "peer-port", 0, "port at which the caches of other nodes are served, where the configuration lets nodes ask one another; 0 for none")
	flags.StringVar(&f.nodeIP, "node-ip", "", "the node's own IP address, for --peer-port (default $NODE_IP)")
	flags.StringVar(&f.peerTLS, "peer-tls", "", "directory with tls.crt, tls.key and ca.crt, by which the caches of nodes know one another")
	flags.StringVar(&f.prefetchCredentials, "prefetch-credentials", "", "directory with username and password, by which the registry lets this node prefetch what not everybody may read; read again when they are needed")
	flags.DurationVar(&f.secretGrace, "secret-grace", 10*time.Minute, "how long the certificates of a deleted Secret stay trusted")
	flags.BoolVar(&f.once, "once", false, "configure the node from --config and --ca, without Kubernetes, and end")
	flags.StringArrayVar(&f.cas, "ca", nil, "with --once: file with CA certificates of the registry; may be repeated")
}

func (f *agentFlags) cacheURL() string {
	if f.cacheListen == "" {
		return ""
	}
	return "http://" + f.cacheListen
}

func (f *agentFlags) cacheDir() string {
	return cmp.Or(f.data, filepath.Join(f.nodeRoot, daemon.CacheDir))
}

// containerdSocket is empty if there is none within reach.
func (f *agentFlags) containerdSocket() string {
	if f.containerd != "" {
		return f.containerd
	}
	for _, name := range []string{"run/containerd/containerd.sock", "run/k3s/containerd/containerd.sock"} {
		name = filepath.Join(f.nodeRoot, name)
		if info, err := os.Stat(name); err == nil && info.Mode().Type() == os.ModeSocket {
			return name
		}
	}
	return ""
}

// runOnce is for a node that joins no cluster yet.
func (f *agentFlags) runOnce(ctx context.Context, stdout, stderr io.Writer) error {
	if f.cacheListen != "" {
		if err := onLoopback(f.cacheListen); err != nil {
			return err
		}
	}
	certsDir, reserved, err := f.hostsDirectory(ctx)
	if err != nil {
		return err
	}
	changed, err := daemon.Once(ctx, daemon.OnceConfig{
		File: f.config, CAs: f.cas, NodeRoot: f.nodeRoot, CertsDir: certsDir, CacheURL: f.cacheURL(),
		Reserved: reserved, Logger: logger(stderr, v1alpha1.LogLevelWarning),
	})
	for _, path := range changed {
		fmt.Fprintln(stdout, path)
	}
	return err
}

// run is the agent of a DaemonSet.
func (f *agentFlags) run(ctx context.Context, stderr io.Writer) error {
	if len(f.cas) > 0 {
		return errors.New("--ca is for --once: certificates come from the Secrets that the configuration names")
	}
	if f.healthListen != "" {
		if err := standalone.CheckAddress(f.healthListen, "--health-listen"); err != nil {
			return err
		}
	}
	level := new(slog.LevelVar)
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	api, err := kubeConfig()
	if err != nil {
		return err
	}
	peer, err := peerAddress(cmp.Or(f.nodeIP, os.Getenv("NODE_IP")), f.peerPort)
	if err != nil {
		return err
	}
	host, _ := os.Hostname() // in a pod, the pod's name, unless it has the host's network
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collectors.NewGoCollector())
	config := daemon.Config{
		File: f.config, API: api, NodeRoot: f.nodeRoot, CertsDir: f.certsDir,
		Runtime:   nodeRuntime{nodeRoot: f.nodeRoot, certsDir: f.certsDir, checkImage: f.checkImage, log: log},
		Namespace: cmp.Or(f.namespace, os.Getenv("POD_NAMESPACE")),
		Node:      cmp.Or(f.node, os.Getenv("NODE_NAME")),
		Pod:       cmp.Or(f.pod, os.Getenv("POD_NAME"), host),
		CacheURL:  f.cacheURL(),

		PeerAddress:        peer,
		RemoveStartupTaint: f.startupTaint,

		SecretGrace: f.secretGrace,
		Version:     version,
		Level:       level,
		Metrics:     metrics,
		Logger:      log,
	}
	gatherers := prometheus.Gatherers{metrics}
	var nodeCache *nodeCache
	if f.cacheListen != "" {
		if nodeCache, err = newNodeCache(nodeCacheConfig{
			dir: f.cacheDir(), listen: f.cacheListen, containerd: f.containerdSocket(),
			node: config.Node, peer: peer, peerTLS: f.peerTLS,
			credentials: f.prefetchCredentials, log: log,
		}); err != nil {
			return err
		}
		config.Cache = nodeCache
		gatherers = append(gatherers, nodeCache)
	}
	d, err := daemon.New(config)
	if err != nil {
		return err
	}
	g, running := errgroup.WithContext(ctx)
	if nodeCache != nil {
		g.Go(func() error {
			nodeCache.run(running)
			return nil
		})
	}
	if f.healthListen != "" {
		mux := http.NewServeMux()
		mux.HandleFunc("GET /healthz", d.Healthz)
		mux.HandleFunc("GET /readyz", d.Readyz)
		mux.Handle("GET /metrics", promhttp.HandlerFor(gatherers, promhttp.HandlerOpts{}))
		g.Go(func() error {
			serveHealth(running, f.healthListen, mux, log)
			return nil
		})
	}
	g.Go(func() error {
		keepSmall(running)
		return nil
	})
	g.Go(func() error { return d.Run(running) })
	if err := g.Wait(); err != nil {
		return err
	}
	if d.Left() {
		return daemon.RemoveCache(f.nodeRoot, f.cacheDir())
	}
	return nil
}

// serveHealth serves until ctx ends. While it cannot, the node is looked after
// all the same.
func serveHealth(ctx context.Context, addr string, handler http.Handler, log *slog.Logger) {
	server := &http.Server{Addr: addr, Handler: handler, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	for {
		err := server.ListenAndServe()
		if errors.Is(err, http.ErrServerClosed) {
			return
		}
		log.Error("probes and metrics cannot be served, which is tried again: stop what uses the address, or give another with --health-listen", "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(5 * time.Second):
		}
	}
}

func agentCleanupCommand() *cobra.Command {
	var nodeRoot, data, namespace, node string
	var all bool
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Take away everything that was written to this node",
		Long: `Takes away everything that was written to this node, by the record in
/var/lib/connected-registry/node.json, and puts back what stood there before.
The content of the cache stays, unless --all is given.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log := logger(cmd.ErrOrStderr(), v1alpha1.LogLevelInformation)
			if err := daemon.Cleanup(cmd.Context(), agent.CleanupConfig{NodeRoot: nodeRoot, Logger: log}); err != nil {
				return err
			}
			if all {
				if err := daemon.RemoveCache(nodeRoot, cmp.Or(data, filepath.Join(nodeRoot, daemon.CacheDir))); err != nil {
					return err
				}
			}
			if node == "" {
				return nil
			}
			api, err := kubeConfigOnce()
			if err == nil {
				err = explainAPI("deleting it", api.Host, daemon.DeleteLease(cmd.Context(), api, namespace, node))
			}
			if err != nil {
				log.Warn("the node is clean, but its Lease could not be deleted", "error", err)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&nodeRoot, "node-root", "/", "directory in which the node's file system is found")
	cmd.Flags().BoolVar(&all, "all", false, "remove the content of the cache too")
	cmd.Flags().StringVar(&data, "data", "", "with --all: directory of the cache (default NODE-ROOT/var/lib/connected-registry/cache)")
	cmd.Flags().StringVar(&node, "node", "", "the node's name in the cluster, to delete its Lease as well")
	cmd.Flags().StringVar(&namespace, "namespace", "connected-registry", "with --node: namespace of the Lease")
	return cmd
}

func agentUninstallCommand() *cobra.Command {
	var namespace string
	var timeout time.Duration
	var cancel bool
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Make the agents of all nodes undo what they did",
		Long: `Makes the agents of all nodes undo what they did to their nodes, and waits until
they have. It is run before the agents are removed. A node that does not answer
is named, and does not make this fail: run "agent cleanup" there.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			api, err := kubeConfigOnce()
			if err != nil {
				return err
			}
			api.Timeout = max(api.Timeout, timeout) // all nodes of a large cluster are listed
			config := daemon.UninstallConfig{API: api, Namespace: namespace, Timeout: timeout, Logger: logger(cmd.ErrOrStderr(), v1alpha1.LogLevelInformation)}
			if cancel {
				return explainAPI("calling it off", api.Host, daemon.CancelUninstall(cmd.Context(), config))
			}
			silent, err := daemon.Uninstall(cmd.Context(), config)
			for _, node := range silent {
				fmt.Fprintln(cmd.OutOrStdout(), "did not answer:", node)
			}
			return explainAPI("asking the agents to leave", api.Host, err)
		},
	}
	cmd.Flags().StringVar(&namespace, "namespace", "connected-registry", "namespace of the agents")
	cmd.Flags().DurationVar(&timeout, "timeout", 2*time.Minute, "how long to wait for the nodes")
	cmd.Flags().BoolVar(&cancel, "cancel", false, "call it off: agents configure their nodes again")
	return cmd
}
