package registry

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/connected-registry/connected-registry/storage"
)

// discard is a ResponseWriter that keeps nothing.
type discard struct{ header http.Header }

func (d discard) Header() http.Header         { return d.header }
func (d discard) Write(p []byte) (int, error) { return len(p), nil }
func (d discard) WriteHeader(int)             {}

// BenchmarkManifest is for profiles of what the registry itself does to answer;
// how that compares is for the module test/bench to say.
func BenchmarkManifest(b *testing.B) {
	store, err := storage.Open(b.Context(), storage.Config{Root: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	repo, err := store.Repository("library/app")
	if err != nil {
		b.Fatal(err)
	}
	content := []byte(`{"schemaVersion":2,"mediaType":"` + typeOCIIndex + `","manifests":[]}`)
	d, tags, err := target("latest", content)
	if err != nil {
		b.Fatal(err)
	}
	if err := repo.PutManifest(b.Context(), d, content, tags...); err != nil {
		b.Fatal(err)
	}
	s, err := New(Config{Store: store, Metrics: prometheus.NewRegistry()})
	if err != nil {
		b.Fatal(err)
	}
	for _, method := range []string{"GET", "HEAD"} {
		b.Run(method, func(b *testing.B) {
			b.ReportAllocs()
			handler, w := s.Handler(), discard{make(http.Header)}
			r := httptest.NewRequest(method, "/v2/library/app/manifests/latest", nil)
			for b.Loop() {
				clear(w.header)
				handler.ServeHTTP(w, r)
			}
		})
	}
}
