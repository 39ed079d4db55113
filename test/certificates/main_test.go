package certificates_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/test/cluster"
)

const (
	namespace = "registry"
	// patience is how long anything is waited for: other work may share the
	// processors.
	patience = 4 * time.Minute
)

var resources = schema.GroupVersionResource{Group: v1alpha1.Group, Version: v1alpha1.Version, Resource: "connectedregistries"}

// site is a cluster with the resource's definition.
type site struct {
	*cluster.Cluster
	kube    kubernetes.Interface
	objects dynamic.Interface
}

// newSite starts a cluster of one node, which cert-manager's pods need.
func newSite(t *testing.T) *site {
	t.Helper()
	c, err := cluster.New(t.Context(), cluster.Config{
		Name: fmt.Sprintf("certs-%d", os.Getpid()), Nodes: 1, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	s := &site{Cluster: c}
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	config.QPS, config.Burst = 100, 200
	if s.kube, err = kubernetes.NewForConfig(config); err != nil {
		t.Fatal(err)
	}
	if s.objects, err = dynamic.NewForConfig(config); err != nil {
		t.Fatal(err)
	}
	definition, err := os.Open("../../manifests/connectedregistry.io_connectedregistries.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer definition.Close()
	if err := c.Apply(t.Context(), definition); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the resource's definition", func() error {
		_, err := s.objects.Resource(resources).Namespace(namespace).List(t.Context(), metav1.ListOptions{})
		return err
	})
	s.kubectl(t, "create", "namespace", namespace)
	return s
}

func (s *site) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := s.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// create makes the resource; what the syncer makes belongs to it.
func (s *site) create(t *testing.T, spec v1alpha1.Spec) *v1alpha1.ConnectedRegistry {
	t.Helper()
	cr := &v1alpha1.ConnectedRegistry{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.APIVersion, Kind: v1alpha1.Kind},
		ObjectMeta: metav1.ObjectMeta{Name: "connected-registry", Namespace: namespace},
		Spec:       spec,
	}
	object, err := runtime.DefaultUnstructuredConverter.ToUnstructured(cr)
	if err != nil {
		t.Fatal(err)
	}
	delete(object, "status")
	made, err := s.objects.Resource(resources).Namespace(namespace).Create(t.Context(), &unstructured.Unstructured{Object: object}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cr.UID = made.GetUID()
	cr.Annotations = map[string]string{}
	return cr
}

// eventually waits until check has nothing to complain of.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
