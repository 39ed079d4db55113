package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

func TestBase(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	for _, path := range []string{"/v2/", "/v2"} {
		a := c.want(c.do("GET", path, nil), 200, "")
		if got := a.header.Get("Docker-Distribution-Api-Version"); got != "registry/2.0" {
			t.Errorf("%s: version header %q", path, got)
		}
	}
	c.want(c.do("POST", "/v2/", nil), 405, "UNSUPPORTED")
	for _, path := range []string{"/", "/v1/", "/v2/x", "/v2/a/b", "/v2/a/tags", "/v3", "/v2x/"} {
		c.want(c.do("GET", path, nil), 404, "NAME_UNKNOWN")
	}
}

func TestPullHeaders(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	layer := randomBytes(10_000)
	d, manifest := c.pushImage("a/b", "latest", layer)
	ld := digest.FromBytes(layer)

	for _, ref := range []string{"latest", d.String()} {
		get := c.want(c.do("GET", "/v2/a/b/manifests/"+ref, nil), 200, "")
		head := c.want(c.do("HEAD", "/v2/a/b/manifests/"+ref, nil), 200, "")
		if !bytes.Equal(get.body, manifest) || len(head.body) != 0 {
			t.Errorf("%s: bodies %q and %q", ref, get.body, head.body)
		}
		for _, a := range []answer{get, head} {
			got := map[string]string{}
			for _, name := range []string{"Content-Type", "Content-Length", "Docker-Content-Digest", "Etag"} {
				got[name] = a.header.Get(name)
			}
			want := map[string]string{
				"Content-Type": typeOCIManifest, "Content-Length": fmt.Sprint(len(manifest)),
				"Docker-Content-Digest": d.String(), "Etag": `"` + d.String() + `"`,
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s headers (-want +got):\n%s", ref, diff)
			}
		}
		for _, etag := range []string{d.String(), `"` + d.String() + `"`, `W/"` + d.String() + `"`, `"x", "` + d.String() + `"`} {
			c.want(c.do("GET", "/v2/a/b/manifests/"+ref, nil, "If-None-Match", etag), 304, "")
		}
		c.want(c.do("GET", "/v2/a/b/manifests/"+ref, nil, "If-None-Match", `"sha256:other"`), 200, "")
	}

	blob := "/v2/a/b/blobs/" + ld.String()
	a := c.want(c.do("GET", blob, nil), 200, "")
	if !bytes.Equal(a.body, layer) || a.header.Get("Docker-Content-Digest") != ld.String() || a.header.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("blob: %d bytes, headers %v", len(a.body), a.header)
	}
	a = c.want(c.do("HEAD", blob, nil), 200, "")
	if a.header.Get("Content-Length") != "10000" || a.header.Get("Accept-Ranges") != "bytes" {
		t.Errorf("blob HEAD: headers %v", a.header)
	}
	for header, want := range map[string][]byte{
		"bytes=0-99": layer[:100], "bytes=9000-": layer[9000:], "bytes=-1": layer[9999:], "bytes=9999-20000": layer[9999:],
	} {
		a := c.want(c.do("GET", blob, nil, "Range", header), 206, "")
		if !bytes.Equal(a.body, want) {
			t.Errorf("Range %s: %d bytes, want %d", header, len(a.body), len(want))
		}
	}
	if a := c.do("GET", blob, nil, "Range", "bytes=10000-"); a.status != 416 {
		t.Errorf("Range past the end: %d", a.status)
	}
	// Content of the repository only, whatever else is stored.
	c.want(c.do("GET", "/v2/other/blobs/"+ld.String(), nil), 404, "BLOB_UNKNOWN")
	c.want(c.do("GET", "/v2/other/manifests/"+d.String(), nil), 404, "MANIFEST_UNKNOWN")
	// A manifest is not a layer and a layer is not a manifest.
	c.want(c.do("GET", "/v2/a/b/blobs/"+d.String(), nil), 404, "BLOB_UNKNOWN")
	c.want(c.do("GET", "/v2/a/b/manifests/"+ld.String(), nil), 404, "MANIFEST_UNKNOWN")
}

