package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/standalone"
	"github.com/connected-registry/connected-registry/syncer"
)

func syncCommand() *cobra.Command {
	var flags resourceFlags
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "sync",
		Short: "Synchronise once, now",
		Long: `Brings everything that the configuration selects and the data directory lacks
from the parent, once, and exits with an error if anything is missing after it.
It works on the data directory of a standalone registry that is not running.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := flags.load(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			progress := newProgress(cmd.OutOrStdout())
			defer progress.close()
			config.Progress = progress.event
			if config.Resource.Spec.LogLevel != v1alpha1.LogLevelDebug {
				// What the log would say is what this command prints.
				config.Logger = nil
			}
			s, err := standalone.Open(cmd.Context(), config)
			if err != nil {
				return err
			}
			defer s.Close()
			if s.Syncer == nil {
				return errors.New("nothing to synchronise from: set spec.parent.endpoint")
			}
			if dryRun {
				progress.close()
				plan, err := s.Syncer.Plan(cmd.Context())
				if err != nil {
					return err
				}
				return printPlan(cmd.OutOrStdout(), plan)
			}
			result, err := s.Syncer.Sync(cmd.Context(), v1alpha1.SyncTriggerManual)
			progress.close()
			printResult(cmd.OutOrStdout(), result)
			return err
		},
	}
	flags.register(cmd)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print what would be done and do nothing")
	return cmd
}

// nothingSelected is no error: what is selected may come to be.
const nothingSelected = "the parent lists no repository that the configuration selects: correct its repositories, or let the credentials list more"

// printPlan prints a line for each tag and repository, and returns an error
// when some of it cannot be planned.
func printPlan(w io.Writer, plan *syncer.Plan) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	var errs []error
	fmt.Fprintln(t, "REPOSITORY\tTAG\tACTION\tDIGEST")
	var bytes int64
	var blobs int
	for _, r := range plan.Repositories {
		errs = append(errs, r.Err)
		blobs, bytes = blobs+r.Blobs, bytes+r.Bytes
		for _, tag := range r.Tags {
			errs = append(errs, tag.Err)
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", r.Name, tag.Name, tag.Action, tag.Digest)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(plan.Repositories) == 0 {
		fmt.Fprintln(w, nothingSelected)
	}
	fmt.Fprintf(w, "%d blobs, %d bytes to fetch\n", blobs, bytes)
	return errors.Join(errs...)
}

func printResult(w io.Writer, r syncer.Result) {
	if len(r.Repositories) == 0 {
		fmt.Fprintln(w, nothingSelected)
	}
	for _, repo := range r.Repositories {
		fmt.Fprintf(w, "%s: %d of %d tags present, %d bytes left\n", repo.Name, repo.TagsPresent, repo.TagsWanted, repo.BytesLeft)
		if repo.Held != "" {
			fmt.Fprintf(w, "%s: nothing removed: %s\n", repo.Name, repo.Held)
		}
	}
	fmt.Fprintf(w, "%s: %d blobs, %d bytes fetched in %s\n", r.State, r.BlobsFetched, r.BytesFetched, r.End.Sub(r.Start).Round(time.Millisecond))
}
