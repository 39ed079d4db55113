package registry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// What the OCI distribution specification 1.1 asks of a registry, by its four
// categories, as far as the tests of single endpoints do not say it.

func TestConformancePull(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	d, manifest := c.pushImage("a", "t", []byte("layer"))
	other := digest.SHA512.FromBytes(manifest)
	c.want(c.do("PUT", "/v2/a/manifests/"+other.String(), manifest, "Content-Type", typeOCIManifest), 201, "")
	for ref, want := range map[string]digest.Digest{"t": d, d.String(): d, other.String(): other} {
		for _, accept := range []string{"", typeOCIManifest, typeDockerManifest, "*/*", "application/x"} {
			a := c.want(c.do("GET", "/v2/a/manifests/"+ref, nil, "Accept", accept), 200, "")
			if !bytes.Equal(a.body, manifest) || a.header.Get("Docker-Content-Digest") != want.String() || a.header.Get("Content-Type") != typeOCIManifest {
				t.Errorf("%s, accepting %q: %v", ref, accept, a.header)
			}
		}
	}
	// A name is a name: no part of it is special.
	for _, name := range []string{"manifests", "blobs/uploads", "tags/list", "a/referrers", "x/manifests/y"} {
		c.pushImage(name, "t", []byte(name))
		c.want(c.do("GET", "/v2/"+name+"/manifests/t", nil), 200, "")
		c.want(c.do("HEAD", "/v2/"+name+"/blobs/"+digest.FromString(name).String(), nil), 200, "")
	}
}

func TestConformancePush(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	content := randomBytes(3000)
	d := digest.FromBytes(content).String()
	at := c.want(c.do("POST", "/v2/a/blobs/uploads/", nil, "Content-Length", "0"), 202, "").header.Get("Location")
	// An upload belongs to its repository.
	foreign := strings.Replace(at, "/v2/a/", "/v2/b/", 1)
	for _, method := range []string{"GET", "PATCH", "DELETE"} {
		c.want(c.do(method, foreign, nil), 404, "BLOB_UPLOAD_UNKNOWN")
	}
	c.want(c.do("PUT", foreign+"?digest="+d, content), 404, "BLOB_UPLOAD_UNKNOWN")
	// Chunks come in order, the last one, too; what is refused changes nothing.
	c.want(c.do("PATCH", at, content[1000:2000], "Content-Range", "1000-1999"), 416, "BLOB_UPLOAD_INVALID")
	c.want(c.do("PATCH", at, content[:1000], "Content-Range", "0-999"), 202, "")
	c.want(c.do("PATCH", at, content[:1000], "Content-Range", "0-999"), 416, "BLOB_UPLOAD_INVALID")
	c.want(c.do("PATCH", at, content[1000:2000], "Content-Range", "1000-1999"), 202, "")
	a := c.want(c.do("PUT", at+"?digest="+d, content[1000:2000], "Content-Range", "1000-1999"), 416, "BLOB_UPLOAD_INVALID")
	if a.header.Get("Range") != "0-1999" {
		t.Errorf("headers %v", a.header)
	}
	c.want(c.do("PUT", at+"?digest="+d, content[2000:], "Content-Range", "2000-2999"), 201, "")
	// The same again, in one request, and of wrong content.
	c.want(c.do("POST", "/v2/a/blobs/uploads/?digest="+d, content), 201, "")
	c.want(c.do("POST", "/v2/a/blobs/uploads/?digest="+digest.FromString("other").String(), content), 400, "DIGEST_INVALID")
	noUploads(t, c.root, "a")

	// The bytes are kept as they came.
	spaced := []byte("{ \"schemaVersion\" : 2,\n\t\"manifests\": [ ] ,\"unknown\":{\"x\":[1e2]} }\n")
	a = c.want(c.do("PUT", "/v2/a/manifests/spaced", spaced, "Content-Type", typeOCIIndex), 201, "")
	if got := c.do("GET", a.header.Get("Location"), nil); !bytes.Equal(got.body, spaced) || a.header.Get("Oci-Subject") != "" {
		t.Errorf("read back %q, headers %v", got.body, a.header)
	}
	// An artifact without layers; an index whose manifests are not here; tags of
	// every form.
	empty := c.pushBlob("a", []byte("{}"))
	artifact := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":"a/b","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2},"layers":[{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2}]}`, typeOCIManifest, empty, empty)
	sparse := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"digest":%q,"size":7}]}`, typeOCIIndex, typeOCIManifest, digest.FromString("elsewhere"))
	for _, tag := range []string{"_", "A", "0", "a.b-c_D", strings.Repeat("x", 128)} {
		c.want(c.do("PUT", "/v2/a/manifests/"+tag, artifact, "Content-Type", typeOCIManifest), 201, "")
		c.want(c.do("PUT", "/v2/a/manifests/"+tag, sparse, "Content-Type", typeOCIIndex), 201, "")
		c.want(c.do("HEAD", "/v2/a/manifests/"+tag, nil), 200, "")
	}
	for _, tag := range []string{".", "-", "a b", "ä", strings.Repeat("x", 129), "a%2fb"} {
		if a := c.do("PUT", "/v2/a/manifests/"+strings.ReplaceAll(tag, " ", "%20"), artifact, "Content-Type", typeOCIManifest); a.status != 400 && a.status != 404 && a.status != 405 {
			t.Errorf("tag %q: %d", tag, a.status)
		}
	}
}

