package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/distribution/reference"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is a store with images in it.
type fixture struct {
	*storage.Store
	digests map[string]digest.Digest // by name
}

// newFixture holds team/app:1 and :2, which share a layer, an index of one
// present and one absent platform, and a signature of app:1.
func newFixture(t *testing.T) fixture {
	t.Helper()
	store, err := storage.Open(t.Context(), storage.Config{Root: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	f := fixture{store, make(map[string]digest.Digest)}
	shared := f.blob(t, "team/app", 100_000)
	one := f.image(t, "team/app", "one", nil, shared, f.blob(t, "team/app", 3_000_000))
	f.manifest(t, "team/app", "one tagged", one, "1", "stable")
	two := f.image(t, "team/app", "two", nil, shared)
	f.manifest(t, "team/app", "two tagged", two, "2")
	amd := f.manifest(t, "base", "amd64", f.image(t, "base", "amd64", nil, f.blob(t, "base", 512)))
	amd.Platform = &v1.Platform{OS: "linux", Architecture: "amd64"}
	f.manifest(t, "base", "index", v1.Index{
		MediaType: v1.MediaTypeImageIndex,
		Manifests: []v1.Descriptor{amd, {MediaType: v1.MediaTypeImageManifest, Digest: digest.FromString("arm64"), Size: 5, Platform: &v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}}},
	}, "latest")
	subject := v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: f.digests["one tagged"], Size: 1}
	signature := f.image(t, "team/app", "signature", &subject, f.blob(t, "team/app", 200))
	signature.ArtifactType = "application/example.signature"
	f.manifest(t, "team/app", "signature", signature)
	return f
}

func (f fixture) blob(t *testing.T, repo string, size int) v1.Descriptor {
	t.Helper()
	content := make([]byte, size)
	rnd := rand.NewChaCha8([32]byte{byte(size), byte(size >> 8), byte(len(repo))})
	_, _ = rnd.Read(content)
	named, err := reference.WithName(repo)
	if err != nil {
		t.Fatal(err)
	}
	r, err := f.Namespace().Repository(t.Context(), named)
	if err != nil {
		t.Fatal(err)
	}
	d, err := r.Blobs(t.Context()).Put(t.Context(), "application/octet-stream", content)
	if err != nil {
		t.Fatal(err)
	}
	d.MediaType = v1.MediaTypeImageLayerGzip
	return v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

func (f fixture) image(t *testing.T, repo, config string, subject *v1.Descriptor, layers ...v1.Descriptor) v1.Manifest {
	t.Helper()
	c := f.blob(t, repo, 300+len(config))
	c.MediaType = v1.MediaTypeImageConfig
	return v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: c, Layers: layers, Subject: subject, Annotations: map[string]string{"name": config}}
}

func (f fixture) manifest(t *testing.T, repo, key string, content any, tags ...string) v1.Descriptor {
	t.Helper()
	switch m := content.(type) {
	case v1.Manifest:
		m.SchemaVersion = 2
		content = m
	case v1.Index:
		m.SchemaVersion = 2
		content = m
	}
	body, err := json.Marshal(content)
	if err != nil {
		t.Fatal(err)
	}
	r, err := f.Repository(repo)
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(body)
	if err := r.PutManifest(t.Context(), d, body, tags...); err != nil {
		t.Fatal(err)
	}
	f.digests[key] = d
	return v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: d, Size: int64(len(body))}
}

func (f fixture) export(t *testing.T, file string) ExportResult {
	t.Helper()
	var done, total int64
	result, err := Export(t.Context(), ExportConfig{Store: f.Store, File: file, Progress: func(d, n int64) { done, total = d, n }})
	if err != nil {
		t.Fatal(err)
	}
	if done != total || total != result.Bytes {
		t.Errorf("progress ended at %d of %d bytes, with %d in the archive", done, total, result.Bytes)
	}
	return result
}

