// Command cluster runs a real Kubernetes cluster on this machine for a person:
// it brings one up and leaves it up, adds nodes, and takes it down.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/connected-registry/connected-registry/test/cluster"
)

const usage = `usage: cluster [flags] build | up | down | status | add-node | load IMAGE.tar

  build     compile what a cluster is made of, which up does by itself
  up        start a cluster and leave it running
  down      end it, and clean up after others that were cut off
  status    show the machines and their services
  add-node  add a node
  load      import an image archive into every node

`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("cluster", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
	}
	config := cluster.Config{Name: "dev", Log: slog.New(slog.NewTextHandler(stderr, nil))}
	flags.StringVar(&config.Name, "name", config.Name, "name of the cluster")
	flags.StringVar(&config.Dir, "dir", "", "directory for programs and clusters (default: in the user's cache directory)")
	flags.IntVar(&config.Nodes, "nodes", 2, "how many nodes to start with")
	flags.BoolVar(&config.CertManager, "cert-manager", false, "run cert-manager's controllers")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	switch flags.Arg(0) {
	case "build":
		return cluster.Build(ctx, config)
	case "up":
		return up(ctx, config, stdout)
	case "down":
		return cluster.Down(ctx, config)
	case "status":
		return withCluster(ctx, config, func(c *cluster.Cluster) error { return status(ctx, c, stdout) })
	case "add-node":
		return withCluster(ctx, config, func(c *cluster.Cluster) error {
			if _, err := c.AddNode(ctx); err != nil {
				return err
			}
			return c.Detach(ctx)
		})
	case "load":
		return withCluster(ctx, config, func(c *cluster.Cluster) error { return c.LoadImage(ctx, flags.Arg(1)) })
	default:
		flags.Usage()
		return fmt.Errorf("unknown command %q", flags.Arg(0))
	}
}

func up(ctx context.Context, config cluster.Config, stdout io.Writer) error {
	c, err := cluster.New(ctx, config)
	if err != nil {
		return err
	}
	if err := c.Detach(ctx); err != nil {
		return errors.Join(err, c.Close())
	}
	return tell(c, stdout)
}

// tell prints what a shell needs to use the cluster, and nothing else, so that
// it can be evaluated.
func tell(c *cluster.Cluster, stdout io.Writer) error {
	kubectl, err := c.Program("kubectl")
	if err != nil {
		return err
	}
	helm, err := c.Program("helm")
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "export KUBECONFIG=%s\n", c.Kubeconfig())
	fmt.Fprintf(stdout, "alias kubectl=%s helm=%s\n", kubectl, helm)
	return nil
}

func withCluster(ctx context.Context, config cluster.Config, do func(*cluster.Cluster) error) error {
	c, err := cluster.Open(ctx, config)
	if err != nil {
		return err
	}
	return do(c)
}

func status(ctx context.Context, c *cluster.Cluster, stdout io.Writer) error {
	all, err := c.Status(ctx)
	if err != nil {
		return err
	}
	for _, m := range all {
		fmt.Fprintf(stdout, "%s %s %s\n", m.Name, m.IP, map[bool]string{true: "running", false: "stopped"}[m.Running])
		for _, s := range m.Services {
			fmt.Fprintf(stdout, "  %s pid %d, ended unasked %d times\n", s.Name, s.PID, s.Exits)
		}
	}
	return tell(c, stdout)
}
