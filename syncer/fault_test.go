package syncer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// respond answers with a body.
func respond(status int, contentType, body string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// endless sends bytes until the client has had enough.
func endless(w http.ResponseWriter, r *http.Request) {
	chunk := make([]byte, 64<<10)
	for r.Context().Err() == nil {
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

// abort breaks the connection off after so many bytes of the real answer.
func (p *testParent) abortAfter(n int64) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, r *http.Request) {
		p.handler.ServeHTTP(&abortingWriter{ResponseWriter: w, left: n}, r)
	}
}

type abortingWriter struct {
	http.ResponseWriter
	left int64
}

func (w *abortingWriter) Write(b []byte) (int, error) {
	if int64(len(b)) <= w.left {
		w.left -= int64(len(b))
		return w.ResponseWriter.Write(b)
	}
	_, _ = w.ResponseWriter.Write(b[:w.left])
	_ = http.NewResponseController(w.ResponseWriter).Flush()
	panic(http.ErrAbortHandler)
}

// Whatever the parent does, nothing wrong is stored or tagged, and the error is
// one line that says what is the matter.
func TestSyncMisbehavingParent(t *testing.T) {
	layerSize := 100_000
	img := testImage(t, "x", testLayer(1, layerSize))
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	layer, d := digestOf(t, layers[0]), digestOf(t, img)
	html := respond(http.StatusOK, "text/html; charset=utf-8", "<html>please log in</html>")
	moved := func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) }

	tests := []struct {
		name  string
		match string // part of METHOD PATH
		do    func(w http.ResponseWriter, r *http.Request)
		want  string // with P for the parent
	}{
		{"list is a web page", "tags/list", html, "P gave a wrong answer for the tags of app: it is a web page: is spec.parent.endpoint a registry?"},
		{"list is not JSON", "tags/list", respond(200, "application/json", "nope"), "P gave a wrong answer for the tags of app: it is not JSON"},
		{"list is of numbers", "tags/list", respond(200, "application/json", `{"tags":[1]}`), "P gave a wrong answer for the tags of app: its tags are not a list of names"},
		{"list is endless", "tags/list", endless, "P gave a wrong answer for the tags of app: it is larger than 1000000 bytes"},
		{"list has the same page again", "tags/list", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", `</v2/app/tags/list?n=1000&last=`+r.URL.Query().Get("last")+`x>; rel="next"`)
			respond(200, "application/json", `{"tags":["1"]}`)(w, r)
		}, "P gave a wrong answer for the tags of app: its pages have no end"},
		{"list has ever more pages", "tags/list", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", `</v2/app/tags/list?last=`+r.URL.Query().Get("last")+`x>; rel="next"`)
			respond(200, "application/json", `{"tags":["a`+r.URL.Query().Get("last")+`"]}`)(w, r)
		}, "P gave a wrong answer for the tags of app: there are more than 20"},
		{"list refused", "tags/list", respond(401, "", ""), "P wants credentials for the tags of app (401): name them in spec.parent.credentialsSecretRef"},
		{"list forbidden", "tags/list", respond(403, "", ""), "P does not let anonymous clients read the tags of app (403): name credentials in spec.parent.credentialsSecretRef"},
		{"list fails", "tags/list", respond(500, "application/json", `{"errors":[{"code":"UNKNOWN","message":"out of\norder"}]}`), "P answered 500 for the tags of app: UNKNOWN: out of order: see its log, and what lies between"},
		{"list limited", "tags/list", respond(429, "", ""), "P limits how much may be asked of it (429), asked for the tags of app: a schedule with fewer runs asks less"},

		{"HEAD fails", "HEAD /v2/app/manifests/1", respond(500, "", ""), "P answered 500 for app:1: see its log, and what lies between"},
		{"HEAD redirects in a loop", "HEAD /v2/app/manifests/1", moved, "P, asked for app:1, redirects again and again"},
		{"HEAD names another digest", "HEAD /v2/app/manifests/1", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Docker-Content-Digest", digest.FromString("other").String())
		}, "app:1: P has no app@" + digest.FromString("other").String() + " (404)"},
		{"digest that cannot be stored", "HEAD /v2/app/manifests/1", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Docker-Content-Digest", digest.SHA512.FromString("x").String())
		}, "P gave a wrong answer for app:1: its digest is sha512, and only sha256 can be stored"},

		{"manifest is another", "GET /v2/app/manifests/sha256:", respond(200, v1.MediaTypeImageManifest, "{}"), "app:1: P gave a wrong answer for app@" + d.String() + ": its digest is " + digest.FromString("{}").String()},
		{"manifest is a web page", "GET /v2/app/manifests/sha256:", html, "app:1: P gave a wrong answer for app@" + d.String() + ": it is a web page: is something between here and the parent that wants a login?"},
		{"manifest is endless", "GET /v2/app/manifests/sha256:", endless, "app:1: P gave a wrong answer for app@" + d.String() + ": it is larger than 100000 bytes"},
		{"manifest is gone", "GET /v2/app/manifests/sha256:", respond(404, "", ""), "app:1: P has no app@" + d.String() + " (404)"},
		{"manifest sent as an index", "GET /v2/app/manifests/sha256:", func(w http.ResponseWriter, r *http.Request) {
			rec := httptest.NewRecorder()
			newRegistryWith(t, img).ServeHTTP(rec, r)
			w.Header().Set("Content-Type", v1.MediaTypeImageIndex)
			_, _ = w.Write(rec.Body.Bytes())
		}, "app:1: P gave a wrong answer for app@" + d.String() + ": it was sent as " + v1.MediaTypeImageIndex + " and says that it is " + v1.MediaTypeImageManifest},

		{"blob has other bytes", "blobs/" + layer.String(), respond(200, "", strings.Repeat("x", layerSize)), "app:1: P gave a wrong answer for app@" + layer.String() + ": its bytes do not have that digest"},
		{"blob is shorter", "blobs/" + layer.String(), respond(200, "", "short"), "app:1: P gave a wrong answer for app@" + layer.String() + ": it has 5 bytes where its manifest says 100000"},
		{"blob is a web page", "blobs/" + layer.String(), html, "app:1: P gave a wrong answer for app@" + layer.String() + ": it is a web page: is something between here and the parent that wants a login?"},
		{"blob is endless", "blobs/" + layer.String(), endless, "app:1: P gave a wrong answer for app@" + layer.String() + ": its bytes do not have that digest"},
		{"blob is gone", "blobs/" + layer.String(), respond(404, "", ""), "app:1: P has no app@" + layer.String() + " (404)"},
		{"blob fails", "blobs/" + layer.String(), respond(502, "text/html", "<html>"), "app:1: P answered 502 for app@" + layer.String() + ": a web page, not a registry's answer: see its log, and what lies between"},
		{"blob redirects in a loop", "blobs/" + layer.String(), moved, "app:1: P, asked for app@" + layer.String() + ", redirects again and again"},
		{"blob breaks off at once", "blobs/" + layer.String(), func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(layerSize))
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}, "app:1: P broke off while sending app@" + layer.String() + ": unexpected EOF"},
		{"blob stalls", "blobs/" + layer.String(), func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(layerSize))
			_, _ = w.Write([]byte("x"))
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, "app:1: P sends app@" + layer.String() + " too slowly: less than 16384 bytes in 50ms"},
		{"blob does not begin", "blobs/" + layer.String(), func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
			"app:1: P does not answer (waited up to 10s): check the network and the firewall between"},
		{"manifest does not end", "GET /v2/app/manifests/sha256:", func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write([]byte("{"))
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, "app:1: P did not finish its answer for app@" + d.String() + " within 100ms"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newTimedParent(t)
				p.pushImage(t, "app:1", img)
				p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
					if !strings.Contains(r.Method+" "+r.URL.Path, tt.match) {
						return false
					}
					tt.do(w, r)
					return true
				})
				f := newFixture(t, p, exactly("app")...)
				f.limits.attempts = 3
				f.limits.manifest, f.limits.list, f.limits.names = 100_000, 1_000_000, 20
				f.limits.stall, f.limits.answer = 50*time.Millisecond, 2*time.Second
				if strings.Contains(tt.name, "does not end") {
					f.limits.answer = 100 * time.Millisecond
				}
				if strings.Contains(tt.name, "does not begin") {
					f.limits.header = 50 * time.Millisecond
				}
				result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
				want := strings.ReplaceAll(tt.want, "P ", "parent "+p.host+" ")
				want = strings.ReplaceAll(want, "P, ", "parent "+p.host+", ")
				if err == nil || err.Error() != want {
					t.Errorf("%v\nwant %s", err, want)
				}
				if result.State != v1alpha1.SyncStateFailed || result.TagsUpdated != 0 {
					t.Errorf("%+v", result)
				}
				if got := f.tagDigest(t, "app", "1"); got != "" {
					t.Errorf("tagged %s", got)
				}
				if result.BytesFetched > 4_000_000 {
					t.Errorf("%d bytes were fetched", result.BytesFetched)
				}
				if ok, err := f.Syncer.store.hasAnywhere(t.Context(), v1.Descriptor{Digest: layer, Size: int64(layerSize)}); ok && strings.HasPrefix(tt.name, "blob") || err != nil {
					t.Errorf("the blob is here: %t %v", ok, err)
				}

				// Put right, it is brought.
				p.setFault(nil)
				f.limits = defaultLimits()
				f.mustSync(t)
				f.verifyHere(t, "app", d, nil)
			})
		})
	}
}

