package containerd

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"path"
	"runtime"
	"slices"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// testImage is an index of one image for this machine's platform and one for
// another.
type testImage struct {
	index  v1.ImageIndex
	digest string                   // of the index
	id     string                   // of this platform's configuration, as CRI names images
	layers []v1.Layer               // of this platform, base first
	files  map[string]digest.Digest // what this platform unpacks to
}

// bigImage has 22 MB of incompressible layers, one with more than one chunk's
// worth for every worker of a parallel fetch. It is made once: tests only read
// it.
var bigImage = sync.OnceValues(func() (*testImage, error) {
	return makeImage(8<<20, 14<<20)
})

// smallImage has the same shape as bigImage and about 1 MB.
var smallImage = sync.OnceValues(func() (*testImage, error) {
	return makeImage(300<<10, 700<<10)
})

// load returns a prepared image or ends the test.
func load(t *testing.T, prepared func() (*testImage, error)) *testImage {
	t.Helper()
	image, err := prepared()
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// makeImage builds an index of two platforms. Each has a base layer with a
// large file of baseSize bytes, a program layer with one of programSize, and
// on top a layer that changes one file of the base and removes another.
func makeImage(baseSize, programSize int) (*testImage, error) {
	other := "arm64"
	if runtime.GOARCH == other {
		other = "amd64"
	}
	native, files, err := platformImage(runtime.GOARCH, baseSize, programSize)
	if err != nil {
		return nil, err
	}
	foreign, _, err := platformImage(other, 64<<10, 64<<10)
	if err != nil {
		return nil, err
	}
	index := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
		addendum(native, runtime.GOARCH), addendum(foreign, other))

	indexDigest, err := index.Digest()
	if err != nil {
		return nil, err
	}
	id, err := native.ConfigName()
	if err != nil {
		return nil, err
	}
	layers, err := native.Layers()
	if err != nil {
		return nil, err
	}
	return &testImage{index: index, digest: indexDigest.String(), id: id.String(), layers: layers, files: files}, nil
}

func addendum(image v1.Image, arch string) mutate.IndexAddendum {
	return mutate.IndexAddendum{
		Add:        image,
		Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
	}
}

func platformImage(arch string, baseSize, programSize int) (v1.Image, map[string]digest.Digest, error) {
	const removed, changed = "etc/removed", "etc/changed"
	base := map[string][]byte{
		"etc/os-release":    []byte("ID=test\n"),
		changed:             []byte("first\n"),
		removed:             []byte("gone in the top layer\n"),
		"usr/lib/libbig.so": noise(arch+"base", baseSize),
	}
	program := map[string][]byte{
		"usr/bin/program":          noise(arch+"program", programSize),
		"usr/share/doc/README.txt": []byte("for " + arch + "\n"),
	}
	top := map[string][]byte{
		changed:           []byte("second\n"),
		"etc/.wh.removed": nil,
	}

	image := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	image = mutate.ConfigMediaType(image, types.OCIConfigJSON)
	for _, files := range []map[string][]byte{base, program, top} {
		layer, err := packLayer(files)
		if err != nil {
			return nil, nil, err
		}
		if image, err = mutate.Append(image, mutate.Addendum{Layer: layer, MediaType: types.OCILayer}); err != nil {
			return nil, nil, err
		}
	}
	image, err := withPlatform(image, arch)

	want := map[string]digest.Digest{}
	for _, files := range []map[string][]byte{base, program} {
		for name, data := range files {
			want[name] = digest.FromBytes(data)
		}
	}
	want[changed] = digest.FromBytes(top[changed])
	delete(want, removed)
	return image, want, err
}

func withPlatform(image v1.Image, arch string) (v1.Image, error) {
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", arch
	config.Config.Entrypoint = []string{"/usr/bin/program"}
	return mutate.ConfigFile(image, config)
}

// noise returns n incompressible bytes that depend on name alone.
func noise(name string, n int) []byte {
	var seed [32]byte
	copy(seed[:], name)
	data := make([]byte, n)
	_, _ = rand.NewChaCha8(seed).Read(data)
	return data
}

// packLayer makes a gzip-compressed layer of regular files and the directories
// above them. Equal files make an equal digest.
func packLayer(files map[string][]byte) (v1.Layer, error) {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	made := map[string]bool{".": true}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := writeDirs(w, path.Dir(name), made); err != nil {
			return nil, err
		}
		header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(files[name]))}
		if err := w.WriteHeader(header); err != nil {
			return nil, fmt.Errorf("packing %s: %w", name, err)
		}
		if _, err := w.Write(files[name]); err != nil {
			return nil, fmt.Errorf("packing %s: %w", name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(archive.Bytes())), nil }
	return tarball.LayerFromOpener(open,
		tarball.WithCompressionLevel(gzip.BestSpeed), tarball.WithCompressedCaching)
}

func writeDirs(w *tar.Writer, dir string, made map[string]bool) error {
	if made[dir] {
		return nil
	}
	if err := writeDirs(w, path.Dir(dir), made); err != nil {
		return err
	}
	made[dir] = true
	return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755})
}
