package syncer

import (
	"encoding/json"
	"iter"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/registry"
	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

// multiPlatform is an index of three platforms, with an attestation for two of
// them as BuildKit makes it.
func multiPlatform(t *testing.T) (index ggcr.ImageIndex, images map[string]ggcr.Image) {
	t.Helper()
	images = make(map[string]ggcr.Image)
	index = mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for i, platform := range []string{"linux/amd64", "linux/arm64/v8", "linux/arm/v7"} {
		parts := strings.Split(platform+"/", "/")
		img := testImage(t, platform, testLayer(uint64(100+i), 10_000*(i+1)))
		images[platform] = img
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: ggcr.Descriptor{
			Platform: &ggcr.Platform{OS: parts[0], Architecture: parts[1], Variant: parts[2]},
		}})
	}
	for _, platform := range []string{"linux/amd64", "linux/arm/v7"} {
		attestation := testImage(t, "attestation of "+platform, testLayer(uint64(len(platform)), 500))
		images["attestation of "+platform] = attestation
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: attestation, Descriptor: ggcr.Descriptor{
			Platform:    &ggcr.Platform{OS: "unknown", Architecture: "unknown"},
			Annotations: map[string]string{attestationType: "attestation-manifest", attestationSubject: digestOf(t, images[platform]).String()},
		}})
	}
	return index, images
}

func TestSyncPlatforms(t *testing.T) {
	index, images := multiPlatform(t)
	tests := []struct {
		platforms []string
		want      []string
	}{
		{nil, []string{"linux/amd64", "linux/arm64/v8", "linux/arm/v7", "attestation of linux/amd64", "attestation of linux/arm/v7"}},
		{[]string{"linux/amd64"}, []string{"linux/amd64", "attestation of linux/amd64"}},
		{[]string{"linux/arm64"}, []string{"linux/arm64/v8"}},
		{[]string{"linux/arm64/v8", "linux/s390x"}, []string{"linux/arm64/v8"}},
		{[]string{"linux/arm/v7", "linux/amd64"}, []string{"linux/amd64", "linux/arm/v7", "attestation of linux/amd64", "attestation of linux/arm/v7"}},
	}
	for _, tt := range tests {
		t.Run(strings.Join(tt.platforms, " "), func(t *testing.T) {
			p := newTestParent(t)
			want := p.pushIndex(t, "app:1", index)
			f := newFixture(t, p, v1alpha1.Repository{Name: "app", Platforms: tt.platforms})
			f.mustSync(t)
			if got := f.tagDigest(t, "app", "1"); got != want {
				t.Errorf("the tag stands for %s, want %s", got, want)
			}
			var size int64
			r := f.repository("app")
			for platform, img := range images {
				_, _, err := r.stored(t.Context(), digestOf(t, img))
				if here := err == nil; here != slices.Contains(tt.want, platform) {
					t.Errorf("%s is here: %t", platform, here)
				}
				if err == nil {
					size += uniqueBytes(t, img)
					f.verifyHere(t, "app", digestOf(t, img), nil)
				}
			}
			if p.bytesSent() != size {
				t.Errorf("%d bytes were sent, want %d", p.bytesSent(), size)
			}
			p.reset()
			f.mustSync(t)
			if got := p.asked("^GET .*/(blobs|manifests)/"); len(got) != 0 {
				t.Errorf("the second time: %s", got)
			}
		})
	}
}

func TestSyncPlatformsAdded(t *testing.T) {
	index, _ := multiPlatform(t)
	p := newTestParent(t)
	d := p.pushIndex(t, "app:1", index)
	root := t.TempDir()
	one := newFixtureAt(t, root, p, func(c *Config) {
		c.Repositories = []v1alpha1.Repository{{Name: "app", Platforms: []string{"linux/amd64"}}}
	})
	one.mustSync(t)
	both := newFixtureAt(t, root, p, func(c *Config) {
		c.Repositories = []v1alpha1.Repository{{Name: "app", Platforms: []string{"linux/amd64", "linux/arm64"}}}
	})
	p.reset()
	both.mustSync(t)
	if got := len(p.asked("^GET .*/blobs/")); got != 2 {
		t.Errorf("%d blobs were asked for, want the config and layer of arm64", got)
	}
	both.verifyHere(t, "app", d, platforms{"linux/amd64", "linux/arm64"})
}