func newRegistryWith(t *testing.T, img interface{ RawManifest() ([]byte, error) }) http.Handler {
	raw, err := img.RawManifest()
	if err != nil {
		t.Error(err)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(raw) })
}

// A parent that does not name the digest of a manifest is asked for the
// manifest.
func TestSyncWithoutDigestHeader(t *testing.T) {
	p := newTestParent(t)
	d := p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 1000)))
	for name, fault := range map[string]func(w http.ResponseWriter, r *http.Request) bool{
		"no header": func(w http.ResponseWriter, r *http.Request) bool {
			return r.Method == http.MethodHead
		},
		"no HEAD": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodHead {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return true
			}
			return false
		},
	} {
		p.setFault(fault)
		f := newFixture(t, p, exactly("app")...)
		f.mustSync(t)
		if f.tagDigest(t, "app", "1") != d {
			t.Errorf("%s: not here", name)
		}
	}
}

// What fails once is asked for again.
func TestSyncRetries(t *testing.T) {
	p := newTestParent(t)
	d := p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 1000)))
	var mu sync.Mutex
	seen := make(map[string]int)
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		seen[r.Method+r.URL.Path]++
		n := seen[r.Method+r.URL.Path]
		mu.Unlock()
		switch n {
		case 1:
			w.WriteHeader(http.StatusServiceUnavailable)
		case 2:
			panic(http.ErrAbortHandler)
		case 3:
			w.WriteHeader(http.StatusTooManyRequests)
		default:
			return false
		}
		return true
	})
	f := newFixture(t, p, exactly("app")...)
	f.mustSync(t)
	f.verifyHere(t, "app", d, nil)
}

