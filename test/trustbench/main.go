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
	"runtime"
	"slices"
	"syscall"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/connected-registry/connected-registry/test/cluster"
)

func main() {
	var o options
	flag.IntVar(&o.changes, "changes", 100, "how often the Secret changes on the two nodes; 0 leaves them out")
	flag.IntVar(&o.agents, "agents", 1000, "how many agents the large part has")
	flag.IntVar(&o.agentChanges, "agent-changes", 20, "how often the Secret changes there")
	flag.StringVar(&o.profile, "profile", "", "file for a CPU profile of the many agents")
	check := flag.Bool("check", false, "exit with status 1 when a bound was missed")
	verbose := flag.Bool("v", false, "tell of the steps")
	flag.Parse()
	o.log = slog.New(slog.DiscardHandler)
	if *verbose {
		o.log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	missed, err := bench(ctx, o, os.Stdout)
	stop()
	if err == nil && *check && missed > 0 {
		err = fmt.Errorf("%d bounds were missed", missed)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "trustbench:", err)
		os.Exit(1)
	}
}

type options struct {
	changes, agents, agentChanges int
	profile                       string
	log                           *slog.Logger
}

// bench runs both parts on one cluster and returns how many bounds were missed.
func bench(ctx context.Context, o options, out io.Writer) (missed int, err error) {
	nodes := 2
	if o.changes == 0 {
		nodes = -1
	}
	c, err := cluster.New(ctx, cluster.Config{Name: fmt.Sprintf("trust-%d", os.Getpid()), Nodes: nodes, Log: o.log})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		return 0, err
	}
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		return 0, err
	}
	fmt.Fprintf(out, "%d processors\n%-44s %8s %8s %8s %8s   %s\n", runtime.NumCPU(), "from a Secret's change to trust on the node", "samples", "p50", "p99", "worst", "bound")
	if o.changes > 0 {
		two, err := twoNodes(ctx, o, c, kube)
		if err != nil {
			return 0, fmt.Errorf("two nodes: %w", err)
		}
		missed += two.print(out, "two nodes, installed by helm", time.Second)
	}
	many, err := manyAgents(ctx, o, config, kube)
	if err != nil {
		return missed, fmt.Errorf("%d agents: %w", o.agents, err)
	}
	missed += many.print(out, fmt.Sprintf("%d agents on one API server", o.agents), 3*time.Second)
	missed += many.printLoad(out, o.agents)
	return missed, nil
}

// result is what was measured.
type result struct {
	took []time.Duration
	// watches is how many watches on Secrets the agents brought; asked is how
	// often Secrets were asked for otherwise while nothing changed.
	watches, asked int
}

func (r result) print(out io.Writer, name string, bound time.Duration) (missed int) {
	slices.Sort(r.took)
	at := func(p float64) time.Duration { return r.took[min(len(r.took)-1, int(p*float64(len(r.took))))] }
	verdict := "met"
	if at(0.99) >= bound {
		verdict, missed = "MISSED", 1
	}
	ms := func(d time.Duration) string { return d.Round(time.Millisecond).String() }
	fmt.Fprintf(out, "%-44s %8d %8s %8s %8s   p99 < %v: %s\n", name, len(r.took), ms(at(0.5)), ms(at(0.99)), ms(r.took[len(r.took)-1]), bound, verdict)
	return missed
}

func (r result) printLoad(out io.Writer, agents int) (missed int) {
	verdict := "met"
	if r.watches != agents || r.asked != 0 {
		verdict, missed = "MISSED", 1
	}
	fmt.Fprintf(out, "%-44s %d watches, %d other requests for Secrets in %v   one watch each, no polling: %s\n", "at rest", r.watches, r.asked, restTime, verdict)
	return missed
}

// own is a client configuration whose connections are shared with no other.
func own(config *rest.Config) *rest.Config {
	config = rest.CopyConfig(config)
	config.Dial = dialer()
	return config
}
