package syncer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// secretMap holds Secrets by "name/key".
type secretMap map[string]string

func (m secretMap) Secret(_ context.Context, name, key string) ([]byte, error) {
	value, ok := m[name+"/"+key]
	if !ok {
		return nil, fmt.Errorf("Secret %s: key %s: %w", name, key, fs.ErrNotExist)
	}
	return []byte(value), nil
}

func loadSpec(t *testing.T, spec string) *v1alpha1.Spec {
	t.Helper()
	r, err := v1alpha1.Load("test.yaml", []byte("apiVersion: connectedregistry.io/v1alpha1\nkind: ConnectedRegistry\nmetadata: {name: edge}\nspec:\n"+spec))
	if err != nil {
		t.Fatal(err)
	}
	return &r.Spec
}

func TestResolve(t *testing.T) {
	secrets := secretMap{
		"basic/username":         "robot\n",
		"basic/password":         "pass word\n",
		"hub/.dockerconfigjson":  `{"auths":{"https://index.docker.io/v1/":{"auth":"cm9ib3Q6cGFzczp3b3Jk"}}}`,
		"azure/connectionString": "ConnectedRegistryName=edge;SyncTokenName=edge-sync;SyncTokenPassword=pw;ParentGatewayEndpoint=contoso.eastus.data.azurecr.io;ParentEndpointProtocol=https\n",
	}
	type result struct{ Namespace, Server, Endpoint, Username, Password string }
	for _, test := range []struct {
		name string
		spec string
		want result
	}{
		{"anonymous", "  parent: {endpoint: registry.example.com}\n", result{"registry.example.com", "https://registry.example.com", "registry.example.com", "", ""}},
		{"plain HTTP", "  parent: {endpoint: \"10.0.0.1:5000\", insecure: true}\n", result{"10.0.0.1:5000", "http://10.0.0.1:5000", "10.0.0.1:5000", "", ""}},
		{"Basic", "  parent: {endpoint: \"https://registry.example.com\", credentialsSecretRef: {name: basic}}\n", result{"registry.example.com", "https://registry.example.com", "registry.example.com", "robot", "pass word"}},
		{"Docker Hub", "  parent: {endpoint: docker.io, credentialsSecretRef: {name: hub}}\n", result{"docker.io", "https://registry-1.docker.io", "registry-1.docker.io", "robot", "pass:word"}},
		{"connection string", "  parent: {connectionStringSecretRef: {name: azure}}\n", result{"contoso.azurecr.io", "https://contoso.azurecr.io", "contoso.azurecr.io", "edge-sync", "pw"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, err := Resolve(t.Context(), loadSpec(t, test.spec).Parent, secrets)
			if err != nil {
				t.Fatal(err)
			}
			got := result{s.Namespace, s.Server, s.Endpoint, s.Username, s.Password}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestFromSpec(t *testing.T) {
	spec := loadSpec(t, `  parent: {endpoint: registry.example.com}
  repositories: [{name: team/app}]
  sync: {schedule: "*/5 * * * *", window: PT2H, concurrency: 3, referrers: false, deletePropagation: true, maxRemovals: 7}
`)
	config, source, err := FromSpec(t.Context(), spec, secretMap{})
	if err != nil {
		t.Fatal(err)
	}
	if source == nil || source.Namespace != "registry.example.com" {
		t.Errorf("source %v", source)
	}
	if config.Parent.Endpoint != "registry.example.com" || config.Schedule != "*/5 * * * *" || config.Window != 2*time.Hour ||
		config.Concurrency != 3 || config.Referrers || !config.DeletePropagation || config.MaxRemovals != 7 || len(config.Repositories) != 1 {
		t.Errorf("config %+v", config)
	}
	if _, source, err = FromSpec(t.Context(), loadSpec(t, "  mode: ReadWrite\n"), secretMap{}); err != nil || source != nil {
		t.Errorf("without a parent: source %v, error %v", source, err)
	}
	_, _, err = FromSpec(t.Context(), loadSpec(t, "  parent: {endpoint: registry.example.com, credentialsSecretRef: {name: absent}}\n"), secretMap{})
	if err == nil || !strings.Contains(err.Error(), "Secret absent: key username") {
		t.Errorf("error %v does not name the Secret that is missing", err)
	}
}

func TestBefore(t *testing.T) {
	before := v1alpha1.Status{
		ConnectionState:    v1alpha1.ConnectionStateSyncing,
		LastSyncTime:       new(metav1.Now()),
		RegistrySyncResult: &v1alpha1.RegistrySyncResult{SyncState: v1alpha1.SyncStateSyncing, SyncTrigger: v1alpha1.SyncTriggerSchedule},
		Repositories:       []v1alpha1.RepositoryStatus{{Name: "team/app", TagsWanted: 2, TagsPresent: 1}},
	}
	s := newFixtureAt(t, t.TempDir(), newTestParent(t), func(c *Config) { c.Before = before })
	got := s.Status()
	if got.ConnectionState == v1alpha1.ConnectionStateSyncing || got.RegistrySyncResult.SyncState != v1alpha1.SyncStateFailed || got.RegistrySyncResult.Error == "" {
		t.Errorf("a synchronisation whose worker ended is still under way: %+v", got)
	}
	if !got.LastSyncTime.Equal(before.LastSyncTime) || len(got.Repositories) != 1 {
		t.Errorf("what was known is lost: %+v", got)
	}
	if before.RegistrySyncResult.SyncState != v1alpha1.SyncStateSyncing {
		t.Error("the caller's status was changed")
	}
}

func TestFinish(t *testing.T) {
	s := newFixture(t, newTestParent(t))
	if err := s.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Sync(ctx, v1alpha1.SyncTriggerManual); !errors.Is(err, context.Canceled) {
		t.Errorf("a synchronisation began after Finish: %v", err)
	}
	if err := s.Finish(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Finish did not end with its context: %v", err)
	}
}
