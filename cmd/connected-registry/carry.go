package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/standalone"
)

func exportCommand() *cobra.Command {
	var config standalone.CarryConfig
	var objects storageFlag
	cmd := &cobra.Command{
		Use:   "export FILE [REPOSITORY[:TAG]...]",
		Short: "Write content to an archive, for a machine without a network",
		Long: `Writes what the data directory of a standalone registry holds, or the object
store that --storage names, to FILE, an OCI image layout in a tar archive, or only
the repositories and tags that are named; both may be globs. An export that was
interrupted goes on where it was. The registry may go on running.`,
		Args: fileArg(-1),
		RunE: func(cmd *cobra.Command, args []string) error {
			wanted, err := v1alpha1.ParseReferenceGlobs(args[1:])
			if err != nil {
				return err
			}
			if config.Bucket, err = objects.open(cmd.Context()); err != nil {
				return err
			}
			config.File = args[0]
			bar := newByteBar(cmd.ErrOrStderr(), "exporting")
			result, err := standalone.Export(cmd.Context(), config, wanted, bar.set)
			bar.close()
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			fmt.Fprintf(out, "%s: %d tags, %d referrers, %d blobs, %d bytes, %d of them there already\n",
				config.File, result.Tags, result.Referrers, result.Blobs, result.Bytes, result.Resumed)
			if result.Left > 0 {
				fmt.Fprintf(out, "%d images of other platforms are listed and not here\n", result.Left)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&config.Data, "data", "/var/lib/connected-registry", "data directory of the registry; with --storage, what is on its way there")
	objects.register(cmd)
	return cmd
}

func importCommand() *cobra.Command {
	var config standalone.CarryConfig
	var objects storageFlag
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Bring the content of an archive here",
		Long: `Brings everything in FILE, which export wrote, or in an image layout unpacked to a
directory, into the data directory of a standalone registry that is not running,
or into the object store that --storage names, whose registry may go on running.
Every byte is checked; an import that was interrupted goes on where it was.`,
		Args: fileArg(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if config.Bucket, err = objects.open(cmd.Context()); err != nil {
				return err
			}
			config.File = args[0]
			progress := newProgress(cmd.OutOrStdout())
			result, err := standalone.Import(cmd.Context(), config, progress.event)
			progress.close()
			if !result.Start.IsZero() {
				printResult(cmd.OutOrStdout(), result)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&config.Data, "data", "/var/lib/connected-registry", "data directory of the registry; with --storage, what is on its way there")
	objects.register(cmd)
	return cmd
}