func TestSyncObeysRetryAfter(t *testing.T) { synctest.Test(t, testSyncObeysRetryAfter) }

func testSyncObeysRetryAfter(t *testing.T) {
	p := newTimedParent(t)
	p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 1000)))
	var limited atomic.Bool
	begin := time.Now()
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/manifests/1") && limited.CompareAndSwap(false, true) {
			w.Header().Set("Retry-After", "60")
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		}
		if limited.Load() && time.Since(begin) < time.Minute {
			t.Errorf("%s was asked for too soon", r.URL.Path)
		}
		return false
	})
	f := newFixture(t, p, exactly("app")...)
	f.mustSync(t)
	if took := time.Since(begin); took > time.Minute+time.Second {
		t.Errorf("took %s", took)
	}

	// One that asks for more patience than there is is not waited for.
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Retry-After", "3600")
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	})
	p.reset()
	start := time.Now()
	if _, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual); err == nil || !strings.Contains(err.Error(), "limits how much may be asked of it") {
		t.Error(err)
	}
	if took := time.Since(start); took > 0 || len(p.asked("")) != 1 {
		t.Errorf("took %s for %s", took, p.asked(""))
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"":                              0,
		"0":                             0,
		"7":                             7 * time.Second,
		"-1":                            0,
		"soon":                          0,
		"99999999999999999999":          0,
		"Sat, 31 Jan 2026 12:00:30 GMT": 30 * time.Second,
		"Sat, 31 Jan 2026 11:00:30 GMT": 0,
	} {
		if got := retryAfter(http.Header{"Retry-After": {value}}, now); got != want {
			t.Errorf("%q: %s, want %s", value, got, want)
		}
	}
}

