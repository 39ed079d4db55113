// Command machine is what runs inside a test cluster's machines: their process
// 1, the process that holds a pod's namespaces, and the provisioner of the
// shared volumes. It is one program so that one build serves all three.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/connected-registry/connected-registry/test/cluster/internal/machine"
	"github.com/connected-registry/connected-registry/test/cluster/internal/provisioner"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "machine:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("want init, pause or provision")
	}
	switch args[0] {
	case "init":
		return initialize(args[1:])
	case "pause":
		machine.Pause()
		return nil
	case "provision":
		return provision(args[1:])
	default:
		return fmt.Errorf("unknown command %q: want init, pause or provision", args[0])
	}
}

// initialize reads the specification before the machine's root changes.
func initialize(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("init wants the path of a specification")
	}
	data, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	var spec machine.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		return fmt.Errorf("reading %s: %w", args[0], err)
	}
	return machine.Init(spec)
}

func provision(args []string) error {
	var config provisioner.Config
	flags := flag.NewFlagSet("provision", flag.ContinueOnError)
	flags.StringVar(&config.Server, "server", "", "address of the API server")
	flags.StringVar(&config.CAFile, "ca", "", "certificate authority of the API server")
	flags.StringVar(&config.CertFile, "cert", "", "client certificate")
	flags.StringVar(&config.KeyFile, "key", "", "key of the client certificate")
	flags.StringVar(&config.Class, "class", "", "name of the storage class")
	flags.StringVar(&config.Dir, "dir", "", "where volumes are made, here")
	flags.StringVar(&config.NodeDir, "node-dir", "", "where nodes see that directory")
	if err := flags.Parse(args); err != nil {
		return err
	}
	p, err := provisioner.New(config)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return p.Run(ctx)
}