func TestPullErrors(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	absent := digest.FromString("absent").String()
	for _, test := range []struct {
		path, code string
		status     int
	}{
		{"/v2/a/manifests/none", "MANIFEST_UNKNOWN", 404},
		{"/v2/a/manifests/" + absent, "MANIFEST_UNKNOWN", 404},
		{"/v2/a/manifests/sha256:abc", "DIGEST_INVALID", 400},
		{"/v2/a/manifests/" + strings.Repeat("x", 129), "MANIFEST_UNKNOWN", 404},
		{"/v2/a/manifests/-x", "MANIFEST_UNKNOWN", 404},
		{"/v2/a/blobs/" + absent, "BLOB_UNKNOWN", 404},
		{"/v2/a/blobs/none", "DIGEST_INVALID", 400},
		{"/v2/a/blobs/md5:d41d8cd98f00b204e9800998ecf8427e", "DIGEST_INVALID", 400},
		{"/v2/A/blobs/" + absent, "NAME_INVALID", 400},
		{"/v2/a..b/tags/list", "NAME_INVALID", 400},
		{"/v2/_uploads/tags/list", "NAME_INVALID", 400},
		{"/v2/" + strings.Repeat("a", 256) + "/tags/list", "NAME_INVALID", 400},
		{"/v2/a/%2e%2e/b/tags/list", "NAME_INVALID", 400},
		{"/v2/a/tags/list", "NAME_UNKNOWN", 404},
		{"/v2/a/tags/list?n=x", "PAGINATION_NUMBER_INVALID", 400},
		{"/v2/_catalog?n=-1", "PAGINATION_NUMBER_INVALID", 400},
		{"/v2/a/blobs/uploads/../../x", "BLOB_UPLOAD_UNKNOWN", 404},
		{"/v2/a/blobs/uploads/00000000-0000-0000-0000-000000000000", "BLOB_UPLOAD_UNKNOWN", 404},
	} {
		t.Run(test.path, func(t *testing.T) {
			req, err := http.NewRequest("GET", c.base+test.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := c.http.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			a := answer{resp.StatusCode, resp.Header, body}
			if strings.Contains(test.path, "..") && test.code == "BLOB_UPLOAD_UNKNOWN" {
				if a.status != 404 {
					t.Errorf("got %d", a.status)
				}
				return
			}
			if a.status != test.status || a.code() != test.code {
				t.Errorf("got %d %q, want %d %q", a.status, a.code(), test.status, test.code)
			}
			if head := c.do("HEAD", test.path, nil); head.status != test.status || len(head.body) != 0 {
				t.Errorf("HEAD: %d with %d bytes", head.status, len(head.body))
			}
		})
	}
}

func TestUploads(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	content := randomBytes(30_000)
	d := digest.FromBytes(content)
	began := c.want(c.do("POST", "/v2/up/blobs/uploads/", nil), 202, "")
	at := began.header.Get("Location")
	if !strings.HasSuffix(at, began.header.Get("Docker-Upload-Uuid")) || began.header.Get("Range") != "0-0" {
		t.Fatalf("headers %v", began.header)
	}

	a := c.want(c.do("PATCH", at, content[:10_000], "Content-Range", "0-9999"), 202, "")
	if got := a.header.Get("Range"); got != "0-9999" {
		t.Errorf("Range %q", got)
	}
	// Out of order: refused, and the client is told where to go on.
	a = c.want(c.do("PATCH", at, content[20_000:], "Content-Range", "20000-29999"), 416, "BLOB_UPLOAD_INVALID")
	if a.header.Get("Range") != "0-9999" || a.header.Get("Location") != at {
		t.Errorf("416 headers %v", a.header)
	}
	a = c.want(c.do("GET", at, nil), 204, "")
	if got := a.header.Get("Range"); got != "0-9999" {
		t.Errorf("status Range %q", got)
	}
	c.want(c.do("PATCH", at, content[10_000:11_000], "Content-Range", "10000-10001"), 400, "SIZE_INVALID")
	for _, bad := range []string{"x", "1", "5-1", "-5", "0--1", "bytes 0-9", "99999999999999999999-0"} {
		c.want(c.do("PATCH", at, "x", "Content-Range", bad), 400, "BLOB_UPLOAD_INVALID")
	}
	// Streamed: without a length or a range.
	c.want(c.do("PATCH", at, io.MultiReader(bytes.NewReader(content[10_000:20_000]))), 202, "")
	// No digest, a bad digest: refused, and the upload goes on.
	c.want(c.do("PUT", at, nil), 400, "DIGEST_INVALID")
	c.want(c.do("PUT", at+"?digest=sha256:x", nil), 400, "DIGEST_INVALID")
	a = c.want(c.do("PUT", at+"?digest="+d.String(), content[20_000:], "Content-Range", "20000-29999"), 201, "")
	if a.header.Get("Docker-Content-Digest") != d.String() || a.header.Get("Location") != "/v2/up/blobs/"+d.String() {
		t.Errorf("201 headers %v", a.header)
	}
	if got := c.do("GET", "/v2/up/blobs/"+d.String(), nil); !bytes.Equal(got.body, content) {
		t.Errorf("read back %d bytes", len(got.body))
	}
	c.want(c.do("GET", at, nil), 404, "BLOB_UPLOAD_UNKNOWN")
	c.want(c.do("PATCH", at, "x"), 404, "BLOB_UPLOAD_UNKNOWN")
}

func TestUploadCancelled(t *testing.T) {
	store := openStore(t)
	c := serveHandler(t, newServer(t, Config{Store: store}))
	at := c.do("POST", "/v2/up/blobs/uploads/", nil).header.Get("Location")
	c.want(c.do("PATCH", at, "some"), 202, "")
	c.want(c.do("DELETE", at, nil), 204, "")
	c.want(c.do("GET", at, nil), 404, "BLOB_UPLOAD_UNKNOWN")
	noUploads(t, store.Root(), "up")
}

func noUploads(t *testing.T, root, repo string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(root, "docker/registry/v2/repositories", repo, "_uploads"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestUploadInOneRequest(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	content := randomBytes(1000)
	d := digest.FromBytes(content)
	c.want(c.do("POST", "/v2/up/blobs/uploads/?digest="+d.String(), content), 201, "")
	c.want(c.do("GET", "/v2/up/blobs/"+d.String(), nil), 200, "")
}

func TestUploadOfOtherAlgorithm(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	content := randomBytes(1000)
	d := digest.SHA512.FromBytes(content)
	at := c.do("POST", "/v2/up/blobs/uploads/", nil).header.Get("Location")
	c.want(c.do("PUT", at+"?digest="+d.String(), content), 201, "")
	a := c.want(c.do("GET", "/v2/up/blobs/"+d.String(), nil), 200, "")
	if !bytes.Equal(a.body, content) || a.header.Get("Docker-Content-Digest") != d.String() {
		t.Errorf("read back %d bytes as %s", len(a.body), a.header.Get("Docker-Content-Digest"))
	}
}

func TestUploadOfWrongContent(t *testing.T) {
	store := openStore(t)
	c := serveHandler(t, newServer(t, Config{Store: store}))
	promised := digest.FromString("promised").String()
	at := c.do("POST", "/v2/up/blobs/uploads/", nil).header.Get("Location")
	c.want(c.do("PUT", at+"?digest="+promised, "delivered"), 400, "DIGEST_INVALID")
	c.want(c.do("GET", "/v2/up/blobs/"+promised, nil), 404, "BLOB_UNKNOWN")
	noUploads(t, store.Root(), "up")
}

// A connection that breaks off keeps what has arrived.
func TestUploadResumes(t *testing.T) {
	handler := newServer(t, Config{}).Handler()
	noticed := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handler.ServeHTTP(w, r)
		if r.Header.Get("X-Break") != "" {
			close(noticed)
		}
	}))
	defer srv.Close()
	c := &client{t, srv.URL, srv.Client(), ""}
	content := randomBytes(200_000)
	d := digest.FromBytes(content)
	at := c.do("POST", "/v2/up/blobs/uploads/", nil).header.Get("Location")
	broken := io.MultiReader(bytes.NewReader(content[:150_000]), failing{})
	req, err := http.NewRequestWithContext(t.Context(), "PATCH", c.base+at, broken)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Break", "yes")
	if resp, err := c.http.Do(req); err == nil {
		resp.Body.Close()
		t.Fatal("the broken request was answered")
	}
	<-noticed
	if got := c.want(c.do("GET", at, nil), 204, "").header.Get("Range"); got != "0-149999" {
		t.Errorf("kept %s, want 0-149999", got)
	}
	c.want(c.do("PATCH", at, content[150_000:], "Content-Range", "150000-199999"), 202, "")
	c.want(c.do("PUT", at+"?digest="+d.String(), nil), 201, "")
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("cable pulled") }

