package registry

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage"
)

func FuzzParseRoute(f *testing.F) {
	for _, path := range []string{"/v2/", "/v2/a/manifests/t", "/v2/a/blobs/uploads/x", "/v2/blobs/blobs/blobs/blobs", "/v2//tags/list", "/v2/a/uploads/b"} {
		f.Add(path)
	}
	f.Fuzz(func(t *testing.T, path string) {
		rt := parseRoute(path)
		if strings.Contains(rt.ref, "/") {
			t.Errorf("%q: reference %q holds a slash", path, rt.ref)
		}
		// Whatever is understood is understood the same way when written out.
		var again string
		switch rt.end {
		case endManifest:
			again = "/v2/" + rt.name + "/manifests/" + rt.ref
		case endBlob:
			again = "/v2/" + rt.name + "/blobs/" + rt.ref
		case endUpload:
			again = "/v2/" + rt.name + "/blobs/uploads/" + rt.ref
		case endReferrers:
			again = "/v2/" + rt.name + "/referrers/" + rt.ref
		case endTags:
			again = "/v2/" + rt.name + "/tags/list"
		default:
			return
		}
		if rt.name != "" && again != path {
			t.Errorf("%q parsed as %+v, which is %q", path, rt, again)
		}
	})
}

func FuzzParseManifest(f *testing.F) {
	f.Add(typeOCIManifest, []byte(`{"schemaVersion":2,"config":{"digest":"sha256:x"}}`))
	f.Add("", []byte(`{"schemaVersion":2,"manifests":[{"digest":"sha256:x"}]}`))
	f.Fuzz(func(t *testing.T, contentType string, content []byte) {
		m, err := parseManifest(contentType, content)
		if err != nil {
			if _, ours := asAPIError(err); ours {
				t.Errorf("%q: %v is not the client's error", content, err)
			}
			return
		}
		// It is served as what it was accepted as.
		if got := manifestType(content); got != m.MediaType {
			t.Errorf("%q accepted as %q, served as %q", content, m.MediaType, got)
		}
		for d := range m.references {
			if d.Digest.Validate() != nil {
				t.Errorf("%q accepted with digest %q", content, d.Digest)
			}
		}
	})
}

// FuzzRequest sends whole requests: whatever they are, the answer is never a
// fault, and an error has a body of the specification's.
func FuzzRequest(f *testing.F) {
	d := digest.FromString("x").String()
	for _, seed := range [][4]string{
		{"GET", "/v2/a/manifests/t", "", ""},
		{"GET", "/v2/a/blobs/" + d, "Range", "bytes=5-2"},
		{"GET", "/v2/seeded/blobs/" + d, "Range", "bytes=0-0,0-0,-1"},
		{"PUT", "/v2/a/manifests/t", "Content-Type", "a/b;;"},
		{"POST", "/v2/a/blobs/uploads/?digest=" + d, "Content-Range", "0-"},
		{"POST", "/v2/a/blobs/uploads/?mount=" + d + "&from=../..", "", ""},
		{"PATCH", "/v2/a/blobs/uploads/00000000-0000-0000-0000-000000000000", "Content-Length", "-1"},
		{"DELETE", "/v2/a/manifests/sha256:" + strings.Repeat("/", 64), "", ""},
		{"GET", "/v2/a/tags/list?n=99999999999999999999&last=%00", "", ""},
		{"GET", "/v2/_catalog?last=../../..", "", ""},
		{"GET", "/v2/" + strings.Repeat("a/", 200) + "tags/list", "", ""},
		{"GET", "/v2/a/%2e%2e/%2e%2e/etc/passwd", "", ""},
	} {
		f.Add(seed[0], seed[1], seed[2], seed[3], []byte("body"))
	}
	store, err := storage.Open(f.Context(), storage.Config{Root: f.TempDir()})
	if err != nil {
		f.Fatal(err)
	}
	defer store.Close()
	s, err := New(Config{Store: store})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, method, target, header, value string, body []byte) {
		u, err := url.ParseRequestURI(target)
		if err != nil || method == "" || strings.ContainsAny(method, " \r\n") {
			return // net/http refuses it
		}
		r := httptest.NewRequest("GET", "/", strings.NewReader(string(body)))
		r.Method, r.URL = method, u
		if header != "" {
			r.Header[http.CanonicalHeaderKey(header)] = []string{value}
		}
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r)
		if w.Code >= 500 || w.Code < 200 {
			t.Fatalf("%s %q: %d %s", method, target, w.Code, w.Body)
		}
		if w.Code >= 400 && w.Code != 416 && method != "HEAD" && !json.Valid(w.Body.Bytes()) {
			t.Errorf("%s %q: %d with body %q", method, target, w.Code, w.Body)
		}
	})
}