// A parent that is not there is found out once, whatever there is to do.
func TestSyncUnreachable(t *testing.T) {
	gone := httptest.NewServer(http.NotFoundHandler())
	p := &testParent{host: strings.TrimPrefix(gone.URL, "http://")}
	gone.Close()
	f := newFixture(t, p, exactly("a", "b", "c/**")...)
	f.limits.attempts = 2
	result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
	want := "parent " + p.host + " refuses connections: is it running, and is spec.parent.endpoint its port?"
	if err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	if len(result.Repositories) != 3 || f.Status().ConnectionState != v1alpha1.ConnectionStateOffline {
		t.Errorf("%+v", f.Status())
	}
	if _, err := f.Plan(t.Context()); err == nil || err.Error() != want {
		t.Errorf("plan: %v", err)
	}

	// Also when there is nothing to bring.
	f = newFixture(t, p)
	f.limits.attempts = 1
	if _, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual); err == nil || err.Error() != want || f.Status().ConnectionState != v1alpha1.ConnectionStateOffline {
		t.Errorf("%v %+v", err, f.Status())
	}
}

// When the parent goes away in the middle, what is left fails at once.
func TestSyncParentGoesAway(t *testing.T) {
	p := newTestParent(t)
	for i := range 40 {
		p.pushImage(t, fmt.Sprintf("app:%d", i), testImage(t, fmt.Sprint(i), testLayer(uint64(i), 1000)))
	}
	var connections atomic.Int64
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/manifests/") {
			connections.Add(1)
			panic(http.ErrAbortHandler)
		}
		return false
	})
	f := newFixture(t, p, exactly("app")...)
	f.limits.attempts = 2
	f.limits.asks = 2
	_, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
	if err == nil || !strings.Contains(err.Error(), "parent "+p.host+" cannot be reached: EOF") {
		t.Error(err)
	}
	// net/http itself asks again on a connection that was in use before.
	if n := connections.Load(); n > 16 {
		t.Errorf("%d requests were made", n)
	}
}