// An upload begun at one replica goes on at another.
func TestUploadMovesBetweenReplicas(t *testing.T) {
	store := openStore(t)
	one := serveHandler(t, newServer(t, Config{Store: store}))
	two := serveHandler(t, newServer(t, Config{Store: store}))
	content := randomBytes(50_000)
	d := digest.FromBytes(content)
	at := one.do("POST", "/v2/up/blobs/uploads/", nil).header.Get("Location")
	two.want(two.do("PATCH", at, content[:20_000]), 202, "")
	one.want(one.do("PATCH", at, content[20_000:], "Content-Range", "20000-49999"), 202, "")
	two.want(two.do("PUT", at+"?digest="+d.String(), nil), 201, "")
	if got := one.do("GET", "/v2/up/blobs/"+d.String(), nil); !bytes.Equal(got.body, content) {
		t.Errorf("read back %d bytes", len(got.body))
	}
}

func TestMount(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	d := c.pushBlob("from", []byte("content"))
	a := c.want(c.do("POST", "/v2/to/blobs/uploads/?mount="+d.String()+"&from=from", nil), 201, "")
	if a.header.Get("Location") != "/v2/to/blobs/"+d.String() {
		t.Errorf("headers %v", a.header)
	}
	c.want(c.do("GET", "/v2/to/blobs/"+d.String(), nil), 200, "")
	// What cannot be mounted is to be uploaded.
	absent := digest.FromString("absent").String()
	for _, query := range []string{"mount=" + absent + "&from=from", "mount=" + d.String() + "&from=none", "mount=" + d.String() + "&from=NONE", "mount=" + absent} {
		c.want(c.do("POST", "/v2/elsewhere/blobs/uploads/?"+query, nil), 202, "")
	}
	c.want(c.do("POST", "/v2/to/blobs/uploads/?mount=x&from=from", nil), 400, "DIGEST_INVALID")
	// From wherever it is.
	c.want(c.do("POST", "/v2/to/blobs/uploads/?mount="+d.String(), nil), 202, "") // not yet in a repository with a manifest
	c.want(c.do("PUT", "/v2/from/manifests/t", `{"schemaVersion":2,"manifests":[]}`, "Content-Type", typeOCIIndex), 201, "")
	c.want(c.do("POST", "/v2/wherever/blobs/uploads/?mount="+d.String(), nil), 201, "")
	c.want(c.do("GET", "/v2/wherever/blobs/"+d.String(), nil), 200, "")
	// By another algorithm than it is filed under.
	other := digest.SHA512.FromString("other")
	c.want(c.do("POST", "/v2/from/blobs/uploads/?digest="+other.String(), "other"), 201, "")
	c.want(c.do("POST", "/v2/to/blobs/uploads/?mount="+other.String()+"&from=from", nil), 201, "")
	for _, ref := range []digest.Digest{other, digest.FromString("other")} {
		c.want(c.do("GET", "/v2/to/blobs/"+ref.String(), nil), 200, "")
	}
}

