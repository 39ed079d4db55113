package registry

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// attach pushes an artifact of a type that refers to subject.
func (c *client) attach(repo string, subject digest.Digest, artifactType, note string) digest.Digest {
	c.t.Helper()
	config := c.pushBlob(repo, []byte("{}"))
	m := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":%q,"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2},"layers":[],"subject":{"mediaType":%q,"digest":%q,"size":1},"annotations":{"note":%q}}`,
		typeOCIManifest, artifactType, config, typeOCIManifest, subject, note)
	d := digest.FromString(m)
	a := c.want(c.do("PUT", "/v2/"+repo+"/manifests/"+d.String(), m, "Content-Type", typeOCIManifest), 201, "")
	if got := a.header.Get("OCI-Subject"); got != subject.String() {
		c.t.Errorf("OCI-Subject %q, want %s", got, subject)
	}
	return d
}

// referrers follows the pages of a list of referrers.
func (c *client) referrers(path string) (all []v1.Descriptor, pages int) {
	c.t.Helper()
	for path != "" {
		a := c.want(c.do("GET", path, nil), 200, "")
		var index v1.Index
		if err := json.Unmarshal(a.body, &index); err != nil {
			c.t.Fatal(err)
		}
		if index.SchemaVersion != 2 || index.MediaType != typeOCIIndex || index.Manifests == nil || a.header.Get("Content-Type") != typeOCIIndex {
			c.t.Errorf("%s: %s as %s", path, a.body, a.header.Get("Content-Type"))
		}
		if got := a.header.Get("OCI-Filters-Applied"); strings.Contains(path, "artifactType") != (got == "artifactType") {
			c.t.Errorf("%s: OCI-Filters-Applied %q", path, got)
		}
		all = append(all, index.Manifests...)
		pages++
		path = strings.TrimSuffix(strings.TrimPrefix(a.header.Get("Link"), "<"), `>; rel="next"`)
	}
	return all, pages
}

func TestReferrers(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	subject := digest.FromString("not there yet")
	path := "/v2/a/referrers/" + subject.String()
	if all, _ := c.referrers(path); len(all) != 0 {
		t.Errorf("before: %v", all)
	}
	var signatures, all []digest.Digest
	for i := range 5 {
		signatures = append(signatures, c.attach("a", subject, "sig/x", fmt.Sprint(i)))
		all = append(all, c.attach("a", subject, "sbom/x", fmt.Sprint(i)))
	}
	all = append(all, signatures...)
	slices.Sort(all)
	slices.Sort(signatures)
	for query, test := range map[string]struct {
		want  []digest.Digest
		pages int
	}{
		"":                        {all, 1},
		"?n=3":                    {all, 4},
		"?artifactType=sig/x":     {signatures, 1},
		"?artifactType=sig/x&n=2": {signatures, 3},
		"?artifactType=none":      {nil, 1},
	} {
		descs, pages := c.referrers(path + query)
		var got []digest.Digest
		for _, d := range descs {
			got = append(got, d.Digest)
			if d.Annotations["note"] == "" || d.Size == 0 || d.MediaType != typeOCIManifest || !strings.HasSuffix(d.ArtifactType, "/x") {
				t.Errorf("%s: descriptor %+v", query, d)
			}
		}
		if diff := cmp.Diff(test.want, got); diff != "" || pages != test.pages {
			t.Errorf("%s: %d pages, want %d (-want +got):\n%s", query, pages, test.pages, diff)
		}
	}
	c.want(c.do("DELETE", "/v2/a/manifests/"+signatures[0].String(), nil), 202, "")
	if left, _ := c.referrers(path + "?artifactType=sig/x"); len(left) != 4 {
		t.Errorf("after deleting one: %d", len(left))
	}
	c.want(c.do("GET", "/v2/a/referrers/nonsense", nil), 400, "DIGEST_INVALID")
	c.want(c.do("GET", path+"?n=x", nil), 400, "PAGINATION_NUMBER_INVALID")
	c.want(c.do("DELETE", path, nil), 405, "UNSUPPORTED")
	bad := `{"schemaVersion":2,"manifests":[],"subject":{"digest":"sha256:x"}}`
	c.want(c.do("PUT", "/v2/a/manifests/t", bad, "Content-Type", typeOCIIndex), 400, "MANIFEST_INVALID")
}

// Clients take no index above 4 MiB, whatever the annotations.
func TestReferrersPagesAreBounded(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	subject := digest.FromString("subject")
	for i := range 4 {
		c.attach("a", subject, "sig/x", strings.Repeat("x", 1500<<10)+fmt.Sprint(i))
	}
	all, pages := c.referrers("/v2/a/referrers/" + subject.String())
	if len(all) != 4 || pages != 2 {
		t.Errorf("%d on %d pages, want 4 on 2", len(all), pages)
	}
}

func TestReferrersWithGGCR(t *testing.T) {
	host, tr := startTLS(t, Config{})
	repo, err := name.NewRepository(host + "/signed")
	if err != nil {
		t.Fatal(err)
	}
	img, err := random.Image(1000, 1)
	if err != nil {
		t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(repo.Digest(d.String()), img, remote.WithTransport(tr)); err != nil {
		t.Fatal(err)
	}
	size, err := img.Size()
	if err != nil {
		t.Fatal(err)
	}
	signature := mutate.Subject(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), "application/signature"),
		ggcr.Descriptor{MediaType: types.DockerManifestSchema2, Digest: d, Size: size}).(ggcr.Image)
	if err := remote.Write(repo.Tag("sig"), signature, remote.WithTransport(tr)); err != nil {
		t.Fatal(err)
	}
	index, err := remote.Referrers(repo.Digest(d.String()), remote.WithTransport(tr))
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil || len(m.Manifests) != 1 || m.Manifests[0].ArtifactType != "application/signature" {
		t.Errorf("%+v, %v", m, err)
	}
	// The client was told that it need not keep a list under a tag.
	tags, err := remote.List(repo, remote.WithTransport(tr))
	if diff := cmp.Diff([]string{"sig"}, tags); diff != "" || err != nil {
		t.Errorf("tags: %v (-want +got):\n%s", err, diff)
	}
}