func TestSyncPlatformsMissing(t *testing.T) {
	index, _ := multiPlatform(t)
	p := newTestParent(t)
	d := p.pushIndex(t, "app:1", index)
	f := newFixture(t, p, v1alpha1.Repository{Name: "app", Platforms: []string{"linux/s390x", "windows/amd64"}})
	_, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
	want := "app:1: " + d.String() + ": it is not for linux/s390x, windows/amd64, but for linux/amd64, linux/arm/v7, linux/arm64/v8"
	if err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	if f.tagDigest(t, "app", "1") != "" {
		t.Error("the tag was written")
	}
}

func TestSyncReferrers(t *testing.T) {
	for name, api := range map[string]bool{"API": true, "tag schema": false} {
		t.Run(name, func(t *testing.T) {
			p := newTestParent(t, registry.WithReferrersSupport(api))
			img := testImage(t, "x", testLayer(1, 1000))
			d := p.pushImage(t, "app:1", img)
			signature := attach(t, img, "application/vnd.example.signature", "signed")
			sbom := attach(t, img, "application/vnd.example.sbom", "bill")
			countersigned := attach(t, sbom, "application/vnd.example.signature", "signed bill")
			for _, a := range []ggcr.Image{signature, sbom, countersigned} {
				p.pushImage(t, "app@"+digestOf(t, a).String(), a)
			}
			cosign := testImage(t, "cosign", testLayer(2, 100))
			p.pushImage(t, "app:"+schemaTag(d)+".sig", cosign)

			f := newFixture(t, p, exactly("app")...)
			if result := f.mustSync(t); result.Repositories[0].TagsWanted != 1 {
				t.Errorf("%d tags wanted", result.Repositories[0].TagsWanted)
			}
			if got := referrersHere(t, f, d); !slices.Equal(got, sorted(digestOf(t, signature), digestOf(t, sbom))) {
				t.Errorf("the image has the referrers %s", got)
			}
			if got := referrersHere(t, f, digestOf(t, sbom)); !slices.Equal(got, sorted(digestOf(t, countersigned))) {
				t.Errorf("the bill of materials has the referrers %s", got)
			}
			for _, a := range []ggcr.Image{signature, sbom, countersigned, cosign} {
				f.verifyHere(t, "app", digestOf(t, a), nil)
			}
			if got := f.tagDigest(t, "app", schemaTag(d)+".sig"); got != digestOf(t, cosign) {
				t.Errorf("cosign's tag stands for %q", got)
			}

			// Descriptors say what a client filters by.
			for desc, err := range referrersOf(t, f, d) {
				if err != nil || desc.Digest == digestOf(t, sbom) && (desc.ArtifactType != "application/vnd.example.sbom" || desc.Annotations["about"] != "bill" || desc.MediaType != v1.MediaTypeImageManifest) {
					t.Errorf("%+v %v", desc, err)
				}
			}

			// What was attached here stays when more comes from the parent.
			local, err := attach(t, img, "application/vnd.example.note", "local").RawManifest()
			if err != nil {
				t.Fatal(err)
			}
			if err := repositoryHere(t, f).PutManifest(t.Context(), digest.FromBytes(local), local); err != nil {
				t.Fatal(err)
			}
			late := attach(t, img, "application/vnd.example.signature", "late")
			p.pushImage(t, "app@"+digestOf(t, late).String(), late)
			f.mustSync(t)
			if got := referrersHere(t, f, d); !slices.Equal(got, sorted(digestOf(t, signature), digestOf(t, sbom), digestOf(t, late), digest.FromBytes(local))) {
				t.Errorf("the image has the referrers %s", got)
			}
			// The list of the tag schema is the parent's; here the storage lists.
			if got := f.tagDigest(t, "app", schemaTag(d)); got != "" {
				t.Errorf("the tag of the referrers tag schema stands for %s", got)
			}
		})
	}
}

// A tag of the referrers tag schema that is selected by its name is brought like
// any other.
func TestSyncSelectedSchemaTag(t *testing.T) {
	p := newTestParent(t)
	img := testImage(t, "x", testLayer(1, 1000))
	d := p.pushImage(t, "app:1", img)
	signature := attach(t, img, "application/vnd.example.signature", "signed")
	p.pushImage(t, "app@"+digestOf(t, signature).String(), signature)
	f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Repositories = []v1alpha1.Repository{{Name: "app", Tags: v1alpha1.Tags{Include: []string{"1", schemaTag(d)}}}}
		c.Referrers = false
	})
	f.mustSync(t)
	f.verifyHere(t, "app", f.tagDigest(t, "app", schemaTag(d)), nil)
	if got := referrersHere(t, f, d); !slices.Equal(got, sorted(digestOf(t, signature))) {
		t.Errorf("the image has the referrers %s", got)
	}
}

