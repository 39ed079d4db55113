package cache

import (
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const someDigest = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"

func TestParseRoute(t *testing.T) {
	for in, want := range map[string]route{
		"/v2/":                       {},
		"/v2?ns=docker.io":           {ns: "docker.io"},
		"/v2/a/manifests/v1?ns=Q.io": {kind: kindManifest, ns: "q.io", repo: "a", tag: "v1"},
		"/v2/a/b/c/manifests/" + someDigest + "?ns=r:5000":                {kind: kindManifest, ns: "r:5000", repo: "a/b/c", digest: someDigest},
		"/v2/library/a.b__c--d/blobs/" + someDigest:                       {kind: kindBlob, repo: "library/a.b__c--d", digest: someDigest},
		"/v2/blobs/manifests/manifests/manifests":                         {kind: kindManifest, repo: "blobs/manifests", tag: "manifests"},
		"/v2/a/referrers/" + someDigest + "?artifactType=application%2Fx": {kind: kindReferrers, repo: "a", digest: someDigest, filter: "application/x"},
	} {
		u, err := url.Parse(in)
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseRoute(u)
		if err != nil {
			t.Errorf("%s: %v", in, err)
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(route{})); diff != "" {
			t.Errorf("%s: %s", in, diff)
		}
		if got.kind != kindPing && !strings.HasPrefix(in, got.path()) {
			t.Errorf("%s: path %s", in, got.path())
		}
	}
	for _, in := range []string{
		"/", "/v1/", "/v2//manifests/v1", "/v2/manifests/v1", "/v2/a/manifests/", "/v2/a/manifests/-x", "/v2/a/blobs/v1",
		"/v2/a/blobs/sha256:44136FA355B3678A1146AD16F7E8649E94FB4FC21FE77E8310C060F61CAAFF8A",
		"/v2/a/blobs/md5:44136fa355b3678a1146ad16f7e8649e", "/v2/A/manifests/v1", "/v2/a..b/manifests/v1", "/v2/a___b/manifests/v1",
		"/v2/a/../b/manifests/v1", "/v2/a/./b/manifests/v1", "/v2/a_/manifests/v1", "/v2/a._b/manifests/v1", "/v2/a/b//manifests/v1",
		"/v2/a%00/manifests/v1", "/v2/a/tags/list", "/v2/_catalog", "/v2/a/blobs/uploads/", "/v2/a/manifests/v1?ns=a;b",
		"/v2/" + strings.Repeat("a", 256) + "/manifests/v1", "/v2/a/manifests/" + strings.Repeat("a", 129),
	} {
		u, err := url.Parse(in)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parseRoute(u); err == nil {
			t.Errorf("%s was taken for %+v", in, got)
		}
	}
}

// The grammars as the distribution spec has them.
var (
	specName = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	specTag  = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
)

func FuzzParseRoute(f *testing.F) {
	f.Add("/v2/a/manifests/v1", "ns=docker.io")
	f.Add("/v2/a.b__c--d/blobs/"+someDigest, "")
	f.Add("/v2/a/referrers/"+someDigest, "artifactType=x")
	f.Add("/v2/../manifests/v1", "ns=a&ns=b")
	f.Fuzz(func(t *testing.T, path, query string) {
		rt, err := parseRoute(&url.URL{Path: path, RawQuery: query})
		if err != nil || rt.kind == kindPing {
			return
		}
		if !specName.MatchString(rt.repo) || len(rt.repo) > 255 {
			t.Errorf("repository %q", rt.repo)
		}
		if (rt.tag == "") == (rt.digest == "") || rt.tag != "" && !specTag.MatchString(rt.tag) {
			t.Errorf("tag %q, digest %q", rt.tag, rt.digest)
		}
		if rt.digest != "" && rt.digest.Validate() != nil {
			t.Errorf("digest %q", rt.digest)
		}
		if rt.path() != path {
			t.Errorf("%q became %q", path, rt.path())
		}
	})
}

// FuzzRepository compares with the spec's own grammar.
func FuzzRepository(f *testing.F) {
	for _, s := range []string{"a", "a/b", "a__b", "a___b", "a.-b", "a--b/c", "-a", "a-", "", "a//b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if got, want := validRepository(s), len(s) <= 255 && specName.MatchString(s); got != want {
			t.Errorf("%q: %v, want %v", s, got, want)
		}
		if got, want := validTag(s), specTag.MatchString(s); got != want {
			t.Errorf("tag %q: %v, want %v", s, got, want)
		}
	})
}