func TestEmptyBlob(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		d := alg.FromString("").String()
		at := c.do("POST", "/v2/a/blobs/uploads/", nil).header.Get("Location")
		c.want(c.do("PUT", at+"?digest="+d, nil), 201, "")
		c.want(c.do("POST", "/v2/b/blobs/uploads/?digest="+d, nil), 201, "")
		for _, repo := range []string{"a", "b"} {
			a := c.want(c.do("GET", "/v2/"+repo+"/blobs/"+d, nil), 200, "")
			if a.header.Get("Content-Length") != "0" {
				t.Errorf("headers %v", a.header)
			}
		}
	}
}

func TestManifestsRefused(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	config := c.pushBlob("a", []byte("{}"))
	good := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2},"layers":[]}`, typeOCIManifest, config)
	absent := digest.FromString("absent")
	for name, test := range map[string]struct {
		ref, contentType, body, code string
		status                       int
	}{
		"no JSON":             {"t", typeOCIManifest, "nonsense", "MANIFEST_INVALID", 400},
		"empty":               {"t", typeOCIManifest, "", "MANIFEST_INVALID", 400},
		"schema 1":            {"t", "application/vnd.docker.distribution.manifest.v1+json", `{"schemaVersion":1}`, "MANIFEST_INVALID", 400},
		"other type declared": {"t", typeDockerManifest, good, "MANIFEST_INVALID", 400},
		"bad Content-Type":    {"t", "a/b; x", good, "MANIFEST_INVALID", 400},
		"unknown type":        {"t", "application/x", `{"schemaVersion":2,"mediaType":"application/x"}`, "MANIFEST_INVALID", 400},
		"no config":           {"t", typeOCIManifest, `{"schemaVersion":2}`, "MANIFEST_INVALID", 400},
		"bad digest":          {"t", typeOCIManifest, `{"schemaVersion":2,"config":{"digest":"sha256:x"}}`, "MANIFEST_INVALID", 400},
		"negative size":       {"t", typeOCIManifest, fmt.Sprintf(`{"schemaVersion":2,"config":{"digest":%q,"size":-1}}`, config), "MANIFEST_INVALID", 400},
		"absent layer":        {"t", typeOCIManifest, fmt.Sprintf(`{"schemaVersion":2,"config":{"digest":%q},"layers":[{"digest":%q}]}`, config, absent), "MANIFEST_BLOB_UNKNOWN", 400},
		"absent config":       {"t", typeOCIManifest, fmt.Sprintf(`{"schemaVersion":2,"config":{"digest":%q}}`, absent), "MANIFEST_BLOB_UNKNOWN", 400},
		"bad tag":             {".t", typeOCIManifest, good, "TAG_INVALID", 400},
		"other digest":        {absent.String(), typeOCIManifest, good, "DIGEST_INVALID", 400},
		"malformed digest":    {"sha256:x", typeOCIManifest, good, "DIGEST_INVALID", 400},
		"too large":           {"t", typeOCIManifest, strings.Repeat(" ", maxManifest+1), "MANIFEST_INVALID", 413},
	} {
		t.Run(name, func(t *testing.T) {
			c := &client{t, c.base, c.http, ""}
			c.want(c.do("PUT", "/v2/a/manifests/"+test.ref, test.body, "Content-Type", test.contentType), test.status, test.code)
		})
	}
	c.want(c.do("GET", "/v2/a/tags/list", nil), 404, "NAME_UNKNOWN") // nothing was stored
	for _, contentType := range []string{typeOCIManifest, "", "application/json", typeOCIManifest + "; charset=utf-8"} {
		c.want(c.do("PUT", "/v2/a/manifests/ok", good, "Content-Type", contentType), 201, "")
	}
}

func TestManifestByOtherAlgorithm(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	index := []byte(`{"schemaVersion":2,"manifests":[]}`)
	d := digest.SHA512.FromBytes(index)
	c.want(c.do("PUT", "/v2/a/manifests/"+d.String(), index, "Content-Type", typeOCIIndex), 201, "")
	a := c.want(c.do("GET", "/v2/a/manifests/"+d.String(), nil), 200, "")
	if !bytes.Equal(a.body, index) || a.header.Get("Content-Type") != typeOCIIndex {
		t.Errorf("%q as %s", a.body, a.header.Get("Content-Type"))
	}
}

// Layers that are to be had elsewhere need not be here.
func TestForeignLayer(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	config := c.pushBlob("win", []byte("{}"))
	m := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"digest":%q},"layers":[{"mediaType":"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip","digest":%q,"urls":["https://mcr.example/x"]}]}`,
		typeDockerManifest, config, digest.FromString("foreign"))
	c.want(c.do("PUT", "/v2/win/manifests/ltsc", m, "Content-Type", typeDockerManifest), 201, "")
}

