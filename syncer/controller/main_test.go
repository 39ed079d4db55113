package controller

import (
	"context"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"k8s.io/klog/v2"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestMain(m *testing.M) {
	klog.SetSlogLogger(slog.New(slog.DiscardHandler)) // client-go's
	goleak.VerifyTestMain(m)
}

// golden compares with a file below testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

// load is the resource of a spec in YAML, with its defaults.
func load(t *testing.T, spec string) *v1alpha1.ConnectedRegistry {
	t.Helper()
	r, err := v1alpha1.Load("test.yaml", []byte("apiVersion: connectedregistry.io/v1alpha1\nkind: ConnectedRegistry\nmetadata: {name: connected-registry, namespace: site, uid: u-1}\nspec:\n"+spec))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// secretMap holds Secrets by "name/key".
type secretMap map[string]string

func (m secretMap) Secret(_ context.Context, name, key string) ([]byte, error) {
	value, ok := m[name+"/"+key]
	if !ok {
		return nil, fmt.Errorf("Secret %s: key %s: %w", name, key, fs.ErrNotExist)
	}
	return []byte(value), nil
}