func FuzzRange(f *testing.F) {
	for _, s := range []string{"bytes=0-", "bytes=-5", "bytes=3-9", "bytes=9-3", "bytes=+1-2", "bytes=1-2,3-4", "bytes=99999999999999999999-"} {
		f.Add(s, int64(100))
	}
	f.Fuzz(func(t *testing.T, header string, size int64) {
		if size < 0 {
			return
		}
		r := parseRange(header)
		s, ok := r.of(size)
		if !ok {
			if !r.set {
				t.Errorf("%q: the whole cannot be out of range", header)
			}
			return
		}
		if s.start < 0 || s.end > size || s.start > s.end || r.set && s.len() == 0 {
			t.Errorf("%q of %d: %+v", header, size, s)
		}
	})
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-9/10", "bytes 5-9/10", "bytes 5-10/10", "bytes */10", "bytes 0-9/*", "bytes 9-0/10", "bytes 0-9223372036854775807/9223372036854775807"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, header string) {
		s, total, ok := parseContentRange(header)
		if ok && (s.start < 0 || s.end > total || s.len() <= 0) {
			t.Errorf("%q: %+v of %d", header, s, total)
		}
	})
}

func FuzzMediaType(f *testing.F) {
	f.Add([]byte(testManifest()))
	f.Add([]byte(`{"manifests":[]}`))
	f.Add([]byte(`{"mediaType":"text/html\r\nX: y"}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		if m := mediaTypeOf(body); strings.ContainsAny(m, "\r\n;") {
			t.Errorf("%q", m)
		}
	})
}

func TestMediaType(t *testing.T) {
	for body, want := range map[string]string{
		testManifest():              "application/vnd.oci.image.manifest.v1+json",
		`{"manifests":[]}`:          "application/vnd.oci.image.index.v1+json",
		`{"config":{},"layers":[]}`: "application/vnd.oci.image.manifest.v1+json",
		`{"mediaType":"application/vnd.docker.distribution.manifest.v2+json","layers":[]}`: "application/vnd.docker.distribution.manifest.v2+json",
		`{"layers":[]}`:                        "",
		`{"mediaType":"text/html; charset=x"}`: "",
		`[]`:                                   "",
		`<html>`:                               "",
		``:                                     "",
	} {
		if got := mediaTypeOf([]byte(body)); got != want {
			t.Errorf("%s: %q, want %q", body, got, want)
		}
	}
}

func TestConfigErrors(t *testing.T) {
	good := func() Config {
		return Config{Dir: "x", Registries: upstreams("https://upstream.example:5000")}
	}
	for want, change := range map[string]func(*Config){
		"Dir is empty":           func(c *Config) { c.Dir = "" },
		"MaxSize is negative":    func(c *Config) { c.MaxSize = -1 },
		"Timeouts.Dial is":       func(c *Config) { c.Timeouts.Dial = -1 },
		"Registries is empty":    func(c *Config) { c.Registries = nil },
		"has no upstream":        func(c *Config) { c.Registries = upstreams() },
		"is not https://host":    func(c *Config) { c.Registries = upstreams("upstream.example") },
		`"ftp://x" is not https`: func(c *Config) { c.Registries = upstreams("ftp://x") },
		`"https://x/v2" is not`:  func(c *Config) { c.Registries = upstreams("https://x/v2") },
		"has credentials in it":  func(c *Config) { c.Registries = upstreams("https://me:s3cret@x") },
		"is not a host":          func(c *Config) { c.Registries["https://x/"] = c.Registries[testHost] },
		"is not a host in lower": func(c *Config) { c.Registries["X.example"] = c.Registries[testHost] },
	} {
		cfg := good()
		change(&cfg)
		_, err := New(cfg)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q, want %q", err, want)
		}
	}
	if _, err := New(good()); err != nil {
		t.Error(err)
	}
}