func TestDeletes(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	layer := randomBytes(1000)
	d, manifest := c.pushImage("a", "one", layer)
	for _, tag := range []string{"two", "three"} {
		c.want(c.do("PUT", "/v2/a/manifests/"+tag, manifest, "Content-Type", typeOCIManifest), 201, "")
	}
	c.want(c.do("DELETE", "/v2/a/manifests/one", nil), 202, "")
	c.want(c.do("DELETE", "/v2/a/manifests/one", nil), 404, "MANIFEST_UNKNOWN")
	c.want(c.do("GET", "/v2/a/manifests/two", nil), 200, "")
	c.want(c.do("DELETE", "/v2/a/manifests/"+d.String(), nil), 202, "")
	c.want(c.do("DELETE", "/v2/a/manifests/"+d.String(), nil), 404, "MANIFEST_UNKNOWN")
	c.want(c.do("GET", "/v2/a/manifests/two", nil), 404, "MANIFEST_UNKNOWN")
	a := c.want(c.do("GET", "/v2/a/tags/list", nil), 200, "")
	if got := string(a.body); got != `{"name":"a","tags":[]}` {
		t.Errorf("tags %s", got)
	}
	ld := digest.FromBytes(layer).String()
	c.want(c.do("DELETE", "/v2/a/blobs/"+ld, nil), 202, "")
	c.want(c.do("DELETE", "/v2/a/blobs/"+ld, nil), 404, "BLOB_UNKNOWN")
	c.want(c.do("GET", "/v2/a/blobs/"+ld, nil), 404, "BLOB_UNKNOWN")
	c.want(c.do("DELETE", "/v2/a/blobs/nonsense", nil), 400, "DIGEST_INVALID")
	c.want(c.do("DELETE", "/v2/a/manifests/sha256:nonsense", nil), 400, "DIGEST_INVALID")
	// And push it all again.
	again, _ := c.pushImage("a", "one", layer)
	if again != d {
		t.Errorf("pushed again as %s", again)
	}
	c.want(c.do("GET", "/v2/a/manifests/one", nil), 200, "")
}