func TestConformanceDiscovery(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	config := c.pushBlob("a", []byte("{}"))
	subjectContent := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":2},"layers":[]}`, typeOCIManifest, config)
	subject := digest.FromString(subjectContent)
	reference := fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, typeOCIManifest, subject, len(subjectContent))
	want := map[digest.Digest]v1.Descriptor{}
	for _, r := range []struct{ content, mediaType, artifactType string }{
		{fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"c/d","digest":%q,"size":2},"layers":[],"subject":%s}`, typeOCIManifest, config, reference), typeOCIManifest, "c/d"},
		{fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":"a/b","config":{"mediaType":"c/d","digest":%q,"size":2},"layers":[],"subject":%s}`, typeOCIManifest, config, reference), typeOCIManifest, "a/b"},
		{fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":"e/f","manifests":[],"subject":%s,"annotations":{"k":"v"}}`, typeOCIIndex, reference), typeOCIIndex, "e/f"},
		{fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[],"subject":%s}`, typeOCIIndex, reference), typeOCIIndex, ""},
	} {
		d := digest.FromString(r.content)
		a := c.want(c.do("PUT", "/v2/a/manifests/"+d.String(), r.content, "Content-Type", r.mediaType), 201, "")
		if a.header.Get("Oci-Subject") != subject.String() {
			t.Errorf("headers %v", a.header)
		}
		want[d] = v1.Descriptor{MediaType: r.mediaType, ArtifactType: r.artifactType, Size: int64(len(r.content))}
	}
	check := func(when string) {
		t.Helper()
		got, _ := c.referrers("/v2/a/referrers/" + subject.String())
		if len(got) != len(want) {
			t.Errorf("%s: %d referrers, want %d", when, len(got), len(want))
		}
		for _, desc := range got {
			w := want[desc.Digest]
			if desc.MediaType != w.MediaType || desc.ArtifactType != w.ArtifactType || desc.Size != w.Size {
				t.Errorf("%s: %+v, want %+v", when, desc, w)
			}
		}
	}
	check("before its subject is there")
	c.want(c.do("PUT", "/v2/a/manifests/subject", subjectContent, "Content-Type", typeOCIManifest), 201, "")
	check("beside its subject")
	c.want(c.do("DELETE", "/v2/a/manifests/"+subject.String(), nil), 202, "")
	check("after its subject")
	if got, _ := c.referrers("/v2/other/referrers/" + subject.String()); len(got) != 0 {
		t.Errorf("another repository has %v", got)
	}
	// A list without a tag, and one of what there is not.
	if a := c.want(c.do("GET", "/v2/a/tags/list", nil), 200, ""); string(a.body) != `{"name":"a","tags":[]}` {
		t.Errorf("tags %s", a.body)
	}
	c.want(c.do("GET", "/v2/none/tags/list", nil), 404, "NAME_UNKNOWN")
}

func TestConformanceManagement(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	layer := []byte("layer")
	d, manifest := c.pushImage("a", "t", layer)
	other := bytes.Replace(manifest, []byte("{"), []byte("{ "), 1)
	c.want(c.do("PUT", "/v2/a/manifests/t", other, "Content-Type", typeOCIManifest), 201, "")
	// The tag has moved on, and what it named before goes without it.
	c.want(c.do("DELETE", "/v2/a/manifests/"+d.String(), nil), 202, "")
	if a := c.want(c.do("GET", "/v2/a/manifests/t", nil), 200, ""); !bytes.Equal(a.body, other) {
		t.Errorf("the tag names %s", a.body)
	}
	c.want(c.do("DELETE", "/v2/a/manifests/none", nil), 404, "MANIFEST_UNKNOWN")
	c.want(c.do("DELETE", "/v2/none/manifests/t", nil), 404, "MANIFEST_UNKNOWN")
	c.want(c.do("DELETE", "/v2/none/blobs/"+d.String(), nil), 404, "BLOB_UNKNOWN")
	// A blob leaves the repository that it is deleted from, and no other.
	ld := digest.FromBytes(layer).String()
	c.want(c.do("POST", "/v2/b/blobs/uploads/?mount="+ld+"&from=a", nil), 201, "")
	c.want(c.do("DELETE", "/v2/a/blobs/"+ld, nil), 202, "")
	c.want(c.do("HEAD", "/v2/a/blobs/"+ld, nil), 404, "")
	c.want(c.do("HEAD", "/v2/b/blobs/"+ld, nil), 200, "")
	c.want(c.do("POST", "/v2/c/blobs/uploads/?mount="+ld+"&from=a", nil), 202, "")
	c.want(c.do("PUT", "/v2/a/manifests/u", manifest, "Content-Type", typeOCIManifest), 400, "MANIFEST_BLOB_UNKNOWN")
}

// Every error of the specification's table has its code and a body of its form.
func TestConformanceErrors(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	absent := digest.FromString("absent").String()
	at := c.do("POST", "/v2/a/blobs/uploads/", nil).header.Get("Location")
	lost := c.do("POST", "/v2/a/blobs/uploads/", nil).header.Get("Location") // with what is wrong
	for code, request := range map[string][]string{
		"BLOB_UNKNOWN":          {"GET", "/v2/a/blobs/" + absent},
		"BLOB_UPLOAD_INVALID":   {"PATCH", at, "Content-Range", "7-8"},
		"BLOB_UPLOAD_UNKNOWN":   {"GET", "/v2/a/blobs/uploads/0"},
		"DIGEST_INVALID":        {"PUT", lost + "?digest=" + absent},
		"MANIFEST_BLOB_UNKNOWN": {"PUT", "/v2/a/manifests/t", "X-Body", fmt.Sprintf(`{"schemaVersion":2,"config":{"digest":%q}}`, absent)},
		"MANIFEST_INVALID":      {"PUT", "/v2/a/manifests/t"},
		"MANIFEST_UNKNOWN":      {"GET", "/v2/a/manifests/t"},
		"NAME_INVALID":          {"GET", "/v2/A/tags/list"},
		"NAME_UNKNOWN":          {"GET", "/v2/b/tags/list"},
		"SIZE_INVALID":          {"PATCH", at, "Content-Range", "0-8"},
		"UNSUPPORTED":           {"PATCH", "/v2/a/tags/list"},
	} {
		body := ""
		if len(request) == 4 && request[2] == "X-Body" {
			body, request = request[3], request[:2]
		}
		a := c.do(request[0], request[1], body, request[2:]...)
		var errs struct {
			Errors []struct {
				Code, Message string
				Detail        json.RawMessage
			}
		}
		if err := json.Unmarshal(a.body, &errs); err != nil || a.status < 400 || a.status > 499 || len(errs.Errors) != 1 ||
			errs.Errors[0].Code != code || errs.Errors[0].Message == "" || a.header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d %s", code, a.status, a.body)
		}
	}
}

// What one replica was told, another answers by at once.
func TestNoStaleAnswers(t *testing.T) {
	store := openStore(t)
	one, two := serveHandler(t, newServer(t, Config{Store: store})), serveHandler(t, newServer(t, Config{Store: openSame(t, store)}))
	layer := []byte("layer")
	first, manifest := one.pushImage("a", "t", layer)
	second := bytes.Replace(manifest, []byte("{"), []byte("{ "), 1)
	for range 3 {
		for _, content := range [][]byte{manifest, second} {
			one.want(one.do("PUT", "/v2/a/manifests/t", content, "Content-Type", typeOCIManifest), 201, "")
			if a := two.do("GET", "/v2/a/manifests/t", nil); !bytes.Equal(a.body, content) {
				t.Fatalf("the other replica still has %s", a.body)
			}
			if a := two.do("HEAD", "/v2/a/manifests/t", nil); a.header.Get("Docker-Content-Digest") != digest.FromBytes(content).String() {
				t.Fatalf("the other replica still has %s", a.header)
			}
		}
	}
	signature := one.attach("a", first, "sig/x", "")
	if all, _ := two.referrers("/v2/a/referrers/" + first.String()); len(all) != 1 {
		t.Errorf("referrers %v", all)
	}
	for _, path := range []string{"manifests/" + signature.String(), "manifests/" + first.String(), "manifests/t", "blobs/" + digest.FromBytes(layer).String()} {
		two.want(two.do("GET", "/v2/a/"+path, nil), 200, "")
		one.want(one.do("DELETE", "/v2/a/"+path, nil), 202, "")
		for _, method := range []string{"GET", "HEAD"} {
			if a := two.do(method, "/v2/a/"+path, nil); a.status != 404 {
				t.Errorf("%s %s: %d", method, path, a.status)
			}
		}
	}
	if all, _ := two.referrers("/v2/a/referrers/" + first.String()); len(all) != 0 {
		t.Errorf("referrers %v", all)
	}
	two.want(two.do("GET", "/v2/a/tags/list", nil), 200, "")
}

// A link whose blob is gone must not say that the blob is there, or a push leaves
// it out.
func TestPushAfterBlobIsGone(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	layer := []byte("layer")
	_, manifest := c.pushImage("a", "t", layer)
	d := digest.FromBytes(layer)
	err := os.RemoveAll(filepath.Join(c.root, "docker/registry/v2/blobs/sha256", d.Encoded()[:2], d.Encoded()))
	if err != nil {
		t.Fatal(err)
	}
	c.want(c.do("HEAD", "/v2/a/blobs/"+d.String(), nil), 404, "")
	c.want(c.do("POST", "/v2/b/blobs/uploads/?mount="+d.String()+"&from=a", nil), 202, "")
	c.want(c.do("POST", "/v2/b/blobs/uploads/?mount="+d.String(), nil), 202, "")
	c.want(c.do("PUT", "/v2/a/manifests/u", manifest, "Content-Type", typeOCIManifest), 400, "MANIFEST_BLOB_UNKNOWN")
	c.pushBlob("a", layer)
	c.want(c.do("PUT", "/v2/a/manifests/u", manifest, "Content-Type", typeOCIManifest), 201, "")
	if a := c.want(c.do("GET", "/v2/a/blobs/"+d.String(), nil), 200, ""); !bytes.Equal(a.body, layer) {
		t.Errorf("read back %q", a.body)
	}
}