func TestExportIsServed(t *testing.T) {
	f := newFixture(t)
	file := filepath.Join(t.TempDir(), "edge.tar")
	got := f.export(t, file)
	if want := (ExportResult{Tags: 4, Referrers: 1, Left: 1, Blobs: got.Blobs, Bytes: got.Bytes}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if _, err := os.Stat(file + ".partial"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the partial file is still there: %v", err)
	}
	for kind, path := range map[string]string{"tar": file, "directory": unpack(t, file)} {
		t.Run(kind, func(t *testing.T) { checkServed(t, f, path) })
	}
}

// checkServed reads everything by another client, which checks what it reads.
func checkServed(t *testing.T, f fixture, path string) {
	a, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	want := []v1alpha1.Repository{
		{Name: "base", Tags: v1alpha1.Tags{Include: []string{"latest"}}, Platforms: []string{"linux/amd64"}},
		{Name: "team/app", Tags: v1alpha1.Tags{Include: []string{"1", "2", "stable"}}},
	}
	if diff := cmp.Diff(want, a.Repositories()); diff != "" {
		t.Errorf("selection, -want +got:\n%s", diff)
	}
	server := httptest.NewServer(a)
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	transport := remote.DefaultTransport
	options := []remote.Option{remote.WithContext(t.Context()), remote.WithTransport(transport)}
	for tag, key := range map[string]string{"team/app:1": "one tagged", "team/app:stable": "one tagged", "team/app:2": "two tagged", "base:latest": "index"} {
		ref, err := name.ParseReference(host + "/" + tag)
		if err != nil {
			t.Fatal(err)
		}
		desc, err := remote.Get(ref, options...)
		if err != nil {
			t.Fatal(err)
		}
		if got := desc.Digest.String(); got != f.digests[key].String() {
			t.Errorf("%s is %s, want %s", tag, got, f.digests[key])
		}
		if desc.MediaType.IsIndex() {
			continue
		}
		img, err := desc.Image()
		if err != nil {
			t.Fatal(err)
		}
		layers, err := img.Layers()
		if err != nil {
			t.Fatal(err)
		}
		for _, layer := range layers {
			r, err := layer.Compressed() // which checks the digest
			if err == nil {
				_, err = io.Copy(io.Discard, r)
				r.Close()
			}
			if err != nil {
				t.Errorf("%s: %v", tag, err)
			}
		}
	}
	subject, err := name.NewDigest(host + "/team/app@" + f.digests["one tagged"].String())
	if err != nil {
		t.Fatal(err)
	}
	referrers, err := remote.Referrers(subject, options...)
	if err != nil {
		t.Fatal(err)
	}
	index, err := referrers.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(index.Manifests) != 1 || index.Manifests[0].Digest.String() != f.digests["signature"].String() || index.Manifests[0].ArtifactType != "application/example.signature" {
		t.Errorf("referrers: %+v", index.Manifests)
	}
	server.Client().CloseIdleConnections()
	remote.DefaultTransport.(interface{ CloseIdleConnections() }).CloseIdleConnections()
}

func unpack(t *testing.T, file string) string {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		data, err := io.ReadAll(r)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(path), 0o755)
		}
		if err == nil {
			err = os.WriteFile(path, data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestExportResumes cuts an archive at every kind of place and lets the export
// go on: the archive is the same, and what was whole is not read again.
func TestExportResumes(t *testing.T) {
	f := newFixture(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "edge.tar")
	f.export(t, file)
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, cut := range []int{0, 1, 100, 511, 512, 600, 1024, 1025, 1600, 50_000, 104_000, 2_000_000, len(whole) - 5000, len(whole) - 1024, len(whole) - 100, len(whole)} {
		t.Run(fmt.Sprint(cut), func(t *testing.T) {
			again := filepath.Join(t.TempDir(), "edge.tar")
			if err := os.WriteFile(again+".partial", whole[:cut], 0o644); err != nil {
				t.Fatal(err)
			}
			result := f.export(t, again)
			got, err := os.ReadFile(again)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, whole) {
				t.Error("the archive is not the one of an export in one piece")
			}
			if cut > 200_000 && result.Resumed == 0 {
				t.Error("nothing of what was there was used")
			}
		})
	}
	t.Run("decayed", func(t *testing.T) {
		again := filepath.Join(t.TempDir(), "edge.tar")
		decayed := bytes.Clone(whole)
		decayed[len(decayed)/2] ^= 1
		if err := os.WriteFile(again+".partial", decayed, 0o644); err != nil {
			t.Fatal(err)
		}
		f.export(t, again)
		if got, err := os.ReadFile(again); err != nil || !bytes.Equal(got, whole) {
			t.Errorf("the archive is not the one of an export in one piece (%v)", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		again := filepath.Join(t.TempDir(), "edge.tar")
		ctx, cancel := context.WithCancel(t.Context())
		_, err := Export(ctx, ExportConfig{Store: f.Store, File: again, Progress: func(done, _ int64) {
			if done > 1_000_000 {
				cancel()
			}
		}})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
		if result := f.export(t, again); result.Resumed == 0 {
			t.Error("nothing of what was there was used")
		}
	})
	t.Run("foreign file", func(t *testing.T) {
		again := filepath.Join(t.TempDir(), "edge.tar")
		foreign := bytes.Repeat([]byte("precious "), 1000)
		if err := os.WriteFile(again+".partial", foreign, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Export(t.Context(), ExportConfig{Store: f.Store, File: again}); err == nil {
			t.Error("no error")
		}
		if got, _ := os.ReadFile(again + ".partial"); !bytes.Equal(got, foreign) {
			t.Error("somebody's file was changed")
		}
	})
}

func TestExportSome(t *testing.T) {
	f := newFixture(t)
	file := filepath.Join(t.TempDir(), "edge.tar")
	got, err := Export(t.Context(), ExportConfig{Store: f.Store, File: file, Wanted: func(repo, tag string) bool { return repo == "team/app" && tag == "2" }})
	if err != nil {
		t.Fatal(err)
	}
	if got.Tags != 1 || got.Referrers != 0 || got.Blobs != 3 {
		t.Errorf("got %+v", got)
	}
	a, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	selection := a.Repositories()
	if len(selection) != 1 || selection[0].Name != "team/app" || cmp.Diff([]string{"2"}, selection[0].Tags.Include) != "" {
		t.Errorf("the archive selects %+v", selection)
	}
	if _, err := Export(t.Context(), ExportConfig{Store: f.Store, File: file, Wanted: func(string, string) bool { return false }}); err == nil {
		t.Error("an export of nothing is no error")
	}
}

func TestExportOfDamage(t *testing.T) {
	f := newFixture(t)
	var victim string
	err := filepath.Walk(filepath.Join(f.Root(), "docker/registry/v2/blobs"), func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Size() == 3_000_000 {
			victim = path
		}
		return err
	})
	if err != nil || victim == "" {
		t.Fatal(err, victim)
	}
	data, err := os.ReadFile(victim)
	if err != nil {
		t.Fatal(err)
	}
	data[7] ^= 1
	if err := os.WriteFile(victim, data, 0o644); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "edge.tar")
	if _, err := Export(t.Context(), ExportConfig{Store: f.Store, File: file}); err == nil || !strings.Contains(err.Error(), "synchronise before exporting") {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("an archive that is not whole has its name")
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	tarOf := func(name, content string) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(content)), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "absent"):                                                              "no such file",
		write("text", bytes.Repeat([]byte("x"), 2000)):                                            "is not a whole tar archive",
		write("gz", append([]byte{0x1f, 0x8b}, make([]byte, 2000)...)):                            "is compressed: unpack it first",
		write("other.tar", tarOf("manifest.json", "[]")):                                          "is not an image layout: it has no index.json",
		write("html.tar", tarOf("index.json", "<html>")):                                          "index.json is not an image index",
		write("unnamed.tar", tarOf("index.json", `{"schemaVersion":2}`)):                          "names none of its 0 images",
		write("digest.tar", tarOf("index.json", `{"manifests":[{"digest":"sha256:../../etc"}]}`)): "names a digest that is none",
		dir: "is not an image layout: it has no index.json",
	} {
		t.Run(filepath.Base(path), func(t *testing.T) {
			a, err := Open(path)
			if err == nil {
				a.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), want) {
				t.Errorf("error %q, want %q in it", err, want)
			}
		})
	}
}

