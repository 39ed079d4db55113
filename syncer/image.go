package syncer

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bounds of what a single image may make us hold in memory.
const (
	maxNesting       = 4        // how deep indexes list indexes
	maxManifestBytes = 32 << 20 // of all its manifests
)

// image is everything that a manifest needs.
type image struct {
	// manifests are the manifest itself and those below it, each after what it
	// lists.
	manifests []node
	// blobs are what the manifests need, each once.
	blobs []v1.Descriptor
}

// node is a manifest of an image.
type node struct {
	manifest
	digest digest.Digest
	stored bool // it is in the repository already
}

// source finds a manifest by its digest, and says whether it is stored here.
type source func(ctx context.Context, d digest.Digest) (m manifest, stored bool, err error)

// walk finds everything that a manifest needs on the wanted platforms.
func walk(ctx context.Context, root digest.Digest, wanted platforms, get source) (image, error) {
	w := walker{wanted: wanted, get: get, manifests: make(map[digest.Digest]bool), blobs: make(map[digest.Digest]int64)}
	err := w.visit(ctx, v1.Descriptor{Digest: root, Size: -1}, 0)
	return w.image, err
}

type walker struct {
	wanted    platforms
	get       source
	image     image
	manifests map[digest.Digest]bool
	bytes     int                     // of the manifests
	blobs     map[digest.Digest]int64 // sizes
}

// visit adds a manifest after what it lists. A size below 0 is not known.
func (w *walker) visit(ctx context.Context, desc v1.Descriptor, depth int) error {
	if w.manifests[desc.Digest] {
		return nil
	}
	w.manifests[desc.Digest] = true
	if depth > maxNesting {
		return errContent{fmt.Sprintf("%s: indexes list indexes more than %d levels deep", desc.Digest, maxNesting)}
	}
	m, stored, err := w.get(ctx, desc.Digest)
	if err != nil {
		return err
	}
	if w.bytes += len(m.body); w.bytes > maxManifestBytes {
		return errContent{fmt.Sprintf("it has more than %d bytes of manifests", maxManifestBytes)}
	}
	if size := int64(len(m.body)); desc.Size >= 0 && desc.Size != size {
		return errSize{desc.Digest, desc.Size, size}
	}
	children, err := w.wanted.selectChildren(m.children)
	if err != nil {
		return errContent{fmt.Sprintf("%s: %s", desc.Digest, err)}
	}
	for _, child := range children {
		if isBlobType(child.MediaType) {
			err = w.addBlob(child)
		} else {
			err = w.visit(ctx, child, depth+1)
		}
		if err != nil {
			return err
		}
	}
	for _, blob := range m.blobs {
		if err := w.addBlob(blob); err != nil {
			return err
		}
	}
	w.image.manifests = append(w.image.manifests, node{m, desc.Digest, stored})
	return nil
}

func (w *walker) addBlob(desc v1.Descriptor) error {
	size, ok := w.blobs[desc.Digest]
	if ok && size != desc.Size {
		return errSize{desc.Digest, desc.Size, size}
	}
	if !ok {
		w.blobs[desc.Digest] = desc.Size
		w.image.blobs = append(w.image.blobs, desc)
	}
	return nil
}

// isBlobType reports whether an index lists something as what is certainly no
// manifest (image specification, "Image Index": its entries may be of any kind).
func isBlobType(mediaType string) bool {
	switch mediaType {
	case v1.MediaTypeImageLayer, v1.MediaTypeImageLayerGzip, v1.MediaTypeImageLayerZstd, v1.MediaTypeImageConfig, v1.MediaTypeEmptyJSON:
		return true
	}
	return false
}

// errNotHere is returned by a source that does not ask the parent.
var errNotHere = errors.New("not here")

// errContent reports content that is at odds with itself, or with what is
// wanted.
type errContent struct{ message string }

func (e errContent) Error() string { return e.message }
