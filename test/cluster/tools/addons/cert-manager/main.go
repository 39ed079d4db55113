// Command cert-manager is the programs of cert-manager in one: the controllers
// that serve issuers with a key of their own, the webhook, the injector of
// authorities, and the check that the chart runs after an installation. Each
// takes the flags that the chart gives it, and passes over those that have no
// part here.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "cert-manager:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("want controller, webhook, cainjector or startupapicheck")
	}
	ctrl.SetLogger(klog.Background())
	flags := pflag.NewFlagSet(args[0], pflag.ContinueOnError)
	flags.ParseErrorsAllowlist.UnknownFlags = true
	switch args[0] {
	case "controller":
		return controllers(ctx, flags, args[1:])
	case "webhook":
		return webhook(ctx, flags, args[1:])
	case "cainjector":
		return injector(ctx, flags, args[1:])
	case "startupapicheck":
		return check(ctx, flags, args[1:])
	default:
		return fmt.Errorf("unknown command %q: want controller, webhook, cainjector or startupapicheck", args[0])
	}
}