func TestPages(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	index := `{"schemaVersion":2,"manifests":[]}`
	wantTags, wantRepos := []string{}, []string{"a", "a/b", "a/b/c", "a-b", "a.b", "a0", "b/manifests", "b/tags/list"}
	for i := range 7 {
		tag := fmt.Sprintf("v%d", i)
		wantTags = append(wantTags, tag)
		c.want(c.do("PUT", "/v2/a/manifests/"+tag, index, "Content-Type", typeOCIIndex), 201, "")
	}
	for _, repo := range wantRepos {
		c.want(c.do("PUT", "/v2/"+repo+"/manifests/t", index, "Content-Type", typeOCIIndex), 201, "")
	}
	c.want(c.do("DELETE", "/v2/a/manifests/t", nil), 202, "")

	for n := 1; n <= 9; n++ {
		if diff := cmp.Diff(wantTags, c.pages(fmt.Sprintf("/v2/a/tags/list?n=%d", n), "tags", n)); diff != "" {
			t.Errorf("tags by %d (-want +got):\n%s", n, diff)
		}
		if diff := cmp.Diff(wantRepos, c.pages(fmt.Sprintf("/v2/_catalog?n=%d", n), "repositories", n)); diff != "" {
			t.Errorf("repositories by %d (-want +got):\n%s", n, diff)
		}
	}
	for path, want := range map[string]string{
		"/v2/a/tags/list?n=0":             `{"name":"a","tags":[]}`,
		"/v2/a/tags/list?n=1&last=v5":     `{"name":"a","tags":["v6"]}`,
		"/v2/a/tags/list?last=v4zzz":      `{"name":"a","tags":["v5","v6"]}`,
		"/v2/a/tags/list?last=z":          `{"name":"a","tags":[]}`,
		"/v2/_catalog?n=0":                `{"repositories":[]}`,
		"/v2/_catalog?last=b/manifests":   `{"repositories":["b/tags/list"]}`,
		"/v2/_catalog?last=z":             `{"repositories":[]}`,
		"/v2/_catalog?n=99999999&last=a0": `{"repositories":["b/manifests","b/tags/list"]}`,
	} {
		a := c.want(c.do("GET", path, nil), 200, "")
		if got := string(a.body); got != want || a.header.Get("Link") != "" {
			t.Errorf("%s: %s, Link %q; want %s", path, got, a.header.Get("Link"), want)
		}
	}
}

