package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/connected-registry/connected-registry/storage"
)

const (
	pullName   = "bench/pull"
	pullLayers = 8
	pullLayer  = 128 << 20 // unpacked
)

// pullImage is an image in the registry's store, of 1 GiB when unpacked.
type pullImage struct {
	manifest digest.Digest
	config   digest.Digest
	layers   []digest.Digest
	size     int64 // of the layers, as they are transferred
}

// pullLayerFile is a compressed layer.
type pullLayerFile struct {
	ocispec.Descriptor
	diffID digest.Digest
}

// seedPull writes the image when a case first needs it.
func (b *benchmark) seedPull() (pullImage, error) {
	if b.pullImage.manifest != "" {
		return b.pullImage, nil
	}
	ctx := context.Background()
	root := filepath.Join(b.data(), "registry")
	store, err := storage.Open(ctx, storage.Config{Root: root})
	if err != nil {
		return pullImage{}, err
	}
	defer store.Close()
	repo, err := store.Repository(pullName)
	if err != nil {
		return pullImage{}, err
	}
	made, body, err := writeImage(root)
	if err != nil {
		return pullImage{}, err
	}
	for _, d := range append(made.layers, made.config) {
		if err := repo.LinkLayer(ctx, d); err != nil {
			return pullImage{}, err
		}
	}
	b.pullImage = made
	return made, repo.PutManifest(ctx, made.manifest, body, "latest")
}

// writeImage stores the layers and the config, and returns the manifest for them.
func writeImage(root string) (made pullImage, manifest []byte, err error) {
	files, err := systemFiles()
	if err != nil {
		return made, nil, err
	}
	layers := make([]pullLayerFile, pullLayers)
	next := make(chan int, pullLayers)
	for i := range layers {
		next <- i
	}
	close(next)
	err = each(runtime.NumCPU(), func(*sync.Mutex) (err error) {
		for i := range next {
			if layers[i], err = writeTar(root, files, i); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return made, nil, err
	}
	config := ocispec.Image{Platform: platforms.DefaultSpec(), RootFS: ocispec.RootFS{Type: "layers"}}
	list := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: manifestType}
	for _, l := range layers {
		made.layers = append(made.layers, l.Digest)
		made.size += l.Size
		list.Layers = append(list.Layers, l.Descriptor)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.diffID)
	}
	said, err := json.Marshal(config)
	if err != nil {
		return made, nil, err
	}
	if made.config, err = seedBlob(root, bytes.NewReader(said)); err != nil {
		return made, nil, err
	}
	list.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: made.config, Size: int64(len(said))}
	manifest, err = json.Marshal(list)
	made.manifest = digest.FromBytes(manifest)
	return made, manifest, err
}

// systemFiles are the files that layers are made of: those of this machine,
// which are much like what images hold.
func systemFiles() (files []string, err error) {
	const largest = 32 << 20
	for _, root := range []string{"/usr/lib", "/usr/share", "/usr/bin"} {
		err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() {
				return nil // what cannot be read is not needed
			}
			if fi, err := entry.Info(); err == nil && fi.Size() <= largest {
				files = append(files, path)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	if len(files) == 0 {
		return nil, errors.New("there are no files below /usr to make an image of")
	}
	return files, nil
}

// writeTar stores layer number i: its share of the files, and more where they
// are few, until it is as large as it should be.
func writeTar(root string, files []string, i int) (made pullLayerFile, err error) {
	r, w := io.Pipe()
	diffID := digest.Canonical.Digester()
	go func() {
		gz := gzip.NewWriter(w)
		unpacked := &counted{Writer: io.MultiWriter(gz, diffID.Hash())}
		archive := tar.NewWriter(unpacked)
		first := i * len(files) / pullLayers
		var err error
		for n := 0; err == nil && unpacked.n < pullLayer; n++ {
			round, at := n/len(files), (first+n)%len(files)
			err = addFile(archive, files[at], fmt.Sprintf("layer-%d-%d", i, round))
		}
		w.CloseWithError(errors.Join(err, archive.Close(), gz.Close()))
	}()
	size := &counted{Writer: io.Discard}
	made.Digest, err = seedBlob(root, io.TeeReader(r, size))
	r.CloseWithError(err)
	made.MediaType, made.Size, made.diffID = ocispec.MediaTypeImageLayerGzip, size.n, diffID.Digest()
	return made, err
}

// addFile adds a file below dir; one that cannot be read is left out.
func addFile(archive *tar.Writer, path, dir string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil //nolint:nilerr // there are others
	}
	header := &tar.Header{Name: dir + "/" + strings.TrimPrefix(path, "/"), Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}
	if err := archive.WriteHeader(header); err != nil {
		return err
	}
	_, err = archive.Write(content)
	return err
}

type counted struct {
	io.Writer
	n int64
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.Writer.Write(p)
	c.n += int64(n)
	return n, err
}

func seedBlob(root string, content io.Reader) (digest.Digest, error) {
	f, err := os.CreateTemp(root, "layer-")
	if err != nil {
		return "", err
	}
	defer f.Close()
	digester := digest.Canonical.Digester()
	if _, err := io.Copy(io.MultiWriter(f, digester.Hash()), content); err != nil {
		return "", err
	}
	_, err = place(root, f, digester.Digest())
	return digester.Digest(), err
}