func TestSyncTLS(t *testing.T) {
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	secure := httptest.NewUnstartedServer(handler)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	t.Cleanup(secure.Close)
	plain := httptest.NewServer(handler)
	t.Cleanup(plain.Close)
	secureHost, plainHost := strings.TrimPrefix(secure.URL, "https://"), strings.TrimPrefix(plain.URL, "http://")
	ref, err := name.ParseReference(plainHost+"/app:1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, testImage(t, "x", testLayer(1, 1000))); err != nil {
		t.Fatal(err)
	}
	right, wrong := x509.NewCertPool(), x509.NewCertPool()
	right.AddCert(secure.Certificate())
	_, port, err := net.SplitHostPort(secureHost)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		parent Parent
		want   string
	}{
		"right CA":            {Parent{Endpoint: secureHost, CA: right}, ""},
		"wrong CA":            {Parent{Endpoint: secureHost, CA: wrong}, "parent " + secureHost + " has a certificate from a CA that is not trusted: put that CA's certificate into the Secret that spec.parent.caSecretRef names"},
		"system's CAs":        {Parent{Endpoint: secureHost}, "parent " + secureHost + " has a certificate from a CA that is not trusted: put that CA's certificate into the Secret that spec.parent.caSecretRef names"},
		"wrong name":          {Parent{Endpoint: "localhost:" + port, CA: right}, "parent localhost:" + port + " has a certificate for another name: x509: certificate is valid for example.com, *.example.com, not localhost: correct spec.parent.endpoint or the certificate"},
		"plain HTTP":          {Parent{Endpoint: plainHost, Insecure: true}, ""},
		"plain HTTP to TLS":   {Parent{Endpoint: secureHost, Insecure: true}, "parent " + secureHost + " speaks TLS: leave out spec.parent.insecure"},
		"TLS to plain HTTP":   {Parent{Endpoint: plainHost}, "parent " + plainHost + " does not speak TLS: set spec.parent.insecure if it is meant to speak plain HTTP"},
		"name without a host": {Parent{Endpoint: "registry.invalid"}, "parent registry.invalid cannot be resolved: check spec.parent.endpoint and the name service"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixtureAt(t, t.TempDir(), &testParent{}, func(c *Config) {
				c.Parent = tt.parent
				c.Repositories = exactly("app")
			})
			f.limits.attempts = 1
			_, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || err.Error() != tt.want) {
				t.Errorf("%v\nwant %s", err, tt.want)
			}
		})
	}
}

// An expired certificate is neither an unknown CA nor a wrong name.
func TestUnreachableNamesTheRemedy(t *testing.T) {
	for err, want := range map[error]string{
		x509.CertificateInvalidError{Reason: x509.Expired, Detail: "too\nold"}: "parent p has a certificate that is not valid: x509: certificate has expired or is not yet valid: too old: renew it, or set the clock of this machine",
		&net.DNSError{IsTemporary: true}:                                       "parent p cannot be resolved: check spec.parent.endpoint and the name service",
		context.DeadlineExceeded:                                               "parent p does not answer (waited up to 30s): check the network and the firewall between",
		tls.RecordHeaderError{Msg: "x"}:                                        "parent p does not speak TLS: set spec.parent.insecure if it is meant to speak plain HTTP",
		errors.New("a\nb"):                                                     "parent p cannot be reached: a b",
	} {
		if got := unreachable("parent p", "x", defaultLimits(), fmt.Errorf("wrapped: %w", err)); got.Error() != want {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
}

func TestNextPage(t *testing.T) {
	for link, want := range map[string]string{
		"": "",
		`</v2/app/tags/list?last=b&n=2>; rel="next"`:                   "/v2/app/tags/list?last=b&n=2",
		`<?last=b>; rel=next`:                                          "/v2/app/tags/list?last=b",
		`<https://elsewhere.example/v2/app/tags/list?n=1>; rel="next"`: "/v2/app/tags/list?n=1",
		`</v2/app/tags/list?n=1>; rel="prev"`:                          "",
		`/v2/app/tags/list?n=1; rel="next"`:                            "",
		`<http://169.254.169.254/latest/meta-data>; rel="next"`:        "",
		`<%zz>; rel="next"`:                                            "",
	} {
		if got := nextPage(http.Header{"Link": {link}}, "/v2/app/tags/list?n=1000"); got != want {
			t.Errorf("%s: %q, want %q", link, got, want)
		}
	}
}

func FuzzNextPage(f *testing.F) {
	f.Add(`</v2/app/tags/list?last=b&n=2>; rel="next"`)
	f.Add(`<?last=b>;rel=next`)
	f.Add(`<//evil.example/v2/x>; rel=next`)
	f.Fuzz(func(t *testing.T, link string) {
		next := nextPage(http.Header{"Link": {link}}, "/v2/app/tags/list?n=1000")
		if next == "" {
			return
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://parent.example"+next, nil)
		if err != nil {
			return // reported as a wrong answer
		}
		if req.URL.Host != "parent.example" || !strings.HasPrefix(req.URL.Path, "/v2/") {
			t.Errorf("%q leads to %s", link, req.URL)
		}
	})
}
