// Command connected-registry keeps the images that a cluster or a machine needs
// next to the nodes that run them. See README.md.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	// Images built from scratch hold no certificates: Go then takes these.
	_ "golang.org/x/crypto/x509roots/fallback"
)

// version is set by the linker.
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "connected-registry:", err)
		os.Exit(1)
	}
}

// run is the program without the process around it. A nil error is a success,
// or an end that ctx asked for.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := group("connected-registry", "Keeps the images that nodes need next to the nodes that run them")
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w: see %q", err, cmd.CommandPath()+" --help")
	})
	root.SetHelpCommand(helpCommand())
	root.AddCommand(
		standaloneCommand(),
		syncCommand(),
		exportCommand(),
		importCommand(),
		resyncCommand(),
		registryCommand(),
		syncerCommand(),
		agentCommand(),
		doctorCommand(),
		probeCommand(),
		versionCommand(),
	)
	return root.ExecuteContext(ctx)
}

// group is a command that only holds others. By itself it shows its help;
// anything that is none of its commands is a mistake, which cobra alone lets
// pass below the root.
func group(use, short string) *cobra.Command {
	return &cobra.Command{
		Use:   use,
		Short: short,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			return fmt.Errorf("unknown command %q: see %q", args[0], cmd.CommandPath()+" --help")
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
}

// noArgs refuses arguments. What cobra says of them takes them for commands.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return fmt.Errorf("%q is too much: %s takes flags only: see %q", args[0], cmd.CommandPath(), cmd.CommandPath()+" --help")
}

// fileArg wants a FILE, and no more than most arguments; -1: any number.
func fileArg(most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) == 0 || args[0] == "":
			return fmt.Errorf("FILE is missing: name the archive: see %q", cmd.CommandPath()+" --help")
		case most >= 0 && len(args) > most:
			return fmt.Errorf("%q is too much: %s takes one FILE: see %q", args[most], cmd.CommandPath(), cmd.CommandPath()+" --help")
		}
		return nil
	}
}

// helpCommand is cobra's, but for a command that there is not.
func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Help about a command",
		RunE: func(cmd *cobra.Command, args []string) error {
			found, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return fmt.Errorf("unknown command %q: see %q", strings.Join(args, " "), cmd.Root().CommandPath()+" --help")
			}
			found.InitDefaultHelpFlag()
			return found.Help()
		},
	}
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintln(cmd.OutOrStdout(), version)
		},
	}
}
