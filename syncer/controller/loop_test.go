package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	metadatafake "k8s.io/client-go/metadata/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/syncer/certificates"
)

// noCertificates stands in for what has tests of its own.
type noCertificates struct{}

func (noCertificates) Reconcile(context.Context, *v1alpha1.ConnectedRegistry, certificates.Service) (certificates.Result, error) {
	return settled(metav1.ConditionTrue, "Issued"), nil
}

// world is an API server in memory. Its watches bring nothing: what wakes the
// controller is tested against a real one.
type world struct {
	t       *testing.T
	kube    *fake.Clientset
	dynamic *dynamicfake.FakeDynamicClient
	config  Config
}

// listKinds are those of everything that is asked for by the dynamic client.
func listKinds() map[schema.GroupVersionResource]string {
	kinds := map[schema.GroupVersionResource]string{registries: "ConnectedRegistryList"}
	for _, k := range workloadKinds {
		kinds[k.resource] = k.resource.Resource + "List"
	}
	return kinds
}

// newWorld holds a resource, whose spec is in YAML, and the replicas' Service.
func newWorld(t *testing.T, data, spec string) *world {
	t.Helper()
	cr := load(t, spec)
	object, err := runtime.DefaultUnstructuredConverter.ToUnstructured(cr)
	if err != nil {
		t.Fatal(err)
	}
	scheme := runtime.NewScheme()
	metav1.AddMetaToScheme(scheme)
	w := &world{
		t: t,
		kube: fake.NewClientset(&corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "site", Name: "connected-registry"},
			Spec:       corev1.ServiceSpec{ClusterIP: "10.96.0.50", Ports: []corev1.ServicePort{{Name: "https", Port: 443}}},
		}),
		dynamic: dynamicfake.NewSimpleDynamicClientWithCustomListKinds(scheme,
			listKinds(), &unstructured.Unstructured{Object: object}),
	}
	w.config = Config{
		Client: w.kube, Dynamic: w.dynamic, Metadata: metadatafake.NewSimpleMetadataClient(scheme),
		Namespace: "site", Name: "connected-registry", Service: "connected-registry",
		Identity: "one", Data: data, Version: "v1.2.3", Certificates: noCertificates{},
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	return w
}

// run starts a controller; stop ends it and returns its error.
func (w *world) run(config Config) (stop func() error) {
	w.t.Helper()
	c, err := New(config)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(w.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	return func() error {
		cancel()
		return <-ended
	}
}

// secret is a Secret; nil: there is none.
func (w *world) secret(name string) *corev1.Secret {
	w.t.Helper()
	s, err := w.kube.CoreV1().Secrets("site").Get(w.t.Context(), name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func (w *world) status() v1alpha1.Status {
	w.t.Helper()
	object, err := w.dynamic.Resource(registries).Namespace("site").Get(w.t.Context(), "connected-registry", metav1.GetOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	var cr v1alpha1.ConnectedRegistry
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, &cr); err != nil {
		w.t.Fatal(err)
	}
	return cr.Status
}

// setSpec merges JSON into the spec.
func (w *world) setSpec(merge string) {
	w.t.Helper()
	object, err := w.dynamic.Resource(registries).Namespace("site").Get(w.t.Context(), "connected-registry", metav1.GetOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal([]byte(merge), &fields); err != nil {
		w.t.Fatal(err)
	}
	for key, value := range fields {
		object.Object["spec"].(map[string]any)[key] = value
	}
	if _, err := w.dynamic.Resource(registries).Namespace("site").Update(w.t.Context(), object, metav1.UpdateOptions{}); err != nil {
		w.t.Fatal(err)
	}
}

// writes are those of a kind, apart from the election's.
func writes(actions []clienttesting.Action) (all []string) {
	for _, a := range actions {
		switch a.GetVerb() {
		case "get", "list", "watch":
			continue
		}
		if a.GetResource().Resource != "leases" {
			all = append(all, fmt.Sprint(a.GetVerb(), " ", a.GetResource().Resource, "/", a.GetSubresource()))
		}
	}
	return all
}

func TestLoop(t *testing.T) {
	data := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, data, "  mode: ReadWrite\n")
		stop := w.run(w.config)
		time.Sleep(10 * time.Second)
		status := w.status()
		if !meta.IsStatusConditionTrue(status.Conditions, v1alpha1.ConditionReady) || status.LoginServer == nil || status.LoginServer.Host != "10.96.0.50" {
			t.Fatalf("status: %+v", status)
		}
		replica, err := w.kube.CoreV1().Secrets("site").Get(t.Context(), ReplicaSecret, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v1alpha1.Load(keyResource, replica.Data[keyResource]); err != nil {
			t.Error(err)
		}
		if _, err := w.kube.CoreV1().ConfigMaps("site").Get(t.Context(), NodeConfigMap, metav1.GetOptions{}); err != nil {
			t.Error(err)
		}

		// An hour in which nothing happens.
		w.kube.ClearActions()
		w.dynamic.ClearActions()
		time.Sleep(time.Hour)
		if all := append(writes(w.kube.Actions()), writes(w.dynamic.Actions())...); len(all) > 0 {
			t.Errorf("nothing changed, and this was written: %v", all)
		}

		w.setSpec(`{"clientTokens": [{"name": "bad name", "secretRef": {"name": "x"}, "scopeMap": []}]}`)
		time.Sleep(resyncInterval + 10*time.Second)
		if status := w.status(); !meta.IsStatusConditionFalse(status.Conditions, v1alpha1.ConditionAccepted) {
			t.Errorf("an invalid resource: %+v", status.Conditions)
		}
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}

		// Another leader, which never saw the valid one, goes on from what
		// replicas were told.
		stop = w.run(w.config)
		time.Sleep(10 * time.Second)
		now, err := w.kube.CoreV1().Secrets("site").Get(t.Context(), ReplicaSecret, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if string(now.Data[keyResource]) != string(replica.Data[keyResource]) || string(now.Data[keySecret]) != string(replica.Data[keySecret]) {
			t.Errorf("replicas are told otherwise: %s", now.Data[keyResource])
		}
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}
	})
}

// TestDeadWorkersStatus has a new leader find that a synchronisation goes on.
func TestDeadWorkersStatus(t *testing.T) {
	data := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, data, "  suspend: false\n")
		object, err := w.dynamic.Resource(registries).Namespace("site").Get(t.Context(), "connected-registry", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		object.Object["status"] = map[string]any{
			"connectionState":    "Syncing",
			"registrySyncResult": map[string]any{"syncState": "Syncing", "lastSyncStartTime": "2026-01-02T03:04:05Z"},
		}
		if _, err := w.dynamic.Resource(registries).Namespace("site").UpdateStatus(t.Context(), object, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		stop := w.run(w.config)
		time.Sleep(10 * time.Second)
		if s := w.status(); s.ConnectionState == v1alpha1.ConnectionStateSyncing || s.RegistrySyncResult.SyncState == v1alpha1.SyncStateSyncing {
			t.Errorf("status: %+v, %+v", s, s.RegistrySyncResult)
		}
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}
	})
}

