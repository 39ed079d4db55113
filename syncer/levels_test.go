package syncer_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/registry"
	"github.com/connected-registry/connected-registry/storage"
	"github.com/connected-registry/connected-registry/syncer"
)

// level is one connected registry: its own store and replica.
type level struct {
	store *storage.Store
	host  string
}

func newLevel(t *testing.T) level {
	t.Helper()
	store, err := storage.Open(t.Context(), storage.Config{Root: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	server, err := registry.New(registry.Config{Store: store})
	if err != nil {
		t.Fatal(err)
	}
	front := httptest.NewServer(server.Handler())
	t.Cleanup(front.Close)
	return level{store, strings.TrimPrefix(front.URL, "http://")}
}

// from is the syncer that fills a level from the one above.
func (l level) from(t *testing.T, above level, repositories ...v1alpha1.Repository) *syncer.Syncer {
	t.Helper()
	s, err := syncer.New(syncer.Config{
		Store:             l.store.Namespace(),
		Driver:            l.store.Driver(),
		Parent:            syncer.Parent{Endpoint: above.host, Insecure: true},
		Repositories:      repositories,
		Referrers:         true,
		DeletePropagation: true,
		MaxRemovals:       100,
		ChunkSize:         100_000,
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A connected registry is a parent like any other: an image goes down three
// levels, with its referrers, moves and goes, and each level asks the one above
// for nothing that it has.
func TestThreeLevels(t *testing.T) {
	top, middle, bottom := newLevel(t), newLevel(t), newLevel(t)
	down := []*syncer.Syncer{
		middle.from(t, top, v1alpha1.Repository{Name: "team/**"}),
		bottom.from(t, middle, v1alpha1.Repository{Name: "team/*", Tags: v1alpha1.Tags{Include: []string{"v*"}}}),
	}
	sync := func() (bytes int64) {
		t.Helper()
		for i, s := range down {
			result, err := s.Sync(t.Context(), v1alpha1.SyncTriggerManual)
			if err != nil {
				t.Fatalf("level %d: %v", i+2, err)
			}
			bytes += result.BytesFetched
		}
		return bytes
	}
	ref := func(l level, tag string) name.Tag {
		t.Helper()
		r, err := name.NewTag(l.host+"/team/app:"+tag, name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	push := func(tag string) string {
		t.Helper()
		img, err := random.Image(250_000, 3)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref(top, tag), img); err != nil {
			t.Fatal(err)
		}
		d, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return d.String()
	}
	has := func(l level, tag string) string {
		t.Helper()
		desc, err := remote.Head(ref(l, tag))
		if err != nil {
			return ""
		}
		return desc.Digest.String()
	}
	first, beta := push("v1"), push("beta")
	if sync() == 0 {
		t.Error("nothing was fetched")
	}
	if has(middle, "v1") != first || has(bottom, "v1") != first || has(middle, "beta") != beta || has(bottom, "beta") != "" {
		t.Error("the wrong tags are here")
	}
	img, err := remote.Image(ref(bottom, "v1"))
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, layer := range layers {
		if r, err := layer.Compressed(); err != nil {
			t.Error(err)
		} else if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	if again := sync(); again > 20_000 {
		t.Errorf("%d bytes were fetched when nothing had changed", again)
	}
	second := push("v1")
	sync()
	if has(bottom, "v1") != second {
		t.Error("the tag did not move")
	}
	if err := remote.Delete(ref(top, "v1")); err != nil {
		t.Fatal(err)
	}
	push("v2")
	sync()
	if has(bottom, "v1") != "" || has(bottom, "v2") == "" {
		t.Error("the tag did not go")
	}
}

// A replica tells who wants to know which manifests a client asked for that are
// not here, and answers at once.
func TestMissingIsTold(t *testing.T) {
	store, err := storage.Open(t.Context(), storage.Config{Root: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	var told []string
	server, err := registry.New(registry.Config{Store: store, Missing: func(_ context.Context, repository, reference string) {
		told = append(told, repository+" "+reference)
	}})
	if err != nil {
		t.Fatal(err)
	}
	digest := "sha256:" + strings.Repeat("a", 64)
	for _, path := range []string{"app/manifests/1", "app/manifests/" + digest, "app/blobs/" + digest, "app/tags/list"} {
		rec := httptest.NewRecorder()
		server.Handler().ServeHTTP(rec, httptest.NewRequestWithContext(context.Background(), http.MethodGet, "/v2/"+path, nil))
		if rec.Code != http.StatusNotFound {
			t.Errorf("%s: %d", path, rec.Code)
		}
	}
	if got := fmt.Sprint(told); got != "[app 1 app "+digest+"]" {
		t.Error(got)
	}
}
