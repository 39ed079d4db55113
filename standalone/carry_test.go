package standalone

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	parentregistry "github.com/google/go-containerregistry/pkg/registry"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
	"github.com/connected-registry/connected-registry/syncer"
)

// TestCarry brings content from a parent, carries it in an archive, and imports
// it where there is no parent, in two attempts.
func TestCarry(t *testing.T) {
	parent := httptest.NewServer(parentregistry.New(parentregistry.Logger(log.New(io.Discard, "", 0))))
	host := strings.TrimPrefix(parent.URL, "http://")
	tags := []string{"team/app:v1", "team/app:v2", "team/tool:v1"}
	for _, tag := range tags {
		push(t, host+"/"+tag)
	}
	here, there := t.TempDir(), t.TempDir()
	s, err := Open(t.Context(), Config{
		Resource: load(t, fmt.Sprintf("  parent: {endpoint: %q, insecure: true}\n  repositories: [{name: \"team/**\"}]\n", host)),
		Data:     here,
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Syncer.Sync(t.Context(), v1alpha1.SyncTriggerManual)
	if err != nil {
		t.Fatal(err)
	}
	parent.Close()

	file := filepath.Join(t.TempDir(), "edge.tar")
	// The registry is still running here.
	result, err := Export(t.Context(), CarryConfig{Data: here, File: file}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if result.Tags != len(tags) {
		t.Errorf("exported %+v", result)
	}
	want := tagsIn(t, here)
	s.Close()

	ctx, cancel := context.WithCancel(t.Context())
	_, err = Import(ctx, CarryConfig{Data: there, File: file}, func(e syncer.Event) {
		if e.Kind == syncer.EventBlob {
			cancel() // in the middle
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the import that was interrupted ended with %v", err)
	}
	if _, err := Import(t.Context(), CarryConfig{Data: there, File: file}, nil); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, tagsIn(t, there)); diff != "" {
		t.Errorf("-here +there:\n%s", diff)
	}
	again, err := Import(t.Context(), CarryConfig{Data: there, File: file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if again.BlobsFetched != 0 || again.TagsUpdated != 0 {
		t.Errorf("importing once more brought %d blobs and %d tags", again.BlobsFetched, again.TagsUpdated)
	}
}

// TestImportOfDamage imports an archive in which a byte is wrong: what is right
// is imported, and the rest is an error.
func TestImportOfDamage(t *testing.T) {
	parent := httptest.NewServer(parentregistry.New(parentregistry.Logger(log.New(io.Discard, "", 0))))
	defer parent.Close()
	host := strings.TrimPrefix(parent.URL, "http://")
	push(t, host+"/app:v1")
	here, there := t.TempDir(), t.TempDir()
	s, err := Open(t.Context(), Config{
		Resource: load(t, fmt.Sprintf("  parent: {endpoint: %q, insecure: true}\n  repositories: [{name: app}]\n", host)),
		Data:     here,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err = s.Syncer.Sync(t.Context(), v1alpha1.SyncTriggerManual); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "edge.tar")
	if _, err := Export(t.Context(), CarryConfig{Data: here, File: file}, nil, nil); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	data[1024+512+5] ^= 1 // in the first blob
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
	var told error
	_, err = Import(t.Context(), CarryConfig{Data: there, File: file}, func(e syncer.Event) {
		if e.Err != nil {
			told = e.Err
		}
	})
	for _, err := range []error{err, told} {
		if got := fmt.Sprint(err); !strings.Contains(got, "archive "+file+" gave a wrong answer for ") || !strings.HasSuffix(got, ": copy it once more, or export again") {
			t.Errorf("an archive with a wrong byte was imported with %v", err)
		}
	}
	if got := tagsIn(t, there); len(got) != 0 {
		t.Errorf("tags of an image that is not whole: %v", got)
	}
}

func TestCarryMistakes(t *testing.T) {
	if _, err := Export(t.Context(), CarryConfig{Data: t.TempDir(), File: filepath.Join(t.TempDir(), "a.tar")}, nil, nil); err == nil || !strings.Contains(err.Error(), "--data") {
		t.Errorf("export of nothing: %v", err)
	}
	// What is there already and is no archive stays.
	data, file := t.TempDir(), filepath.Join(t.TempDir(), "registry.yaml")
	parent := httptest.NewServer(parentregistry.New(parentregistry.Logger(log.New(io.Discard, "", 0))))
	defer parent.Close()
	host := strings.TrimPrefix(parent.URL, "http://")
	push(t, host+"/app:v1")
	s, err := Open(t.Context(), Config{
		Resource: load(t, fmt.Sprintf("  parent: {endpoint: %q, insecure: true}\n  repositories: [{name: app}]\n", host)),
		Data:     data,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err = s.Syncer.Sync(t.Context(), v1alpha1.SyncTriggerManual); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("kind: ConnectedRegistry\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{file, filepath.Dir(file)} {
		if _, err := Export(t.Context(), CarryConfig{Data: data, File: name}, nil, nil); err == nil || err.Error() != name+" is there already and is not an archive of ours: remove it or give another name" {
			t.Errorf("export onto %s: %v", name, err)
		}
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "kind: ConnectedRegistry\n" {
		t.Errorf("the file is now %.40q, %v", text, err)
	}
	if _, err := Import(t.Context(), CarryConfig{Data: t.TempDir(), File: filepath.Join(t.TempDir(), "a.tar")}, nil); err == nil {
		t.Error("import of nothing is no error")
	}
}

// tagsIn are the tags in a data directory, each with its digest.
func tagsIn(t *testing.T, data string) []string {
	t.Helper()
	store, err := storage.Open(t.Context(), storage.Config{Root: filepath.Join(data, "registry")})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	var all []string
	for name, err := range store.Repositories(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		repo, err := store.Repository(name)
		if err != nil {
			t.Fatal(err)
		}
		tags, _, err := repo.Tags(t.Context(), "", -1)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for _, tag := range tags {
			d, err := repo.Tag(t.Context(), tag)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, name+":"+tag+" "+d.String())
		}
	}
	slices.Sort(all)
	return all
}