// pages follows Link headers and returns what all pages hold under key.
func (c *client) pages(path, key string, n int) []string {
	c.t.Helper()
	var all []string
	for path != "" {
		a := c.want(c.do("GET", path, nil), 200, "")
		var body map[string]json.RawMessage
		var page []string
		if err := errors.Join(json.Unmarshal(a.body, &body), json.Unmarshal(body[key], &page)); err != nil {
			c.t.Fatal(err)
		}
		if len(page) > n {
			c.t.Fatalf("page of %d, want at most %d", len(page), n)
		}
		all = append(all, page...)
		link := a.header.Get("Link")
		path = strings.TrimSuffix(strings.TrimPrefix(link, "<"), `>; rel="next"`)
	}
	return all
}

func TestEmptyCatalogue(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	a := c.want(c.do("GET", "/v2/_catalog", nil), 200, "")
	if got := string(a.body); got != `{"repositories":[]}` {
		t.Errorf("catalogue %s", got)
	}
}

func TestReadOnly(t *testing.T) {
	var readOnly atomic.Bool
	c := serveHandler(t, newServer(t, Config{ReadOnly: readOnly.Load}))
	d, manifest := c.pushImage("a", "t", []byte("layer"))
	at := c.do("POST", "/v2/a/blobs/uploads/", nil).header.Get("Location")
	readOnly.Store(true)
	for _, req := range [][2]string{
		{"POST", "/v2/a/blobs/uploads/"},
		{"POST", "/v2/b/blobs/uploads/?mount=" + d.String() + "&from=a"},
		{"PATCH", at}, {"PUT", at + "?digest=" + d.String()}, {"DELETE", at},
		{"PUT", "/v2/a/manifests/t"}, {"DELETE", "/v2/a/manifests/t"}, {"DELETE", "/v2/a/manifests/" + d.String()},
		{"DELETE", "/v2/a/blobs/" + d.String()}, {"PUT", "/v2/a/blobs/" + d.String()}, {"POST", "/v2/a/tags/list"},
		{"FROBNICATE", "/v2/a/manifests/t"},
	} {
		a := c.want(c.do(req[0], req[1], nil), 403, "DENIED")
		if !strings.Contains(string(a.body), "read-only (spec.mode is ReadOnly)") {
			t.Errorf("%s %s: no reason in %s", req[0], req[1], a.body)
		}
	}
	c.want(c.do("GET", "/v2/a/manifests/t", nil), 200, "")
	c.want(c.do("GET", at, nil), 204, "")
	readOnly.Store(false)
	c.want(c.do("PUT", "/v2/a/manifests/t", manifest, "Content-Type", typeOCIManifest), 201, "")
}

func TestMethodsNotAllowed(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	d := digest.FromString("x").String()
	for path, allow := range map[string]string{
		"/v2/a/manifests/t":     "GET, HEAD, PUT, DELETE",
		"/v2/a/blobs/" + d:      "GET, HEAD, DELETE",
		"/v2/a/blobs/uploads/":  "POST",
		"/v2/a/blobs/uploads":   "POST",
		"/v2/a/blobs/uploads/x": "GET, HEAD, PATCH, PUT, DELETE",
		"/v2/a/tags/list":       "GET, HEAD",
		"/v2/_catalog":          "GET, HEAD",
	} {
		a := c.want(c.do("OPTIONS", path, nil), 405, "UNSUPPORTED")
		if got := a.header.Get("Allow"); got != allow {
			t.Errorf("%s: Allow %q, want %q", path, got, allow)
		}
	}
}

