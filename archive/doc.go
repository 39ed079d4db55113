// Package archive carries content to machines without a network: it writes what
// a store holds into one file and serves such a file as a registry, so that a
// syncer can bring the content into another store with the care that it takes of
// any parent: verified, resumed, children before parents and tags last.
//
// The file is an OCI image layout (OCI image specification, "Image Layout") in a
// tar archive that is not compressed, since layers are already. A manifest with
// a tag stands in index.json under the annotation
// org.opencontainers.image.ref.name as REPOSITORY:TAG; a referrer stands there
// with the annotations of [RepositoryAnnotation] and [SubjectAnnotation].
//
// It may import storage and api.
package archive

import v1 "github.com/opencontainers/image-spec/specs-go/v1"

// Annotations of descriptors in index.json.
const (
	// NameAnnotation holds REPOSITORY:TAG.
	NameAnnotation = v1.AnnotationRefName
	// RepositoryAnnotation holds the repository of a manifest without a tag.
	RepositoryAnnotation = "connectedregistry.io/repository"
	// SubjectAnnotation holds the digest that a referrer refers to.
	SubjectAnnotation = "connectedregistry.io/subject"
)

const (
	// maxManifest is what the registry takes as a manifest at most, in bytes.
	maxManifest = 4 << 20
	// maxIndex bounds index.json: some 300,000 tags.
	maxIndex = 128 << 20
)
