package registry

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
	"github.com/connected-registry/connected-registry/registry/auth"
	"github.com/connected-registry/connected-registry/storage"
)

// private is a registry that holds two repositories which the caller has no
// business with, beside one that it may read and write.
type private struct {
	handler http.Handler
	log     *bytes.Buffer // errors
	secrets [][]byte      // what must not come out
	targets []string      // paths of all that is there
	tokens  []string      // Authorization headers, none of which opens what is private
}

// newPrivate returns the registry, in which the client token "team" may do
// everything in team/**, and everybody may pull other/** on behalf of docker.io.
func newPrivate(t testing.TB, store *storage.Store) *private {
	p := &private{log: new(bytes.Buffer)}
	for _, name := range []string{"private/a", "teams", "other"} {
		secret := []byte("do not tell: " + name + " " + fmt.Sprint(rand.Uint64()))
		p.secrets = append(p.secrets, secret)
		p.fill(t, store, name, secret)
	}
	p.fill(t, store, "team/open", []byte("for everybody in the team"))
	p.fill(t, store, "hub/nginx", []byte("for everybody"))
	return p
}

// fill stores an image whose manifest and layer hold content.
func (p *private) fill(t testing.TB, store *storage.Store, name string, content []byte) {
	repo, err := store.Repository(name)
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(content)
	blob := "/docker/registry/v2/blobs/sha256/" + d.Encoded()[:2] + "/" + d.Encoded() + "/data"
	if err := store.Driver().PutContent(t.Context(), blob, content); err != nil {
		t.Fatal(err)
	}
	if err := repo.LinkLayer(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	manifest := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[],"annotations":{"x":%q},"subject":{"digest":%q}}`, typeOCIIndex, content, d)
	md := digest.FromBytes(manifest)
	if err := repo.PutManifest(t.Context(), md, manifest, "secret-tag"); err != nil {
		t.Fatal(err)
	}
	for _, end := range []string{"manifests/secret-tag", "manifests/" + md.String(), "blobs/" + d.String(), "tags/list", "referrers/" + d.String(),
		"blobs/uploads/", "blobs/uploads/?mount=" + d.String() + "&from=" + name, "blobs/uploads/?mount=" + d.String(), ""} {
		p.targets = append(p.targets, "/v2/"+name+"/"+end, "/v2/team/open/"+end)
	}
	p.targets = append(p.targets, "/v2/_catalog", "/v2/", "/oauth2/token?scope=repository:"+name+":pull", "/token?service=x&scope=repository:"+name+":pull,push,delete")
}

// check sends a request and holds the answer against what is always true.
func (p *private) check(t *testing.T, method, target, header, value, authorization string, body []byte) {
	t.Helper()
	u, err := url.ParseRequestURI(target)
	if err != nil || method == "" || strings.ContainsAny(method, " \r\n") {
		return // net/http refuses it
	}
	r := httptest.NewRequest("GET", "/", bytes.NewReader(body))
	r.Method, r.URL = method, u
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	if header != "" && !strings.EqualFold(header, "Authorization") {
		r.Header[http.CanonicalHeaderKey(header)] = []string{value}
	}
	w := httptest.NewRecorder()
	p.handler.ServeHTTP(w, r)
	what := fmt.Sprintf("%s %q, %s: %q, Authorization %q", method, target, header, value, authorization)
	if w.Code >= 500 || w.Code < 200 {
		t.Errorf("%s: %d %s", what, w.Code, w.Body)
	}
	if p.log.Len() > 0 {
		t.Errorf("%s: logged %s", what, p.log)
		p.log.Reset()
	}
	for _, secret := range p.secrets {
		if bytes.Contains(w.Body.Bytes(), secret) {
			t.Errorf("%s: tells %q", what, secret)
		}
	}
	if strings.HasPrefix(u.Path, "/v2/private/") || strings.HasPrefix(u.Path, "/v2/teams/") || strings.HasPrefix(u.Path, "/v2/other/") {
		if w.Code < 400 {
			t.Errorf("%s: %d %v", what, w.Code, w.Header())
		}
	}
	if w.Code >= 400 && w.Code != 416 && method != "HEAD" && !json.Valid(w.Body.Bytes()) {
		t.Errorf("%s: %d with body %q", what, w.Code, w.Body)
	}
}

// serve puts the registry behind its access control and collects tokens: good ones
// for something else, and bad ones.
func (p *private) serve(t testing.TB, cfg Config, basic string) {
	cfg.Logger = slog.New(slog.NewTextHandler(p.log, &slog.HandlerOptions{Level: slog.LevelError}))
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	p.handler = s.Handler()
	p.tokens = []string{"", basic, "Basic ", "Basic eA==", "Bearer", "Bearer x.y.z", "bearer " + strings.Repeat("A", 4096), "Negotiate x", "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJ0ZWFtIn0."}
	r := httptest.NewRequest("GET", "/oauth2/token?service=connected-registry&scope=repository:team/open:pull,push&scope=repository:private/a:pull", nil)
	r.Header.Set("Authorization", basic)
	w := httptest.NewRecorder()
	p.handler.ServeHTTP(w, r)
	var issued struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal(w.Body.Bytes(), &issued); err != nil || issued.Token == "" {
		t.Fatalf("no token: %d %s", w.Code, w.Body)
	}
	parts := strings.Split(issued.Token, ".")
	p.tokens = append(p.tokens, "Bearer "+issued.Token, "Bearer "+issued.Token[:len(issued.Token)-1], "Bearer "+strings.Join(parts[:len(parts)-1], ".")+".", "Bearer "+issued.Token+"x")
}

// teamAuthority knows the client token "team".
func teamAuthority(t testing.TB, pull func(registry, repository string) bool) *auth.Authority {
	dir := t.TempDir()
	content, err := json.Marshal(clienttoken.File{Passwords: []string{cheapHash(t, "team")}, ScopeMap: []v1alpha1.Scope{{
		Repositories: []string{"team/**"},
		Actions:      []v1alpha1.Action{v1alpha1.ActionContentRead, v1alpha1.ActionContentWrite, v1alpha1.ActionContentDelete, v1alpha1.ActionMetadataRead, v1alpha1.ActionMetadataWrite},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "team.json"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := auth.New(auth.Config{Dir: dir, AnonymousPullFor: pull})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newPrivateRegistry(t testing.TB, store *storage.Store, cfg Config) *private {
	p := newPrivate(t, store)
	p.serve(t, cfg, "Basic "+base64.StdEncoding.EncodeToString([]byte("team:team")))
	return p
}

var malformed = struct{ methods, headers, values, parts []string }{
	methods: []string{"GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "OPTIONS", "TRACE", "get", "X\x00"},
	headers: []string{"Range", "Content-Range", "Content-Type", "Content-Length", "Accept", "If-None-Match", "If-Match", "If-Range", "If-Modified-Since", "Host", "X-Forwarded-Proto", "Docker-Upload-Uuid", "Transfer-Encoding", "Expect"},
	values: []string{"", "bytes=0-", "bytes=-1", "bytes=5-2", "bytes=0-0,1-1,0-0", "bytes=99999999999999999999-", "0-1", "1-0", "-1", "*", "\x00", "\xff\xfe",
		typeOCIManifest, typeOCIIndex, "a/b;;", `"sha256:x"`, "W/*", "application/x-www-form-urlencoded", strings.Repeat("a,", 3000), "Mon, 01 Jan 0001 00:00:00 GMT", "https"},
	parts: []string{"..", ".", "%2e%2e", "%00", "%2f", "%c0%ae", "\\", "//", "_uploads", "_layers", "private/a", "teams", "sha256:", "sha512:" + strings.Repeat("f", 128), "?", "&ns=docker.io", "?ns=docker.io", "?n=-1", "?n=99999999999999999999",
		"?last=../..", "&digest=sha256:x", "&from=private/a", "&mount=x", "?from=teams", strings.Repeat("a", 300), "ü", "%", ";", "#"},
}

var malformedBodies = []string{"", "{", "[]", "null", `{"schemaVersion":2}`, `{"schemaVersion":2,"manifests":null}`, `{"schemaVersion":2,"manifests":[null,{}]}`, `{"schemaVersion":1e99}`,
	`{"schemaVersion":2,"config":{"digest":"../../x","size":-1}}`, `{"schemaVersion":2,"manifests":[],"subject":{"digest":"sha256:x"}}`, strings.Repeat("[", 20000), `{"schemaVersion":2,"mediaType":["x"],"manifests":[]}`,
	"grant_type=password&username=team&password=x&scope=repository:private/a:pull", "grant_type=password&username=team&password=team&scope=repository:private/a:pull", "\x00\x01\x02", `{"errors":[]}`}

// TestMalformedRequests sends thousands of them: never a fault, never a byte of
// what is somebody else's.
func TestMalformedRequests(t *testing.T) {
	store := openStore(t)
	rules := rulesOf(t, "  upstreams: [{endpoint: docker.io, prefix: hub, repositories: [{name: '*'}]}]\n  mirrors: [{registry: docker.io, anonymousPull: true}]\n")
	p := newPrivateRegistry(t, store, Config{Store: store, Auth: teamAuthority(t, rules.AnonymousPullFor), Rules: func() *Rules { return rules }})
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	pick := func(from []string) string { return from[r.IntN(len(from))] }
	// First all that is well formed and asks for too much.
	for _, target := range p.targets {
		for _, token := range p.tokens {
			for _, ns := range []string{"", "ns=docker.io", "ns=example.com", "ns="} {
				sep := "?"
				if strings.Contains(target, "?") {
					sep = "&"
				}
				p.check(t, "GET", target+sep+ns, "", "", token, nil)
			}
		}
	}
	for range 5000 {
		target := pick(p.targets)
		for range r.IntN(3) {
			at := 1 + r.IntN(len(target))
			switch r.IntN(3) {
			case 0:
				target = target[:at] + pick(malformed.parts) + target[at:]
			case 1:
				target += pick(malformed.parts)
			default:
				target = target[:at] + target[min(len(target), at+r.IntN(8)):]
			}
		}
		p.check(t, pick(malformed.methods), target, pick(malformed.headers), pick(malformed.values), pick(p.tokens), []byte(pick(malformedBodies)))
		if t.Failed() {
			break
		}
	}
}

// FuzzAuthorizedRequest is FuzzRequest behind access control.
func FuzzAuthorizedRequest(f *testing.F) {
	store, err := storage.Open(f.Context(), storage.Config{Root: f.TempDir()})
	if err != nil {
		f.Fatal(err)
	}
	defer store.Close()
	p := newPrivateRegistry(f, store, Config{Store: store, Auth: teamAuthority(f, func(string, string) bool { return false })})
	for i, target := range p.targets {
		f.Add(malformed.methods[i%len(malformed.methods)], target, malformed.headers[i%len(malformed.headers)], malformed.values[i%len(malformed.values)],
			p.tokens[i%len(p.tokens)], []byte(malformedBodies[i%len(malformedBodies)]))
	}
	f.Fuzz(func(t *testing.T, method, target, header, value, authorization string, body []byte) {
		if strings.Contains(authorization, "\n") {
			return
		}
		p.check(t, method, target, header, value, authorization, body)
	})
}