// FuzzOpen serves whatever can be opened: never a panic, never bytes that are
// not of the archive.
func FuzzOpen(f *testing.F) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	manifest := `{"schemaVersion":2,"config":{"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}}`
	d := digest.FromString(manifest)
	for name, content := range map[string]string{
		blobName(d):  manifest,
		"index.json": `{"schemaVersion":2,"manifests":[{"digest":"` + d.String() + `","annotations":{"org.opencontainers.image.ref.name":"a/b:c"}}]}`,
	} {
		if err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(content)), Mode: 0o644}); err != nil {
			f.Fatal(err)
		}
		_, _ = w.Write([]byte(content))
	}
	w.Close()
	f.Add(b.Bytes(), "a/b", "c")
	f.Add([]byte("index.json"), "../a", "sha256:")
	f.Fuzz(func(t *testing.T, data []byte, repo, ref string) {
		path := filepath.Join(t.TempDir(), "a.tar")
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		a, err := Open(path)
		if err != nil {
			return
		}
		defer a.Close()
		for _, middle := range []string{"manifests", "blobs", "referrers", "tags"} {
			r := httptest.NewRequestWithContext(t.Context(), "GET", "/", nil)
			r.URL.Path = "/v2/" + repo + "/" + middle + "/" + ref
			w := httptest.NewRecorder()
			a.ServeHTTP(w, r)
			if w.Code == 500 {
				t.Errorf("%s: 500", r.URL.Path)
			}
		}
	})
}
