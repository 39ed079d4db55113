package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// connectedRegistries names the resource to the API server.
var connectedRegistries = schema.GroupVersionResource{Group: v1alpha1.Group, Version: v1alpha1.Version, Resource: "connectedregistries"}

func resyncCommand() *cobra.Command {
	var namespace, name string
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "resync",
		Short: "Ask for a synchronisation now, in a cluster",
		Long: `Asks the syncer of a cluster for a synchronisation now, in which removals that
were held for their number are carried out and blobs that were wrong are tried
again. It reaches the API server as kubectl does. (On one machine, "sync" does
that itself.)`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rules := clientcmd.NewDefaultClientConfigLoadingRules()
			loaded := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{})
			config, err := loaded.ClientConfig()
			if clientcmd.IsEmptyConfig(err) {
				return errors.New("no cluster is named: set $KUBECONFIG to the kubeconfig of one")
			}
			if err != nil {
				return fmt.Errorf("reading the kubeconfig: %w: set $KUBECONFIG to that of a cluster", err)
			}
			config.Timeout = apiPatience
			if namespace == "" {
				if namespace, _, err = loaded.Namespace(); err != nil {
					return fmt.Errorf("choosing a namespace: %w: give one with --namespace", err)
				}
			}
			client, err := dynamic.NewForConfig(config)
			if err != nil {
				return fmt.Errorf("client of the API server: %w", err)
			}
			r := resync{client.Resource(connectedRegistries).Namespace(namespace), name, config.Host}
			return r.run(cmd.Context(), wait, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&namespace, "namespace", "", "namespace of the ConnectedRegistry (default that of the current context)")
	cmd.Flags().StringVar(&name, "name", "connected-registry", "name of the ConnectedRegistry")
	cmd.Flags().DurationVar(&wait, "wait", 0, "how long to wait for its end; 0 to ask and leave")
	return cmd
}

type resync struct {
	client dynamic.ResourceInterface
	name   string // of the ConnectedRegistry
	host   string // of the API server
}

// run puts a value into the annotation that was not there before, and waits
// until the status says that it was carried out.
func (r resync) run(ctx context.Context, wait time.Duration, out io.Writer) error {
	value := time.Now().UTC().Format(time.RFC3339Nano)
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{v1alpha1.AnnotationResync: value}}})
	if err != nil {
		return err
	}
	if _, err := r.client.Patch(ctx, r.name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "connected-registry"}); err != nil {
		return explainAPI("asking for a synchronisation", r.host, err)
	}
	if wait == 0 {
		fmt.Fprintf(out, "asked %s for a synchronisation\n", r.name)
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("it has not ended within %s and goes on: wait longer with --wait, or look at its status and at the log of the syncer", wait))
	defer cancel()
	for {
		object, err := r.client.Get(ctx, r.name, metav1.GetOptions{})
		if err != nil && ctx.Err() == nil {
			return explainAPI("reading the status", r.host, err)
		}
		if err == nil {
			var cr v1alpha1.ConnectedRegistry
			if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, &cr); err != nil {
				return fmt.Errorf("reading the status: %w", err)
			}
			if cr.Status.LastResync == value {
				return outcome(cr.Status, out)
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Second):
		}
	}
}

// outcome prints how the last synchronisation ended.
func outcome(s v1alpha1.Status, out io.Writer) error {
	for _, r := range s.Repositories {
		fmt.Fprintf(out, "%s: %d of %d tags present, %d bytes left\n", r.Name, r.TagsPresent, r.TagsWanted, r.BytesLeft)
	}
	r := s.RegistrySyncResult
	if r == nil {
		return errors.New("the status does not say how it ended")
	}
	fmt.Fprintln(out, r.SyncState)
	if r.SyncState != v1alpha1.SyncStateSucceeded {
		return fmt.Errorf("the synchronisation ended as %s: %s", r.SyncState, r.Error)
	}
	return nil
}
