package replicas

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"runtime"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// image is one to push: its layers, its configuration and its manifest.
type image struct {
	layers   []blob
	config   blob
	manifest blob
}

type blob struct {
	ocispec.Descriptor
	content []byte
}

func (i *image) blobs() []blob { return append(i.layers[:len(i.layers):len(i.layers)], i.config) }

func newBlob(mediaType string, content []byte) blob {
	return blob{ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}, content}
}

// pool are layers that images share, so that they are pushed, deleted and pushed
// again in many repositories.
func pool(sizes ...int) []blob {
	var layers []blob
	for i, size := range sizes {
		layers = append(layers, newLayer(uint64(i), size))
	}
	return layers
}

// newLayer is a layer with one file of noise, which depends on its number alone.
func newLayer(number uint64, size int) blob {
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], number)
	noise := make([]byte, size)
	_, _ = rand.NewChaCha8(seed).Read(noise)
	var packed bytes.Buffer
	zip, _ := gzip.NewWriterLevel(&packed, gzip.HuffmanOnly)
	archive := tar.NewWriter(zip)
	err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("layer-%d", number), Mode: 0o644, Size: int64(size)})
	if err == nil {
		_, err = archive.Write(noise)
	}
	if err == nil {
		err = archive.Close()
	}
	if err == nil {
		err = zip.Close()
	}
	if err != nil {
		panic(err) // into memory
	}
	return newBlob(ocispec.MediaTypeImageLayerGzip, packed.Bytes())
}

// newImage makes an image of layers. Its note makes it another than those of the
// same layers.
func newImage(layers []blob, note string) *image {
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, Author: note}
	config.RootFS.Type = "layers"
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, unpackedDigest(l))
		manifest.Layers = append(manifest.Layers, l.Descriptor)
	}
	i := &image{layers: layers, config: newBlob(ocispec.MediaTypeImageConfig, encode(config))}
	manifest.Config = i.config.Descriptor
	i.manifest = newBlob(ocispec.MediaTypeImageManifest, encode(manifest))
	return i
}

func unpackedDigest(layer blob) digest.Digest {
	zip, err := gzip.NewReader(bytes.NewReader(layer.content))
	if err != nil {
		panic(err) // packed above
	}
	d, err := digest.FromReader(zip)
	if err != nil {
		panic(err)
	}
	return d
}

func encode(v any) []byte {
	content, err := json.Marshal(v)
	if err != nil {
		panic(err) // plain structs
	}
	return content
}
