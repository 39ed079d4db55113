package syncer

import (
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"regexp"
	"slices"
	"strings"

	"github.com/distribution/distribution/v3/manifest/manifestlist"
	"github.com/distribution/distribution/v3/manifest/schema2"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// acceptManifests are the kinds of manifest that can be stored, as an Accept
// header.
var acceptManifests = strings.Join([]string{
	v1.MediaTypeImageIndex, manifestlist.MediaTypeManifestList, v1.MediaTypeImageManifest, schema2.MediaTypeManifest,
}, ", ")

// manifest is a manifest of any kind: what it needs, and its bytes.
type manifest struct {
	mediaType string
	body      []byte
	// children are the manifests that an index lists.
	children []v1.Descriptor
	// blobs are the config and layers, without those that are fetched from
	// elsewhere.
	blobs []v1.Descriptor
	// subject is what it refers to, if anything.
	subject *v1.Descriptor
}

func (m manifest) isIndex() bool { return isIndexType(m.mediaType) }

func isIndexType(mediaType string) bool {
	return mediaType == v1.MediaTypeImageIndex || mediaType == manifestlist.MediaTypeManifestList
}

func isManifestType(mediaType string) bool {
	return mediaType == v1.MediaTypeImageManifest || mediaType == schema2.MediaTypeManifest || isIndexType(mediaType)
}

// parseManifest reads a manifest that was sent with a Content-Type.
func parseManifest(contentType string, body []byte) (manifest, error) {
	var doc struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Config        *v1.Descriptor  `json:"config"`
		Layers        []v1.Descriptor `json:"layers"`
		Manifests     []v1.Descriptor `json:"manifests"`
		FSLayers      json.RawMessage `json:"fsLayers"`
		Subject       *v1.Descriptor  `json:"subject"`
	}
	if err := json.Unmarshal(body, &doc); err != nil {
		return manifest{}, errors.New("it is not a manifest in JSON")
	}
	if doc.SchemaVersion == 1 || doc.FSLayers != nil {
		return manifest{}, errors.New("it is a manifest of schema 1, which no current runtime pulls: push the image again with a current tool")
	}
	if doc.SchemaVersion != 2 {
		return manifest{}, errors.New("it is not a manifest")
	}
	isIndex := doc.Manifests != nil
	if isIndex && (doc.Config != nil || doc.Layers != nil) {
		// What is an image to one reader must not be an index to another.
		return manifest{}, errors.New("it is an index and an image at once")
	}
	mediaType, err := manifestType(contentType, doc.MediaType, isIndex)
	if err != nil {
		return manifest{}, err
	}
	m := manifest{
		mediaType: mediaType,
		body:      body,
		children:  doc.Manifests,
		subject:   doc.Subject,
	}
	if !isIndex {
		if doc.Config == nil {
			return manifest{}, errors.New("it has no config")
		}
		for _, desc := range append([]v1.Descriptor{*doc.Config}, doc.Layers...) {
			if !isForeign(desc) {
				m.blobs = append(m.blobs, desc)
			}
		}
	}
	return m, m.check()
}

// manifestType settles what kind of manifest it is between what it was sent as,
// what it says itself, and what it looks like.
func manifestType(contentType, own string, isIndex bool) (string, error) {
	sent, _, _ := mime.ParseMediaType(contentType)
	if !isManifestType(sent) {
		sent = "" // application/json, text/plain and the like say nothing
	}
	if sent != "" && own != "" && sent != own {
		return "", fmt.Errorf("it was sent as %s and says that it is %s", sent, oneLine(own))
	}
	mediaType := sent
	switch {
	case own != "":
		mediaType = own
	case sent == "" && isIndex:
		mediaType = v1.MediaTypeImageIndex
	case sent == "":
		mediaType = v1.MediaTypeImageManifest
	}
	if !isManifestType(mediaType) {
		return "", fmt.Errorf("its kind, %s, cannot be stored", oneLine(mediaType))
	}
	if isIndexType(mediaType) != isIndex {
		return "", fmt.Errorf("it is not the %s that it says it is", mediaType)
	}
	return mediaType, nil
}

func (m manifest) check() error {
	for _, desc := range m.children {
		if err := checkDescriptor(desc); err != nil {
			return err
		}
		if desc.Digest.Algorithm() != digest.SHA256 {
			return fmt.Errorf("it lists %s, and only sha256 can be stored", desc.Digest)
		}
	}
	for _, desc := range m.blobs {
		if err := checkDescriptor(desc); err != nil {
			return err
		}
	}
	if m.subject != nil {
		return checkDescriptor(*m.subject)
	}
	return nil
}

