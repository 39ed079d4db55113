package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	// layerBytes is about what one layer holds.
	layerBytes = 12 << 20
	// imageBytes is the least that all layers together weigh.
	imageBytes = 56 << 20
	// maxFileBytes bounds a layer to less than three times layerBytes.
	maxFileBytes = 2 * layerBytes
)

// platforms are those of the embedded image, the node's own first.
var platforms = []v1.Platform{
	{OS: "linux", Architecture: "amd64"},
	{OS: "linux", Architecture: "arm64"},
}

// machineImage is an index of two platforms made from files of this machine:
// the platforms share layers and each has one of its own.
func machineImage() (v1.ImageIndex, error) {
	files, err := machineFiles()
	if err != nil {
		return nil, err
	}
	var shared []v1.Layer
	var weight int64
	for weight < imageBytes && len(files) > 0 {
		layer, rest, err := fileLayer(files)
		if err != nil {
			return nil, err
		}
		size, err := layer.Size()
		if err != nil {
			return nil, err
		}
		shared, files, weight = append(shared, layer), rest, weight+size
	}
	if weight < imageBytes {
		return nil, fmt.Errorf("the files of this machine make only %d bytes of image: give one with DEMO_IMAGE", weight)
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range platforms {
		img, err := platformImage(p, shared)
		if err != nil {
			return nil, err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p}})
	}
	return index, nil
}

func platformImage(p v1.Platform, shared []v1.Layer) (v1.Image, error) {
	own, err := tarLayer(func(w *tar.Writer) error {
		return writeEntry(w, "etc/platform", []byte(p.String()+"\n"))
	})
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err = mutate.AppendLayers(img, append(append([]v1.Layer{}, shared...), own)...)
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = p.OS, p.Architecture
	return mutate.ConfigFile(img, config)
}

// signature is an artifact of the shape that signing tools attach to subject:
// a small payload in a manifest that names its subject (OCI image
// specification 1.1, image manifest, "subject").
func signature(subject v1.Descriptor) (v1.Image, error) {
	payload := fmt.Appendf(nil, `{"critical":{"image":{"docker-manifest-digest":%q}}}`, subject.Digest)
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), "application/vnd.dev.cosign.artifact.sig.v1+json")
	img, err := mutate.AppendLayers(img, static.NewLayer(payload, "application/vnd.dev.cosign.simplesigning.v1+json"))
	if err != nil {
		return nil, err
	}
	signed, ok := mutate.Subject(img, subject).(v1.Image)
	if !ok {
		return nil, errors.New("an image with a subject is no image")
	}
	return signed, nil
}

// machineFile is a readable regular file of this machine.
type machineFile struct {
	path string
	size int64
}

// machineFiles lists programs and libraries, which every Linux machine has.
func machineFiles() ([]machineFile, error) {
	var files []machineFile
	var total int64
	roots := []string{"/usr/bin", "/usr/lib", "/bin", "/lib", runtime.GOROOT()} //nolint:staticcheck // any big tree will do, and Go's is there
	for _, root := range roots {
		err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			switch {
			case err != nil && d != nil && d.IsDir():
				return fs.SkipDir
			case err != nil:
				return nil //nolint:nilerr // any other file does as well
			case total > 2*imageBytes:
				return fs.SkipAll
			case !d.Type().IsRegular():
				return nil
			}
			info, err := d.Info()
			if err != nil || info.Size() == 0 || info.Size() > maxFileBytes || info.Mode().Perm()&0o044 == 0 {
				return nil //nolint:nilerr // any other file does as well
			}
			files = append(files, machineFile{p, info.Size()})
			total += info.Size()
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("listing %s: %w", root, err)
		}
	}
	return files, nil
}