func TestSyncWithoutReferrers(t *testing.T) {
	p := newTestParent(t)
	img := testImage(t, "x", testLayer(1, 1000))
	d := p.pushImage(t, "app:1", img)
	p.pushImage(t, "app@"+digestOf(t, attach(t, img, "a/b", "s")).String(), attach(t, img, "a/b", "s"))
	p.pushImage(t, "app:"+schemaTag(d)+".sig", testImage(t, "cosign", testLayer(2, 100)))
	f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Repositories = exactly("app")
		c.Referrers = false
	})
	f.mustSync(t)
	if got := f.tagDigest(t, "app", schemaTag(d)) + f.tagDigest(t, "app", schemaTag(d)+".sig"); got != "" {
		t.Errorf("there is %s", got)
	}
	if got := p.asked("/referrers/"); len(got) > 0 {
		t.Errorf("asked %s", got)
	}
}

// A parent whose referrers cannot be read keeps nobody from the image, and is
// reported.
func TestSyncReferrersFail(t *testing.T) {
	p := newTestParent(t, registry.WithReferrersSupport(true))
	d := p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 1000)))
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/referrers/") {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		return false
	})
	f := newFixture(t, p, exactly("app")...)
	_, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule)
	if err == nil || !strings.HasPrefix(err.Error(), "what refers to app@"+d.String()+": parent ") {
		t.Errorf("%v", err)
	}
	if f.tagDigest(t, "app", "1") != d {
		t.Error("the image is not here")
	}
	p.setFault(nil)
	p.reset()
	if _, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule); err != nil {
		t.Error(err)
	}
	if len(p.asked("/referrers/")) == 0 {
		t.Error("the referrers were not asked for again")
	}
}

func repositoryHere(t *testing.T, f *fixture) storage.Repository {
	t.Helper()
	r, err := f.store.Repository("app")
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// referrersOf is what the storage lists, from which the registry answers.
func referrersOf(t *testing.T, f *fixture, subject digest.Digest) iter.Seq2[v1.Descriptor, error] {
	t.Helper()
	return repositoryHere(t, f).Referrers(t.Context(), subject, "")
}

func referrersHere(t *testing.T, f *fixture, subject digest.Digest) (digests []digest.Digest) {
	t.Helper()
	for desc, err := range referrersOf(t, f, subject) {
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, desc.Digest)
	}
	return digests
}

func sorted(digests ...digest.Digest) []digest.Digest {
	slices.Sort(digests)
	return digests
}

func TestSyncForeignLayers(t *testing.T) {
	p := newTestParent(t)
	own := testLayer(1, 1000)
	foreign := digest.FromString("elsewhere")
	img := testImage(t, "x", own)
	raw, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	p.pushImage(t, "app:base", img)
	var doc map[string]any
	if err := json.Unmarshal(raw, &doc); err != nil {
		t.Fatal(err)
	}
	doc["layers"] = append(doc["layers"].([]any), map[string]any{
		"mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
		"digest":    foreign.String(), "size": 9, "urls": []string{"https://elsewhere.example/layer"},
	})
	raw, err = json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	d := p.put(t, "app/manifests/1", v1.MediaTypeImageManifest, raw)
	f := newFixture(t, p, exactly("app")...)
	f.mustSync(t)
	if img := f.verifyHere(t, "app", d, nil); len(img.blobs) != 2 {
		t.Errorf("%d blobs", len(img.blobs))
	}
	if got := p.asked(foreign.String()); len(got) > 0 {
		t.Errorf("asked %s", got)
	}
}

// Docker's kinds of manifest, and an index within an index.
func TestSyncDockerAndNested(t *testing.T) {
	p := newTestParent(t)
	docker, err := mutate.AppendLayers(empty.Image, static.NewLayer(seeded(1, 1000), types.DockerLayer))
	if err != nil {
		t.Fatal(err)
	}
	list := mutate.IndexMediaType(mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: docker}), types.DockerManifestList)
	p.pushIndex(t, "app:list", list)
	p.pushImage(t, "app:image", docker)
	inner, _ := multiPlatform(t)
	outer := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: inner.(mutate.Appendable)})
	p.pushIndex(t, "app:nested", outer)
	f := newFixture(t, p, exactly("app")...)
	f.mustSync(t)
	for tag, x := range map[string]partial.Describable{"list": list, "image": docker, "nested": outer} {
		if f.tagDigest(t, "app", tag) != digestOf(t, x) {
			t.Errorf("%s is not here", tag)
		}
		f.verifyHere(t, "app", digestOf(t, x), nil)
	}
}

