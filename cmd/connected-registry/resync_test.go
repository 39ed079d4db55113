package main

import (
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// TestResync asks, and waits for a syncer that answers to the very value.
func TestResync(t *testing.T) {
	for state, want := range map[v1alpha1.SyncState]string{v1alpha1.SyncStateSucceeded: "", v1alpha1.SyncStateFailed: "ended as Failed: no parent"} {
		t.Run(string(state), func(t *testing.T) {
			scheme := runtime.NewScheme()
			client := fake.NewSimpleDynamicClientWithCustomListKinds(scheme, map[schema.GroupVersionResource]string{connectedRegistries: "ConnectedRegistryList"},
				&unstructured.Unstructured{Object: map[string]any{
					"apiVersion": v1alpha1.APIVersion, "kind": v1alpha1.Kind,
					"metadata": map[string]any{"name": "edge", "namespace": "ns"},
				}})
			resource := client.Resource(connectedRegistries).Namespace("ns")
			looks := 0
			client.PrependReactor("get", "*", func(clienttesting.Action) (bool, runtime.Object, error) {
				object, err := client.Tracker().Get(connectedRegistries, "ns", "edge")
				if err != nil {
					return true, nil, err
				}
				u := object.(*unstructured.Unstructured).DeepCopy()
				if looks++; looks > 1 { // the syncer's answer
					u.Object["status"] = map[string]any{
						"lastResync":         u.GetAnnotations()[v1alpha1.AnnotationResync],
						"registrySyncResult": map[string]any{"syncState": string(state), "error": "no parent"},
						"repositories":       []any{map[string]any{"name": "app", "tagsWanted": int64(2), "tagsPresent": int64(1), "bytesLeft": int64(7)}},
					}
				}
				return true, u, nil
			})
			var out strings.Builder
			err := resync{resource, "edge", "host"}.run(t.Context(), time.Minute, &out)
			if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("error %v", err)
			}
			if got, want := out.String(), "app: 1 of 2 tags present, 7 bytes left\n"+string(state)+"\n"; got != want {
				t.Errorf("printed %q, want %q", got, want)
			}
		})
	}
}