// fileLayer packs the first files up to layerBytes and returns the others.
func fileLayer(files []machineFile) (v1.Layer, []machineFile, error) {
	n := 0
	layer, err := tarLayer(func(w *tar.Writer) error {
		var packed int64
		for ; n < len(files) && packed < layerBytes; n++ {
			data, err := os.ReadFile(files[n].path)
			if err != nil {
				continue // gone, or not for this user: any other file does as well
			}
			if err := writeEntry(w, strings.TrimPrefix(files[n].path, "/"), data); err != nil {
				return err
			}
			packed += int64(len(data))
		}
		return nil
	})
	return layer, files[n:], err
}

// tarLayer is a gzip layer held in memory, since it is read several times. It
// is stored rather than compressed: the seconds of the demonstration belong to
// what it shows.
func tarLayer(fill func(*tar.Writer) error) (v1.Layer, error) {
	var buf bytes.Buffer
	zw, err := gzip.NewWriterLevel(&buf, gzip.NoCompression)
	if err != nil {
		return nil, err
	}
	tw := tar.NewWriter(zw)
	if err := fill(tw); err != nil {
		return nil, err
	}
	if err := errors.Join(tw.Close(), zw.Close()); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buf.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer))
}

func writeEntry(w *tar.Writer, name string, data []byte) error {
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}

// loadImage reads DEMO_IMAGE: an OCI layout (a directory or a tar of one) or
// what `docker save` writes. scratch is a directory for unpacking.
func loadImage(file, scratch string) (v1.ImageIndex, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("DEMO_IMAGE: %w", err)
	}
	dir := file
	if !info.IsDir() {
		dir = filepath.Join(scratch, "layout")
		isLayout, err := unpackLayout(file, dir)
		if err != nil {
			return nil, fmt.Errorf("DEMO_IMAGE: reading %s: %w", file, err)
		}
		if !isLayout {
			return loadDockerArchive(file)
		}
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, fmt.Errorf("DEMO_IMAGE: reading the OCI layout %s: %w", file, err)
	}
	return onlyImage(index)
}

// onlyImage steps into a layout's index.json, which lists images: the first of
// them is taken, as an index if it is one.
func onlyImage(index v1.ImageIndex) (v1.ImageIndex, error) {
	m, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("DEMO_IMAGE: %w", err)
	}
	for _, d := range m.Manifests {
		if d.MediaType.IsIndex() {
			return index.ImageIndex(d.Digest)
		}
	}
	for _, d := range m.Manifests {
		if d.MediaType.IsImage() {
			img, err := index.Image(d.Digest)
			if err != nil {
				return nil, fmt.Errorf("DEMO_IMAGE: %w", err)
			}
			return indexOf(img)
		}
	}
	return nil, errors.New("DEMO_IMAGE: the layout's index.json names no image")
}

func loadDockerArchive(file string) (v1.ImageIndex, error) {
	img, err := tarball.ImageFromPath(file, nil)
	if err != nil {
		return nil, fmt.Errorf("DEMO_IMAGE: %s is neither an OCI layout nor a docker archive of one image: %w", file, err)
	}
	return indexOf(img)
}

func indexOf(img v1.Image) (v1.ImageIndex, error) {
	config, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("DEMO_IMAGE: reading the image's config: %w", err)
	}
	p := v1.Platform{OS: config.OS, Architecture: config.Architecture, Variant: config.Variant}
	return mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p}}), nil
}

// unpackLayout unpacks a tar into dir if it holds an OCI layout.
func unpackLayout(file, dir string) (isLayout bool, err error) {
	f, err := os.Open(file)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return false, err
	}
	// A root keeps a hostile archive's ".." and symbolic links inside dir.
	root, err := os.OpenRoot(dir)
	if err != nil {
		return false, err
	}
	defer root.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return isLayout, nil
		}
		if err != nil {
			return false, err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		name := path.Clean(h.Name)
		isLayout = isLayout || name == "oci-layout"
		if err := unpackFile(root, name, r); err != nil {
			return false, err
		}
	}
}

func unpackFile(root *os.Root, name string, r io.Reader) error {
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := root.Create(name)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
