package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage"
)

const (
	imageName    = "bench/image"
	manifestType = "application/vnd.oci.image.manifest.v1+json"
	layerSize    = 256 << 20
	largeSize    = 1 << 30
	largeCount   = 4
)

// content is what is stored in the registry.
type content struct {
	manifest       []byte
	manifestDigest digest.Digest
	layer          digest.Digest   // of layerSize bytes
	large          []digest.Digest // of largeSize bytes and a few more
	layerFile      string
}

func (c content) manifestPath() string { return "/v2/" + imageName + "/manifests/latest" }
func (c content) manifestByDigest() string {
	return "/v2/" + imageName + "/manifests/" + c.manifestDigest.String()
}
func blobPath(d digest.Digest) string { return "/v2/" + imageName + "/blobs/" + d.String() }

// seed fills the store at root with an image whose manifest is as large as a
// common one's.
func seed(ctx context.Context, root string) (content, error) {
	store, err := storage.Open(ctx, storage.Config{Root: root})
	if err != nil {
		return content{}, err
	}
	defer store.Close()
	repo, err := store.Repository(imageName)
	if err != nil {
		return content{}, err
	}
	var c content
	if c.layer, c.layerFile, err = writeLayer(root); err != nil {
		return content{}, err
	}
	if c.large, err = writeLarge(root, largeCount); err != nil {
		return content{}, err
	}
	for _, d := range append(c.large, c.layer) {
		if err := repo.LinkLayer(ctx, d); err != nil {
			return content{}, fmt.Errorf("linking layer %s: %w", d, err)
		}
	}
	c.manifest = manifest()
	c.manifestDigest = digest.FromBytes(c.manifest)
	return c, repo.PutManifest(ctx, c.manifestDigest, c.manifest, "latest")
}

func manifest() []byte {
	var layers string
	for i := range 12 {
		layers += fmt.Sprintf(`,{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","size":%d,"digest":%q}`, 1<<20+i, digest.FromString(fmt.Sprint(i)))
	}
	return fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","size":2,"digest":%q},"layers":[%s]}`,
		manifestType, digest.FromString("{}"), layers[1:])
}

// writeLayer stores a layer of random bytes.
func writeLayer(root string) (digest.Digest, string, error) {
	f, err := os.CreateTemp(root, "layer-")
	if err != nil {
		return "", "", err
	}
	defer f.Close()
	hash := sha256.New()
	random := rand.NewChaCha8([32]byte{})
	if _, err := io.CopyN(io.MultiWriter(f, hash), random, layerSize); err != nil {
		return "", "", err
	}
	d := digest.NewDigest(digest.SHA256, hash)
	path, err := place(root, f, d)
	return d, path, err
}

// writeLarge stores layers that take no time to write: zeros, of which the disk
// holds none.
func writeLarge(root string, count int) (all []digest.Digest, err error) {
	hash := sha256.New()
	chunk := make([]byte, 1<<20)
	for range largeSize / len(chunk) {
		hash.Write(chunk)
	}
	for i := range count {
		const more = 4096
		hash.Write(chunk[:more])
		d := digest.NewDigest(digest.SHA256, hash)
		f, err := os.CreateTemp(root, "layer-")
		if err != nil {
			return nil, err
		}
		if err = f.Truncate(largeSize + int64(i+1)*more); err == nil {
			_, err = place(root, f, d)
		}
		f.Close()
		if err != nil {
			return nil, err
		}
		all = append(all, d)
	}
	return all, nil
}

// place seals a file as content of d, which it is, and moves it where
// distribution's layout has it.
func place(root string, f *os.File, d digest.Digest) (string, error) {
	if err := storage.Seal(f, d); err != nil {
		return "", err
	}
	path := filepath.Join(root, "docker/registry/v2/blobs", d.Algorithm().String(), d.Encoded()[:2], d.Encoded(), "data")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	if err := os.Chmod(f.Name(), 0o644); err != nil { // nginx's workers have a user of their own
		return "", err
	}
	return path, os.Rename(f.Name(), path)
}

// fillCache puts so many small blobs into the directory of a node cache that is
// not running.
func fillCache(dir string, blobs int) error {
	body := make([]byte, 512)
	for i := range blobs {
		binary.BigEndian.PutUint64(body, uint64(i))
		d := digest.FromBytes(body)
		path := filepath.Join(dir, "blobs", d.Algorithm().String(), d.Encoded()[:2], d.Encoded())
		if i < 4096 { // by then every directory is there
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				return err
			}
		}
		if err := os.WriteFile(path, body, 0o600); err != nil {
			return err
		}
		if err := os.Chtimes(path, time.Now(), storage.SealTime(d)); err != nil {
			return err
		}
	}
	return nil
}
