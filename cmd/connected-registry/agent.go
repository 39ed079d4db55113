package main

import (
	"github.com/spf13/cobra"

	"github.com/connected-registry/connected-registry/agent"
	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

func agentCommand() *cobra.Command {
	cmd := group("agent", "Look after one node")
	cmd.AddCommand(agentCleanupCommand())
	return cmd
}

func agentCleanupCommand() *cobra.Command {
	var nodeRoot string
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Take away everything that was written to this node",
		Long: `Takes away everything that was written to this node, by the record in
/var/lib/connected-registry/node.json, and puts back what stood there before.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return agent.Cleanup(cmd.Context(), agent.CleanupConfig{
				NodeRoot: nodeRoot,
				Logger:   logger(cmd.ErrOrStderr(), v1alpha1.LogLevelInformation),
			})
		},
	}
	cmd.Flags().StringVar(&nodeRoot, "node-root", "/", "directory in which the node's file system is found")
	return cmd
}