func checkDescriptor(desc v1.Descriptor) error {
	if desc.Digest.Validate() != nil {
		return errors.New("it lists something by what is not a digest")
	}
	if desc.Size < 0 {
		return fmt.Errorf("it lists %s with a negative size", desc.Digest)
	}
	return nil
}

// isForeign reports whether a layer is fetched by runtimes from elsewhere, and
// is therefore not kept by registries.
func isForeign(desc v1.Descriptor) bool {
	if len(desc.URLs) == 0 {
		return false
	}
	return desc.MediaType == schema2.MediaTypeForeignLayer ||
		strings.HasPrefix(desc.MediaType, "application/vnd.oci.image.layer.nondistributable.")
}

// Annotations by which BuildKit lists attestations in an index beside the
// manifests that they are about.
const (
	attestationType    = "vnd.docker.reference.type"
	attestationSubject = "vnd.docker.reference.digest"
)

// platforms are those that are wanted. Empty: all.
type platforms []string

// selectChildren picks what an index lists for the wanted platforms: the
// manifests for these, the attestations about them, and whatever is for no
// platform in particular. An index that has platforms but none of those is an
// error.
func (wanted platforms) selectChildren(children []v1.Descriptor) ([]v1.Descriptor, error) {
	if len(wanted) == 0 {
		return children, nil
	}
	selected := make(map[digest.Digest]bool)
	var offered []string
	found := false
	for _, desc := range children {
		switch {
		case isAttestation(desc):
		case desc.Platform == nil || desc.Platform.OS == "" || desc.Platform.OS == "unknown":
			selected[desc.Digest] = true
		default:
			offered = append(offered, platformString(desc.Platform))
			if wanted.match(desc.Platform) {
				selected[desc.Digest] = true
				found = true
			}
		}
	}
	if !found && len(offered) > 0 {
		slices.Sort(offered)
		return nil, fmt.Errorf("it is not for %s, but for %s", strings.Join(wanted, ", "), oneLine(strings.Join(slices.Compact(offered), ", ")))
	}
	var result []v1.Descriptor
	for _, desc := range children {
		subject := digest.Digest(desc.Annotations[attestationSubject])
		if selected[desc.Digest] || isAttestation(desc) && selected[subject] {
			result = append(result, desc)
		}
	}
	return result, nil
}

func isAttestation(desc v1.Descriptor) bool {
	return desc.Annotations[attestationType] == "attestation-manifest"
}

// match compares a platform with the wanted ones. One without a variant takes
// every variant; arm64 is v8 whether it says so or not.
func (wanted platforms) match(p *v1.Platform) bool {
	return slices.ContainsFunc(wanted, func(w string) bool {
		os, rest, _ := strings.Cut(w, "/")
		architecture, variant, _ := strings.Cut(rest, "/")
		if p.OS != os || p.Architecture != architecture {
			return false
		}
		return variant == "" || variant == p.Variant || architecture == "arm64" && variant == "v8" && p.Variant == ""
	})
}

func platformString(p *v1.Platform) string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// referrerTag is how tags name what is about a manifest rather than what is an
// image: the referrers tag schema (distribution specification, "Referrers Tag
// Schema") and cosign's signatures, attestations and bills of materials.
var referrerTag = regexp.MustCompile(`\Asha256-[0-9a-f]{64}(?:\.(?:sig|att|sbom))?\z`)

// cosignSuffixes are appended to the referrers tag by cosign.
var cosignSuffixes = []string{".sig", ".att", ".sbom"}

// schemaTag is the tag under which the referrers tag schema lists what refers
// to d.
func schemaTag(d digest.Digest) string { return d.Algorithm().String() + "-" + d.Encoded() }

// ociError is the first error of an OCI error body ("CODE: message"), or "".
func ociError(body []byte) string {
	var doc struct {
		Errors []struct{ Code, Message string } `json:"errors"`
	}
	if json.Unmarshal(body, &doc) != nil || len(doc.Errors) == 0 {
		return ""
	}
	return oneLine(strings.TrimSuffix(doc.Errors[0].Code+": "+doc.Errors[0].Message, ": "))
}