func TestParseManifest(t *testing.T) {
	d := digest.FromString("x").String()
	image := `{"schemaVersion":2,"config":{"digest":"` + d + `","size":1,"mediaType":"a/b"},"layers":[]}`
	for body, want := range map[string]string{
		`<html>`:                            "it is not a manifest in JSON",
		`{}`:                                "it is not a manifest",
		`{"errors":[]}`:                     "it is not a manifest",
		`{"schemaVersion":1,"fsLayers":[]}`: "it is a manifest of schema 1, which no current runtime pulls: push the image again with a current tool",
		`{"schemaVersion":2}`:               "it has no config",
		`{"schemaVersion":2,"manifests":[],"layers":[]}`:                                                  "it is an index and an image at once",
		`{"schemaVersion":2,"manifests":[{"digest":"../x"}]}`:                                             "it lists something by what is not a digest",
		`{"schemaVersion":2,"manifests":[{"digest":"` + d + `","size":-1}]}`:                              "it lists " + d + " with a negative size",
		`{"schemaVersion":2,"manifests":[{"digest":"sha512:` + strings.Repeat("a", 128) + `","size":1}]}`: "it lists sha512:" + strings.Repeat("a", 128) + ", and only sha256 can be stored",
		`{"schemaVersion":2,"mediaType":"application/vnd.oci.artifact.manifest.v1+json","config":{}}`:     "its kind, application/vnd.oci.artifact.manifest.v1+json, cannot be stored",
		`{"schemaVersion":2,"mediaType":"` + v1.MediaTypeImageIndex + `","config":{}}`:                    "it is not the " + v1.MediaTypeImageIndex + " that it says it is",
	} {
		if _, err := parseManifest("application/json", []byte(body)); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", body, err, want)
		}
	}
	if _, err := parseManifest(v1.MediaTypeImageIndex, []byte(image)); err == nil {
		t.Error("an image is taken for an index")
	}
	for contentType, want := range map[string]string{
		v1.MediaTypeImageManifest + "; charset=utf-8": v1.MediaTypeImageManifest,
		"text/plain": v1.MediaTypeImageManifest,
		"":           v1.MediaTypeImageManifest,
	} {
		m, err := parseManifest(contentType, []byte(image))
		if err != nil || m.mediaType != want {
			t.Errorf("%q: %v %+v", contentType, err, m)
		}
	}
}

func FuzzParseManifest(f *testing.F) {
	d := digest.FromString("x").String()
	f.Add(v1.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"config":{"digest":"`+d+`","size":1},"layers":[{"digest":"`+d+`","size":1,"urls":["a"]}],"subject":{"digest":"`+d+`"}}`))
	f.Add("", []byte(`{"schemaVersion":2,"manifests":[{"digest":"`+d+`","size":1,"platform":{"os":"linux","architecture":"arm64"}}]}`))
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		m, err := parseManifest(contentType, body)
		if err != nil {
			if strings.ContainsAny(oneLine(err.Error()), "\r\n") {
				t.Errorf("several lines: %q", err)
			}
			return
		}
		if !isManifestType(m.mediaType) || m.isIndex() != (m.children != nil) || m.isIndex() && m.blobs != nil {
			t.Errorf("%+v", m)
		}
		for _, desc := range append(m.children, m.blobs...) {
			if desc.Digest.Validate() != nil || desc.Size < 0 {
				t.Errorf("%+v", desc)
			}
		}
		// Storage must be able to take what passes.
		again, err := parseManifest(m.mediaType, m.body)
		if diff := cmp.Diff(m, again, cmp.AllowUnexported(manifest{})); err != nil || diff != "" {
			t.Errorf("%v %s", err, diff)
		}
		if _, err := (platforms{"linux/arm64"}).selectChildren(m.children); err != nil && strings.ContainsAny(err.Error(), "\r\n") {
			t.Errorf("several lines: %q", err)
		}
	})
}
