package clients

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	orasgo "oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

const (
	sbomType      = "application/vnd.example.sbom.v1"
	signatureType = "application/vnd.example.signature.v1"
)

// TestReferrers attaches an SBOM and a signature to an image, and a signature to
// the SBOM, finds them by type, brings them along with the image, and takes them
// away again.
func TestReferrers(t *testing.T) {
	s := newSite(t, t.TempDir(), v1alpha1.ModeReadWrite)
	image, _ := newImage(t)
	where := s.host + "/team/signed"
	if err := oras.push(t, s, writer, image, where+":v1"); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	write := orasMust(t, s, writer, where)
	subject, err := write.Resolve(ctx, "v1")
	if err != nil {
		t.Fatal(err)
	}
	sbom := attach(t, write, sbomType, subject, "components")
	signature := attach(t, write, signatureType, subject, "signature")
	ofSBOM := attach(t, write, signatureType, sbom, "signature of the components")

	read := orasMust(t, s, reader, where)
	want := func(of ocispec.Descriptor, artifactType string, all ...ocispec.Descriptor) {
		t.Helper()
		if diff := cmp.Diff(digests(all), referrers(t, read, of, artifactType)); diff != "" {
			t.Errorf("referrers of type %q (-want +got):\n%s", artifactType, diff)
		}
	}
	want(subject, "", sbom, signature)
	want(subject, sbomType, sbom)
	want(subject, "application/vnd.example.other")
	want(sbom, "", ofSBOM)
	if tags, err := oras.tags(t, s, reader, where); err != nil || len(tags) != 1 {
		t.Errorf("tags are %q, %v; a registry with referrers needs no tag for them", tags, err)
	}

	copied := memory.New()
	if _, err := orasgo.ExtendedCopy(ctx, read, "v1", copied, "v1", orasgo.DefaultExtendedCopyOptions); err != nil {
		t.Fatalf("copying the image with its referrers: %v", err)
	}
	for _, d := range []ocispec.Descriptor{subject, sbom, signature, ofSBOM} {
		if ok, err := copied.Exists(ctx, d); !ok {
			t.Errorf("%s was not copied along: %v", d.ArtifactType, err)
		}
	}

	if err := write.Delete(ctx, signature); err != nil {
		t.Fatalf("deleting the signature: %v", err)
	}
	want(subject, "", sbom)
}

// TestReferrerFirst attaches a signature to an image that is not there yet.
func TestReferrerFirst(t *testing.T) {
	s := newSite(t, t.TempDir(), v1alpha1.ModeReadWrite)
	image, _ := newImage(t)
	where := s.host + "/team/late"
	if err := oras.push(t, s, writer, image, s.host+"/team/other:v1"); err != nil {
		t.Fatal(err)
	}
	subject, err := orasMust(t, s, writer, s.host+"/team/other").Resolve(t.Context(), "v1")
	if err != nil {
		t.Fatal(err)
	}
	late := orasMust(t, s, writer, where)
	signature := attach(t, late, signatureType, subject, "signature")
	for range 2 {
		if diff := cmp.Diff(digests([]ocispec.Descriptor{signature}), referrers(t, late, subject, "")); diff != "" {
			t.Errorf("referrers (-want +got):\n%s", diff)
		}
		if err := oras.push(t, s, writer, image, where+":v1"); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSignatureTag signs as cosign does for registries without referrers: a
// manifest tagged after the digest that it signs. The referrers that
// go-containerregistry, cosign's library, lists are those of the API.
func TestSignatureTag(t *testing.T) {
	s := newSite(t, t.TempDir(), v1alpha1.ModeReadWrite)
	image, _ := newImage(t)
	where := s.host + "/team/cosigned"
	if err := crane.push(t, s, writer, image, where+":v1"); err != nil {
		t.Fatal(err)
	}
	repo := orasMust(t, s, writer, where)
	subject, err := repo.Resolve(t.Context(), "v1")
	if err != nil {
		t.Fatal(err)
	}
	tag := fmt.Sprintf("%s-%s.sig", subject.Digest.Algorithm(), subject.Digest.Encoded())
	signature := attach(t, repo, signatureType, ocispec.Descriptor{}, "signature")
	if err := repo.Tag(t.Context(), signature, tag); err != nil {
		t.Fatal(err)
	}
	attached := attach(t, repo, signatureType, subject, "another signature")

	options := []ggcr.Option{
		ggcr.WithTransport(s.httpClient(t).Transport),
		ggcr.WithAuth(&authn.Basic{Username: reader.user, Password: reader.password}),
		ggcr.WithContext(t.Context()),
	}
	ref, err := name.ParseReference(where + ":" + tag)
	if err != nil {
		t.Fatal(err)
	}
	found, err := ggcr.Get(ref, options...)
	if err != nil || found.Digest.String() != signature.Digest.String() {
		t.Errorf("the signature's tag names %v, %v; want %s", found, err, signature.Digest)
	}
	index, err := ggcr.Referrers(ref.Context().Digest(subject.Digest.String()), options...)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(manifest.Manifests) != 1 || manifest.Manifests[0].Digest.String() != attached.Digest.String() {
		t.Errorf("referrers are %v, want %s", manifest.Manifests, attached.Digest)
	}
}

func orasMust(t *testing.T, s *site, l login, name string) *remote.Repository {
	t.Helper()
	r, err := orasRepository(t, s, l, name)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// attach pushes an artifact that refers to subject, or to nothing.
func attach(t *testing.T, r *remote.Repository, artifactType string, subject ocispec.Descriptor, text string) ocispec.Descriptor {
	t.Helper()
	ctx := t.Context()
	layer := ocispec.Descriptor{MediaType: "text/plain", Digest: digest.FromString(text), Size: int64(len(text))}
	if err := r.Push(ctx, layer, bytes.NewReader([]byte(text))); err != nil {
		t.Fatal(err)
	}
	options := orasgo.PackManifestOptions{Layers: []ocispec.Descriptor{layer}}
	if subject.Digest != "" {
		options.Subject = &subject
	}
	d, err := orasgo.PackManifest(ctx, r, orasgo.PackManifestVersion1_1, artifactType, options)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// referrers lists them by the API: oras is not to fall back on the tag that
// registries without it are given.
func referrers(t *testing.T, r *remote.Repository, of ocispec.Descriptor, artifactType string) []digest.Digest {
	t.Helper()
	if err := r.SetReferrersCapability(true); err != nil {
		t.Fatal(err)
	}
	found := []ocispec.Descriptor{}
	err := r.Referrers(t.Context(), of, artifactType, func(page []ocispec.Descriptor) error {
		found = append(found, page...)
		return nil
	})
	if err != nil {
		t.Fatalf("listing referrers: %v", err)
	}
	return digests(found)
}

func digests(all []ocispec.Descriptor) []digest.Digest {
	set := map[digest.Digest]bool{}
	for _, d := range all {
		set[d.Digest] = true
	}
	return slices.Sorted(maps.Keys(set))
}