// One byte flipped on disk: refused as absent, so that containerd asks the next
// host; accepted and served when it is pushed again.
func TestFlippedByte(t *testing.T) {
	store := openStore(t)
	c := serveHandler(t, newServer(t, Config{Store: store}))
	layer := randomBytes(100_000)
	d, manifest := c.pushImage("a", "t", layer)
	ld := digest.FromBytes(layer)
	for _, test := range []struct {
		d          digest.Digest
		path, code string
		again      func()
	}{
		{ld, "/v2/a/blobs/" + ld.String(), "BLOB_UNKNOWN", func() { c.pushBlob("a", layer) }},
		{d, "/v2/a/manifests/t", "MANIFEST_UNKNOWN", func() {
			c.want(c.do("PUT", "/v2/a/manifests/t", manifest, "Content-Type", typeOCIManifest), 201, "")
		}},
	} {
		for _, method := range []string{"GET", "HEAD"} {
			flip(t, store.Root(), test.d)
			a := c.do(method, test.path, nil)
			if a.status != 404 || (method == "GET" && a.code() != test.code) || a.header.Get("Docker-Content-Digest") != "" {
				t.Errorf("%s %s: %d %s %v", method, test.path, a.status, a.code(), a.header)
			}
			c.want(c.do("GET", test.path, nil), 404, test.code)
			test.again()
			c.want(c.do("GET", test.path, nil), 200, "")
		}
	}
}

func flip(t *testing.T, root string, d digest.Digest) {
	t.Helper()
	hex := d.Encoded()
	path := filepath.Join(root, "docker/registry/v2/blobs/sha256", hex[:2], hex, "data")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], 20); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], 20); err != nil {
		t.Fatal(err)
	}
}

// Content that lost its seal, as after a restore, is served after one hash.
func TestUnsealedContentIsServed(t *testing.T) {
	store := openStore(t)
	c := serveHandler(t, newServer(t, Config{Store: store}))
	layer := randomBytes(1 << 20)
	c.pushImage("a", "t", layer)
	d := digest.FromBytes(layer)
	flip(t, store.Root(), d)
	flip(t, store.Root(), d) // right again
	for range 2 {
		a := c.want(c.do("GET", "/v2/a/blobs/"+d.String(), nil), 200, "")
		if !bytes.Equal(a.body, layer) {
			t.Error("other content")
		}
	}
	if got := store.Stats().Rehashed; got != 1 {
		t.Errorf("hashed %d times, want once", got)
	}
}

// Pushes and deletions of the same few names at once: every answer is one of
// the specification's, and what is listed at the end can be pulled.
func TestConcurrentPushesAndDeletes(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	layers := [][]byte{randomBytes(2000), randomBytes(2000)}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 10 {
				layer := layers[(i+n)%2]
				config := c.pushBlob("busy", []byte(`{}`))
				ld := c.pushBlob("busy", layer)
				m := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"digest":%q},"layers":[{"digest":%q}]}`, typeOCIManifest, config, ld)
				put := c.do("PUT", fmt.Sprintf("/v2/busy/manifests/t%d", n%3), m, "Content-Type", typeOCIManifest)
				del := c.do("DELETE", fmt.Sprintf("/v2/busy/manifests/t%d", (n+1)%3), nil)
				if put.status != 201 || (del.status != 202 && del.status != 404) {
					t.Errorf("PUT %d %s, DELETE %d %s", put.status, put.body, del.status, del.body)
				}
			}
		})
	}
	wg.Wait()
	var list struct{ Tags []string }
	if err := json.Unmarshal(c.do("GET", "/v2/busy/tags/list", nil).body, &list); err != nil {
		t.Fatal(err)
	}
	for _, tag := range list.Tags {
		c.want(c.do("GET", "/v2/busy/manifests/"+tag, nil), 200, "")
	}
}

func TestTypesRememberedAreBounded(t *testing.T) {
	c := newTypeCache()
	for i := range maxTypes + 10 {
		d := digest.FromString(fmt.Sprint(i))
		c.put(d, "a/b")
		if got, ok := c.get(d); !ok || got != "a/b" {
			t.Fatalf("%d not remembered", i)
		}
	}
	if len(c.types) != maxTypes {
		t.Errorf("%d remembered, want %d", len(c.types), maxTypes)
	}
}
