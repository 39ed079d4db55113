package cache

import (
	"fmt"
	"io"
	"net/http"
	"testing"

	"github.com/opencontainers/go-digest"
)

// BenchmarkBlobHit reads a blob from the store over HTTP, 8 connections at once.
func BenchmarkBlobHit(b *testing.B) {
	body := random(64<<20, 1)
	o := newOrigin(b)
	d := o.blob("app", body)
	n := start(b, Config{Registries: upstreams(o.URL)})
	n.get(blobURL("app", d))
	n.settled()
	b.SetBytes(int64(len(body)))
	b.SetParallelism(4)
	benchGet(b, n, blobURL("app", d))
}

// BenchmarkManifestHit reads a manifest by digest, 16 connections at once.
func BenchmarkManifestHit(b *testing.B) {
	o := newOrigin(b)
	d := o.manifest("app", "", testManifest(digest.FromString("a"), digest.FromString("b")))
	n := start(b, Config{Registries: upstreams(o.URL)})
	n.get(manifestURL("app", d.String()))
	n.settled()
	b.SetParallelism(8)
	benchGet(b, n, manifestURL("app", d.String()))
}

func benchGet(b *testing.B, n *node, path string) {
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		buf := make([]byte, 1<<20)
		for pb.Next() {
			resp, err := n.client.Get(n.url + path + "?ns=" + testHost)
			if err != nil {
				b.Error(err)
				return
			}
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{resp.Body}, buf); err != nil || resp.StatusCode != http.StatusOK {
				b.Errorf("status %d, %v", resp.StatusCode, err)
			}
			resp.Body.Close()
		}
	})
}

// BenchmarkFill downloads a blob through an empty cache.
func BenchmarkFill(b *testing.B) {
	body := random(64<<20, 1)
	d := digest.FromBytes(body)
	o := newOrigin(b)
	n := start(b, Config{Registries: upstreams(o.URL)})
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		o.mu.Lock()
		o.blobs[fmt.Sprintf("app%d/%s", i, d)] = body
		o.mu.Unlock()
		r, err := n.client.Get(n.url + blobURL(fmt.Sprintf("app%d", i), d) + "?ns=" + testHost)
		if err != nil {
			b.Fatal(err)
		}
		if got, err := io.Copy(io.Discard, r.Body); err != nil || got != int64(len(body)) {
			b.Fatalf("%d bytes, %v", got, err)
		}
		r.Body.Close()
		b.StopTimer()
		n.settled()
		st := n.disk.Load().store
		st.discard(d, st.blobPath(d), io.EOF)
		b.StartTimer()
	}
}

// nowhere is a client that takes everything.
type nowhere struct{ header http.Header }

func (n *nowhere) Header() http.Header         { return n.header }
func (n *nowhere) Write(b []byte) (int, error) { return len(b), nil }
func (n *nowhere) WriteHeader(int)             {}

// BenchmarkManifestHandler is BenchmarkManifestHit without the network.
func BenchmarkManifestHandler(b *testing.B) {
	o := newOrigin(b)
	d := o.manifest("app", "", testManifest(digest.FromString("a"), digest.FromString("b")))
	n := start(b, Config{Registries: upstreams(o.URL)})
	n.get(manifestURL("app", d.String()))
	n.settled()
	req := newGet(b.Context(), n.url+manifestURL("app", d.String())+"?ns="+testHost)
	b.ReportAllocs()
	for b.Loop() {
		n.ServeHTTP(&nowhere{http.Header{}}, req)
	}
}