// TestElection loses the lease because the API server is away, and gives it back
// when asked to end.
func TestElection(t *testing.T) {
	data := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, data, "  mode: ReadOnly\n")
		var away atomic.Bool
		w.kube.PrependReactor("*", "leases", func(clienttesting.Action) (bool, runtime.Object, error) {
			return away.Load(), nil, errors.New("no route to host")
		})
		c, err := New(w.config)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- c.Run(t.Context()) }()
		time.Sleep(time.Minute)
		lease, err := w.kube.CoordinationV1().Leases("site").Get(t.Context(), Lease, metav1.GetOptions{})
		if err != nil || *lease.Spec.HolderIdentity != "one" {
			t.Fatalf("lease %v, error %v", lease, err)
		}

		away.Store(true)
		if err := <-ended; !errors.Is(err, ErrLost) {
			t.Errorf("ended with %v", err)
		}
		if left := time.Until(lease.Spec.RenewTime.Add(time.Duration(*lease.Spec.LeaseDurationSeconds) * time.Second)); left <= 0 {
			t.Errorf("ended %s after another may lead", -left)
		}

		away.Store(false)
		other := w.config
		other.Identity = "other"
		stop := w.run(other)
		time.Sleep(time.Minute)
		if err := stop(); err != nil {
			t.Errorf("ended with %v", err)
		}
		lease, err = w.kube.CoordinationV1().Leases("site").Get(t.Context(), Lease, metav1.GetOptions{})
		if err != nil || lease.Spec.HolderIdentity != nil && *lease.Spec.HolderIdentity != "" {
			t.Errorf("the lease was not given back: %+v, %v", lease.Spec, err)
		}
	})
}

func TestNew(t *testing.T) {
	w := newWorld(t, t.TempDir(), "  {}\n")
	for _, test := range []struct {
		change func(*Config)
		want   string
	}{
		{func(c *Config) { c.Client = nil }, "Client"},
		{func(c *Config) { c.Namespace = "" }, "Namespace"},
		{func(c *Config) { c.Identity = "" }, "Identity"},
		{func(c *Config) { c.Data = "" }, "Data"},
	} {
		config := w.config
		test.change(&config)
		if _, err := New(config); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("error %v, expected one with %s", err, test.want)
		}
	}
}
