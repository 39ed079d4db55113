package auth

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	dockerauth "github.com/containerd/containerd/v2/core/remotes/docker/auth"
	"github.com/google/go-cmp/cmp"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
)

// cheapHash is a hash of few iterations, for tests that are not about hashing.
func cheapHash(t testing.TB, password string) string {
	t.Helper()
	salt := []byte("test salt for " + password)
	key, err := pbkdf2.Key(sha256.New, password, salt, 10, sha256.Size)
	if err != nil {
		t.Fatal(err)
	}
	enc := base64.RawStdEncoding
	return "$pbkdf2-sha256$i=10$" + enc.EncodeToString(salt) + "$" + enc.EncodeToString(key)
}

func writeToken(t testing.TB, dir, name string, file clienttoken.File) {
	t.Helper()
	content, err := json.Marshal(file)
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir, name+".json", content)
}

func write(t testing.TB, dir, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func scopes(pairs ...string) []v1alpha1.Scope {
	var m []v1alpha1.Scope
	for i := 0; i < len(pairs); i += 2 {
		var actions []v1alpha1.Action
		for a := range strings.SplitSeq(pairs[i+1], ",") {
			actions = append(actions, v1alpha1.Action(a))
		}
		m = append(m, v1alpha1.Scope{Repositories: []string{pairs[i]}, Actions: actions})
	}
	return m
}

// authority has the tokens reader, writer and admin.
func authority(t testing.TB, cfg Config) *Authority {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
		writeToken(t, cfg.Dir, "reader", clienttoken.File{
			Passwords: []string{cheapHash(t, "old"), cheapHash(t, "new")},
			ScopeMap:  scopes("team/**", "content/read,metadata/read"),
		})
		writeToken(t, cfg.Dir, "writer", clienttoken.File{
			Passwords: []string{cheapHash(t, "w")},
			ScopeMap:  scopes("team/app", "content/read,content/write,metadata/read", "team/lib", "content/read"),
		})
		writeToken(t, cfg.Dir, "nobody", clienttoken.File{})
	}
	if cfg.Secret == nil {
		cfg.Secret = []byte("a secret that all replicas share")
	}
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func request(method, target string, header ...string) *http.Request {
	r := httptest.NewRequest(method, "https://registry.example:5000"+target, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	return r
}

func basic(name, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(name+":"+password))
}

func need(repository string, actions ...v1alpha1.Action) Need { return Need{repository, actions} }

// getToken asks the token endpoint, and returns the bearer header.
func getToken(t *testing.T, a *Authority, authorization string, scopes ...string) string {
	t.Helper()
	r := request("GET", TokenPath+"?service="+service)
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	q := r.URL.Query()
	for _, s := range scopes {
		q.Add("scope", s)
	}
	r.URL.RawQuery = q.Encode()
	w := httptest.NewRecorder()
	a.ServeToken(w, r)
	var body struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil || body.Token == "" {
		t.Fatalf("token endpoint: %d %s", w.Code, w.Body)
	}
	return "Bearer " + body.Token
}

func TestAuthorize(t *testing.T) {
	const (
		read, write, del = v1alpha1.ActionContentRead, v1alpha1.ActionContentWrite, v1alpha1.ActionContentDelete
		meta             = v1alpha1.ActionMetadataRead
	)
	closed := authority(t, Config{})
	opened := authority(t, Config{AnonymousPull: func() bool { return true }})
	for name, test := range map[string]struct {
		a      *Authority
		header string
		needs  []Need
		want   string // ok, denied, or what the challenge says
	}{
		"reader reads":            {closed, basic("reader", "old"), []Need{need("team/app", read)}, "ok"},
		"by the other password":   {closed, basic("reader", "new"), []Need{need("team/app/web", read)}, "ok"},
		"reader lists":            {closed, basic("reader", "new"), []Need{need("team/app", meta)}, "ok"},
		"reader writes":           {closed, basic("reader", "old"), []Need{need("team/app", write)}, "denied"},
		"reader reads elsewhere":  {closed, basic("reader", "old"), []Need{need("teams", read)}, "denied"},
		"writer lists":            {closed, basic("writer", "w"), []Need{need("team/lib", meta)}, "denied"},
		"either will do":          {closed, basic("writer", "w"), []Need{need("team/lib", meta, read)}, "ok"},
		"writer deletes":          {closed, basic("writer", "w"), []Need{need("team/app", del)}, "denied"},
		"wrong password":          {closed, basic("reader", "x"), []Need{need("team/app", read)}, "unknown client token or wrong password"},
		"wrong name":              {closed, basic("none", "old"), []Need{need("team/app", read)}, "unknown client token or wrong password"},
		"token without passwords": {closed, basic("nobody", ""), []Need{need("team/app", read)}, "unknown client token or wrong password"},
		"nobody":                  {closed, "", []Need{need("team/app", read)}, "authentication required"},
		"other scheme":            {closed, "Digest x", []Need{need("team/app", read)}, "neither Basic nor Bearer"},
		"not a bearer":            {closed, "Bearer x", []Need{need("team/app", read)}, "invalid or has expired"},

		"anonymous reads":              {opened, "", []Need{need("x", read)}, "ok"},
		"anonymous lists":              {opened, "", []Need{need("x", meta)}, "ok"},
		"anonymous writes":             {opened, "", []Need{need("x", write)}, "authentication required"},
		"a stranger reads":             {opened, basic("docker.io", "theirs"), []Need{need("x", read)}, "ok"},
		"a stranger writes":            {opened, basic("docker.io", "theirs"), []Need{need("x", write)}, "unknown client token or wrong password"},
		"a token reads like anonymous": {opened, basic("writer", "w"), []Need{need("x", read)}, "ok"},

		"bearer reads":                     {closed, getToken(t, closed, basic("reader", "old"), "repository:team/app:pull"), []Need{need("team/app", read)}, "ok"},
		"bearer lists":                     {closed, getToken(t, closed, basic("reader", "old"), "repository:team/app:pull"), []Need{need("team/app", meta)}, "ok"},
		"bearer elsewhere":                 {closed, getToken(t, closed, basic("reader", "old"), "repository:team/app:pull"), []Need{need("team/lib", read)}, "not issued for this"},
		"bearer beyond":                    {closed, getToken(t, closed, basic("reader", "old"), "repository:team/app:pull,push"), []Need{need("team/app", write)}, "denied"},
		"bearer writes":                    {closed, getToken(t, closed, basic("writer", "w"), "repository:team/app:pull,push"), []Need{need("team/app", write)}, "ok"},
		"bearer without scope":             {closed, getToken(t, closed, basic("writer", "w")), []Need{need("team/app", write)}, "not issued for this"},
		"bearer in Azure's words":          {closed, getToken(t, closed, basic("writer", "w"), "repository:team/app:content_write"), []Need{need("team/app", write)}, "ok"},
		"of another registry":              {closed, getToken(t, authority(t, Config{Secret: []byte("another secret of its own")}), basic("writer", "w"), "repository:team/app:push"), []Need{need("team/app", write)}, "invalid or has expired"},
		"of another replica":               {closed, getToken(t, authority(t, Config{Dir: closed.cfg.Dir}), basic("writer", "w"), "repository:team/app:push"), []Need{need("team/app", write)}, "ok"},
		"anonymous bearer":                 {opened, getToken(t, opened, "", "repository:x:pull,push"), []Need{need("x", read)}, "ok"},
		"anonymous bearer writes":          {opened, getToken(t, opened, "", "repository:x:pull,push"), []Need{need("x", write)}, "authentication required"},
		"anonymous bearer where it is off": {closed, getToken(t, opened, "", "repository:x:pull"), []Need{need("x", read)}, "authentication required"},
	} {
		t.Run(name, func(t *testing.T) {
			r := request("GET", "/v2/")
			if test.header != "" {
				r.Header.Set("Authorization", test.header)
			}
			_, err := test.a.Authorize(r, test.needs...)
			var challenge *ChallengeError
			var denied *DeniedError
			switch {
			case err == nil:
				if test.want != "ok" {
					t.Errorf("allowed; want %q", test.want)
				}
			case errors.As(err, &denied):
				if test.want != "denied" {
					t.Errorf("denied: %v; want %q", err, test.want)
				}
			case errors.As(err, &challenge):
				if !strings.Contains(err.Error(), test.want) || challenge.Header == "" {
					t.Errorf("challenged with %q: %v; want %q", challenge.Header, err, test.want)
				}
			default:
				t.Error(err)
			}
		})
	}
}

func TestChallenge(t *testing.T) {
	a := authority(t, Config{Hosts: func() []string { return []string{"connected.example"} }})
	const realm = `Bearer realm="https://registry.example:5000/oauth2/token",service="connected-registry"`
	for name, test := range map[string]struct {
		r     *http.Request
		needs []Need
		want  string
	}{
		"pull":      {request("GET", "/v2/a/manifests/t"), []Need{need("a", v1alpha1.ActionContentRead)}, realm + `,scope="repository:a:pull"`},
		"push":      {request("PUT", "/v2/a/manifests/t"), []Need{need("a", v1alpha1.ActionContentWrite)}, realm + `,scope="repository:a:pull,push"`},
		"delete":    {request("DELETE", "/v2/a/manifests/t"), []Need{need("a", v1alpha1.ActionContentDelete)}, realm + `,scope="repository:a:delete"`},
		"catalogue": {request("GET", "/v2/_catalog"), []Need{catalogue}, realm + `,scope="registry:catalog:*"`},
		"own name":  {request("GET", "/v2/a/manifests/t?ns=connected.example"), []Need{need("a", v1alpha1.ActionContentRead)}, realm + `,scope="repository:a:pull"`},
		"own host":  {request("GET", "/v2/a/manifests/t?ns=registry.example:5000"), []Need{need("a", v1alpha1.ActionContentRead)}, realm + `,scope="repository:a:pull"`},
		// A mirror is given the credentials of the registry that it mirrors.
		"mirror": {request("GET", "/v2/a/manifests/t?ns=docker.io"), []Need{need("a", v1alpha1.ActionContentRead)}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := a.Authorize(test.r, test.needs...)
			if name == "catalogue" {
				_, err = a.AuthorizeCatalogue(test.r)
			}
			var challenge *ChallengeError
			if !errors.As(err, &challenge) || challenge.Header != test.want {
				t.Errorf("%v\n got %s\nwant %s", err, challenge.Header, test.want)
			}
		})
	}
	r := request("GET", "/v2/")
	r.Host = `evil",x="`
	_, err := a.AuthorizeBase(r)
	var challenge *ChallengeError
	if !errors.As(err, &challenge) || strings.Contains(challenge.Header, "evil") {
		t.Errorf("header %q", challenge.Header)
	}
	plain := httptest.NewRequest("GET", "http://registry.example/v2/", nil)
	for proto, scheme := range map[string]string{"": "http://", "https": "https://"} {
		plain.Header.Set("X-Forwarded-Proto", proto)
		_, err = a.AuthorizeBase(plain)
		if !errors.As(err, &challenge) || !strings.Contains(challenge.Header, `realm="`+scheme) {
			t.Errorf("X-Forwarded-Proto %q: %q", proto, challenge.Header)
		}
	}
}

func TestAuthorizeBase(t *testing.T) {
	yes := func() bool { return true }
	empty := t.TempDir()
	for name, test := range map[string]struct {
		a      *Authority
		header string
		ok     bool
	}{
		"nobody":                         {authority(t, Config{}), "", false},
		"token":                          {authority(t, Config{}), basic("reader", "old"), true},
		"wrong password":                 {authority(t, Config{}), basic("reader", "x"), false},
		"anonymous, with tokens":         {authority(t, Config{AnonymousPull: yes}), "", false},
		"wrong password, with anonymous": {authority(t, Config{AnonymousPull: yes}), basic("reader", "x"), false},
		"anonymous, without tokens":      {authority(t, Config{AnonymousPull: yes, Dir: empty}), "", true},
		"nobody at all":                  {authority(t, Config{Dir: empty}), "", false},
		"anonymous bearer":               {authority(t, Config{AnonymousPull: yes}), getToken(t, authority(t, Config{AnonymousPull: yes}), ""), true},
		"anonymous bearer, closed":       {authority(t, Config{}), getToken(t, authority(t, Config{AnonymousPull: yes}), ""), false},
	} {
		r := request("GET", "/v2/")
		if test.header != "" {
			r.Header.Set("Authorization", test.header)
		}
		if _, err := test.a.AuthorizeBase(r); (err == nil) != test.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCatalogue(t *testing.T) {
	a := authority(t, Config{})
	opened := authority(t, Config{AnonymousPull: func() bool { return true }})
	for name, test := range map[string]struct {
		a      *Authority
		header string
		sees   []string // of team/app, team/lib, other; nil: refused
	}{
		"nobody":               {a, "", nil},
		"wrong password":       {a, basic("writer", "x"), nil},
		"Basic":                {a, basic("writer", "w"), []string{"team/app"}},
		"bearer":               {a, getToken(t, a, basic("reader", "old"), "registry:catalog:*"), []string{"team/app", "team/lib"}},
		"bearer for something": {a, getToken(t, a, basic("reader", "old"), "repository:team/app:pull"), nil},
		"anonymous":            {opened, "", []string{"team/app", "team/lib", "other"}},
		"a stranger":           {opened, basic("x", "y"), []string{"team/app", "team/lib", "other"}},
	} {
		r := request("GET", "/v2/_catalog")
		if test.header != "" {
			r.Header.Set("Authorization", test.header)
		}
		id, err := test.a.AuthorizeCatalogue(r)
		var sees []string
		for _, repo := range []string{"team/app", "team/lib", "other"} {
			if err == nil && id.Sees(repo) {
				sees = append(sees, repo)
			}
		}
		if diff := cmp.Diff(test.sees, sees); diff != "" {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, diff)
		}
	}
}

// containerd's own client, as it answers a challenge with a pull secret and
// without.
func TestContainerdFetchesTokens(t *testing.T) {
	a := authority(t, Config{AnonymousPull: func() bool { return true }})
	srv := httptest.NewTLSServer(http.HandlerFunc(a.ServeToken))
	defer srv.Close()
	options := dockerauth.TokenOptions{
		Realm: srv.URL + TokenPath, Service: service, Scopes: []string{"repository:team/app:pull", "repository:team/lib:pull"},
		Username: "writer", Secret: "w", FetchRefreshToken: true,
	}
	posted, err := dockerauth.FetchTokenWithOAuth(t.Context(), srv.Client(), nil, "containerd-client", options)
	if err != nil || posted.AccessToken == "" || posted.ExpiresInSeconds != 600 || time.Since(posted.IssuedAt) > time.Minute {
		t.Errorf("POST: %+v, %v", posted, err)
	}
	got, err := dockerauth.FetchToken(t.Context(), srv.Client(), nil, options)
	if err != nil || got.Token == "" || got.Token != got.AccessToken {
		t.Errorf("GET: %+v, %v", got, err)
	}
	anonymous, err := dockerauth.FetchToken(t.Context(), srv.Client(), nil, dockerauth.TokenOptions{Realm: srv.URL + TokenPathShort, Scopes: options.Scopes})
	if err != nil {
		t.Fatal(err)
	}
	for name, token := range map[string]string{"writer": posted.AccessToken, "": anonymous.Token} {
		for _, repo := range []string{"team/app", "team/lib"} {
			id, err := a.Authorize(request("GET", "/v2/", "Authorization", "Bearer "+token), need(repo, v1alpha1.ActionContentRead))
			if err != nil || id.Name() != name {
				t.Errorf("%q on %s: %q, %v", name, repo, id.Name(), err)
			}
		}
	}
	options.Secret = "wrong"
	if _, err := dockerauth.FetchTokenWithOAuth(t.Context(), srv.Client(), nil, "containerd-client", options); err == nil {
		t.Error("wrong password, but a token")
	}
}

func TestTokenEndpointRefuses(t *testing.T) {
	a := authority(t, Config{})
	form := []string{"Content-Type", "application/x-www-form-urlencoded"}
	for name, test := range map[string]struct {
		method, target, body string
		header               []string
		status               int
	}{
		"nobody":            {"GET", TokenPath, "", nil, 401},
		"wrong password":    {"GET", TokenPath, "", []string{"Authorization", basic("reader", "x")}, 401},
		"bearer":            {"GET", TokenPath, "", []string{"Authorization", "Bearer x"}, 400},
		"PUT":               {"PUT", TokenPath, "", nil, 400},
		"no form":           {"POST", TokenPath, "{}", []string{"Content-Type", "application/json"}, 400},
		"malformed form":    {"POST", TokenPath, "%zz", form, 400},
		"refresh token":     {"POST", TokenPath, "grant_type=refresh_token&refresh_token=x", form, 400},
		"no grant":          {"POST", TokenPath, "username=reader&password=old", form, 400},
		"wrong in form":     {"POST", TokenPath, "grant_type=password&username=reader&password=x", form, 401},
		"password in query": {"POST", TokenPath + "?grant_type=password&username=reader&password=old", "", form, 400},
		"too large":         {"POST", TokenPath, "grant_type=password&x=" + strings.Repeat("x", maxForm), form, 400},
	} {
		r := httptest.NewRequest(test.method, "https://r"+test.target, strings.NewReader(test.body))
		for i := 0; i < len(test.header); i += 2 {
			r.Header.Set(test.header[i], test.header[i+1])
		}
		w := httptest.NewRecorder()
		a.ServeToken(w, r)
		if w.Code != test.status || !json.Valid(w.Body.Bytes()) {
			t.Errorf("%s: %d %s, want %d", name, w.Code, w.Body, test.status)
		}
	}
}

func TestBearerEnds(t *testing.T) {
	a := authority(t, Config{})
	dir := a.cfg.Dir
	try := func(header string) error {
		_, err := a.Authorize(request("GET", "/v2/", "Authorization", header), need("team/app", v1alpha1.ActionContentRead))
		return err
	}
	byOld := getToken(t, a, basic("reader", "old"), "repository:team/app:pull")
	byNew := getToken(t, a, basic("reader", "new"), "repository:team/app:pull")
	for _, bearer := range []string{byOld, byNew} {
		if err := try(bearer); err != nil {
			t.Fatal(err)
		}
	}
	// With the password it was issued for.
	writeToken(t, dir, "reader", clienttoken.File{Passwords: []string{cheapHash(t, "new")}, ScopeMap: scopes("team/**", "content/read")})
	a.reload()
	if err := try(byOld); err == nil {
		t.Error("of a password that is gone: accepted")
	}
	if err := try(byNew); err != nil {
		t.Errorf("of the password that stayed: %v", err)
	}
	if err := try(basic("reader", "old")); err == nil {
		t.Error("the password that is gone: accepted")
	}
	// With the scope map.
	writeToken(t, dir, "reader", clienttoken.File{Passwords: []string{cheapHash(t, "new")}, ScopeMap: scopes("elsewhere", "content/read")})
	a.reload()
	var denied *DeniedError
	if err := try(byNew); !errors.As(err, &denied) {
		t.Errorf("after its scope map changed: %v", err)
	}
	// With the token.
	if err := os.Remove(filepath.Join(dir, "reader.json")); err != nil {
		t.Fatal(err)
	}
	a.reload()
	var challenge *ChallengeError
	if err := try(byNew); !errors.As(err, &challenge) {
		t.Errorf("after its deletion: %v", err)
	}
	// In time.
	synctest.Test(t, func(t *testing.T) {
		a := authority(t, Config{Dir: dir})
		try := func(header string) error {
			_, err := a.Authorize(request("GET", "/v2/", "Authorization", header), need("team/app", v1alpha1.ActionContentRead))
			return err
		}
		bearer := getToken(t, a, basic("writer", "w"), "repository:team/app:pull")
		time.Sleep(BearerLifetime - time.Second)
		if err := try(bearer); err != nil {
			t.Errorf("before its end: %v", err)
		}
		time.Sleep(time.Second)
		if err := try(bearer); err == nil {
			t.Error("accepted after its end")
		}
	})
}

func TestBearerForgeries(t *testing.T) {
	s := signer{[]byte("key")}
	now := time.Unix(1_800_000_000, 0)
	good := claims{Issuer: service, Subject: "x", Issued: now.Unix(), Expires: now.Add(time.Minute).Unix()}
	text, err := s.sign(good)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := s.verify(text, now); err != nil || c.Subject != "x" {
		t.Fatalf("%+v, %v", c, err)
	}
	enc := base64.RawURLEncoding.EncodeToString
	parts := strings.Split(text, ".")
	none := enc([]byte(`{"alg":"none","typ":"JWT"}`)) + "." + parts[1]
	resigned := enc([]byte(`{"typ":"JWT","alg":"HS256"}`)) + "." + parts[1]
	sign := func(c claims) string { text, _ := s.sign(c); return text }
	for name, forged := range map[string]string{
		"empty":             "",
		"dots":              "..",
		"no signature":      parts[0] + "." + parts[1] + ".",
		"alg none":          none + ".",
		"other header":      resigned + "." + enc(s.mac(resigned)),
		"other payload":     parts[0] + "." + enc([]byte(`{"sub":"admin"}`)) + "." + parts[2],
		"other key":         func() string { text, _ := signer{[]byte("yek")}.sign(good); return text }(),
		"expired":           sign(claims{Issuer: service, Issued: now.Unix() - 600, Expires: now.Unix()}),
		"from the future":   sign(claims{Issuer: service, Issued: now.Unix() + 120, Expires: now.Unix() + 600}),
		"of another issuer": sign(claims{Issuer: "other", Issued: now.Unix(), Expires: now.Unix() + 600}),
		"padded":            text + "=",
		"huge":              strings.Repeat("x", maxBearer+1),
	} {
		if c, err := s.verify(forged, now); err == nil {
			t.Errorf("%s: accepted as %+v", name, c)
		}
	}
}

func TestReload(t *testing.T) {
	dir := t.TempDir()
	var log bytes.Buffer
	a := authority(t, Config{Dir: dir, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	names := func() []string {
		var names []string
		for name := range a.tokens.Load().tokens {
			names = append(names, name)
		}
		slices.Sort(names)
		return names
	}
	want := func(step string, want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, names()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step, diff)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		done := make(chan struct{})
		go func() { defer close(done); a.Watch(t.Context()) }()
		t.Cleanup(func() { <-done })
		pass := func() { time.Sleep(pollInterval); synctest.Wait() }

		want("empty")
		writeToken(t, dir, "one", clienttoken.File{Passwords: []string{cheapHash(t, "1")}})
		writeToken(t, dir, "two", clienttoken.File{Passwords: []string{cheapHash(t, "2")}})
		write(t, dir, "README", []byte("not a token"))
		write(t, dir, ".hidden.json", []byte("not a token"))
		pass()
		want("two tokens", "one", "two")
		write(t, dir, "one.json", []byte(`{"passwords":["plain"]}`))
		write(t, dir, "three.json", []byte(`{`))
		pass()
		want("one broken, one born broken", "one", "two")
		if _, _, err := a.login("one", "1", "127.0.0.1:1"); err != nil {
			t.Errorf("the last good state of one: %v", err)
		}
		lines := strings.Count(log.String(), "level=ERROR")
		pass()
		pass()
		if again := strings.Count(log.String(), "level=ERROR"); lines != 1 || again != lines {
			t.Errorf("%d lines, then %d: the same fault is told once\n%s", lines, again, &log)
		}
		if strings.Contains(log.String(), "plain") {
			t.Errorf("a password is in the log: %s", &log)
		}
		if err := os.Rename(dir, dir+".away"); err != nil {
			t.Fatal(err)
		}
		pass()
		want("directory gone", "one", "two")
		if err := os.Rename(dir+".away", dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(dir, "one.json")); err != nil {
			t.Fatal(err)
		}
		pass()
		want("one deleted", "two")
		// As a mounted Secret is exchanged.
		for i, name := range []string{"a", "b"} {
			if err := os.Mkdir(filepath.Join(dir, "..v"+name), 0o755); err != nil {
				t.Fatal(err)
			}
			writeToken(t, filepath.Join(dir, "..v"+name), "linked", clienttoken.File{Passwords: []string{cheapHash(t, name)}})
			link := filepath.Join(dir, "..data")
			if err := os.Symlink("..v"+name, link+".new"); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(link+".new", link); err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				if err := os.Symlink("..data/linked.json", filepath.Join(dir, "linked.json")); err != nil {
					t.Fatal(err)
				}
			}
			pass()
			if _, _, err := a.login("linked", name, "127.0.0.1:1"); err != nil {
				t.Errorf("linked to %s: %v", name, err)
			}
		}
	})
}

func TestParseTokenRefuses(t *testing.T) {
	good := cheapHash(t, "x")
	for content, want := range map[string]string{
		`{`:                   "unexpected EOF",
		`{} {}`:               "something follows",
		`{"password":"x"}`:    `unknown field "password"`,
		`{"passwords":["x"]}`: "passwords[0] is not of the form",
		fmt.Sprintf(`{"passwords":[%q,%q,%q]}`, good, good, good):             "two at most",
		`{"passwords":["$pbkdf2-sha256$i=0$c2FsdHNhbHQ$x"]}`:                  "iterations",
		`{"passwords":["$pbkdf2-sha256$i=999999999$c2FsdHNhbHQ$x"]}`:          "iterations",
		`{"passwords":["$pbkdf2-sha256$i=10$c2Fs$x"]}`:                        "salt",
		`{"passwords":["$pbkdf2-sha256$i=10$c2FsdHNhbHQ$c2FsdHNhbHQ"]}`:       "key",
		`{"scopeMap":[{"repositories":["a//b"],"actions":["content/read"]}]}`: `scopeMap[0].repositories: "a//b"`,
		`{"scopeMap":[{"repositories":["a"],"actions":["pull"]}]}`:            `scopeMap[0].actions: "pull"`,
	} {
		if _, err := parseToken("name", []byte(content)); err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "token name: ") {
			t.Errorf("%s: %v, want %q", content, err, want)
		}
	}
}

func TestNewRefusesShortSecret(t *testing.T) {
	if _, err := New(Config{Secret: []byte("short")}); err == nil {
		t.Error("accepted")
	}
}

func TestManyLoginsAtOnceHashOnce(t *testing.T) {
	a := authority(t, Config{})
	var wg sync.WaitGroup
	a.checker.hashing = make(chan struct{}, 1)
	a.checker.hashing <- struct{}{} // until all have come
	for range 50 {
		wg.Go(func() {
			if _, _, err := a.login("reader", "old", "10.0.0.1:1234"); err != nil {
				t.Error(err)
			}
		})
	}
	<-a.checker.hashing
	wg.Wait()
}

func TestRememberedPasswordsAreBounded(t *testing.T) {
	c := newChecker(1)
	for i := range maxRemembered + 10 {
		h, err := clienttoken.ParseHash(cheapHash(t, fmt.Sprint(i)))
		if err != nil {
			t.Fatal(err)
		}
		if !c.check(h, fmt.Sprint(i)) || !c.remembered(h, fmt.Sprint(i)) {
			t.Fatalf("%d not remembered", i)
		}
	}
	if len(c.right) != maxRemembered {
		t.Errorf("%d remembered", len(c.right))
	}
}

func TestFailedLoginsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter()
		fails := func(name, remote string) (n int) {
			for l.take(name, remote, time.Now()) == 0 {
				n++
			}
			return n
		}
		if got := fails("reader", "10.0.0.1:1"); got != pairLimit.burst {
			t.Errorf("%d attempts, want %d", got, pairLimit.burst)
		}
		if got := fails("reader", "10.0.0.1:2"); got != 0 {
			t.Errorf("another port: %d attempts", got)
		}
		// Neither the owner elsewhere nor others behind the address are locked out.
		for _, other := range [][2]string{{"reader", "10.0.0.2:1"}, {"writer", "10.0.0.1:1"}} {
			if wait := l.take(other[0], other[1], time.Now()); wait != 0 {
				t.Errorf("%v waits %v", other, wait)
			}
		}
		if wait := l.take("reader", "10.0.0.1:1", time.Now()); wait != pairLimit.refill {
			t.Errorf("waits %v, want %v", wait, pairLimit.refill)
		}
		time.Sleep(pairLimit.refill)
		if got := fails("reader", "10.0.0.1:1"); got != 1 {
			t.Errorf("after a while: %d attempts, want 1", got)
		}
		// An address that tries many names.
		total := 0
		for i := range 1000 {
			total += fails(fmt.Sprint("name", i), "10.0.0.3:1")
		}
		if total != addressLimit.burst {
			t.Errorf("%d attempts in all, want %d", total, addressLimit.burst)
		}
		// IPv6 by /64.
		fails("reader", "[2001:db8::1]:1")
		if got := fails("reader", "[2001:db8::2%eth0]:1"); got != 0 {
			t.Errorf("same /64: %d attempts", got)
		}
		if got := fails("reader", "[2001:db8:0:1::1]:1"); got == 0 {
			t.Error("another /64 is limited")
		}
		for i := range 2 * maxBuckets {
			l.take("x", fmt.Sprintf("10.%d.%d.%d:1", i>>16, i>>8&255, i&255), time.Now())
		}
		if len(l.buckets) > maxBuckets {
			t.Errorf("%d buckets", len(l.buckets))
		}
	})
}

func TestLimitedLogin(t *testing.T) {
	var log bytes.Buffer
	a := authority(t, Config{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	const here = "10.0.0.1:1"
	if _, _, err := a.login("reader", "old", here); err != nil {
		t.Fatal(err)
	}
	var tooMany *tooManyError
	for range pairLimit.burst + 1 {
		_, _, err := a.login("reader", "guess", here)
		if errors.As(err, &tooMany) {
			break
		}
	}
	if tooMany == nil {
		t.Fatal("never limited")
	}
	if _, _, err := a.login("reader", "old", here); err != nil {
		t.Errorf("a password known to be right: %v", err)
	}
	if _, _, err := a.login("reader", "new", here); !errors.As(err, &tooMany) {
		t.Errorf("a right password seen for the first time: %v", err)
	}
	if _, _, err := a.login("reader", "new", "10.0.0.2:1"); err != nil {
		t.Errorf("from elsewhere: %v", err)
	}
	r := request("GET", TokenPath, "Authorization", basic("reader", "guess"))
	r.RemoteAddr = here
	w := httptest.NewRecorder()
	a.ServeToken(w, r)
	if w.Code != 429 || w.Header().Get("Retry-After") == "" {
		t.Errorf("token endpoint: %d %v", w.Code, w.Header())
	}
	// containerd repeats a 429 at once, five times, but goes on after a 401.
	r = request("GET", "/v2/", "Authorization", basic("reader", "guess"))
	r.RemoteAddr = here
	var challenge *ChallengeError
	if _, err := a.Authorize(r, need("team/app", v1alpha1.ActionContentRead)); !errors.As(err, &challenge) || !strings.Contains(err.Error(), "too many") {
		t.Errorf("registry: %v", err)
	}
	if strings.Contains(log.String(), "guess") {
		t.Errorf("a password is in the log: %s", &log)
	}
}

func FuzzVerifyBearer(f *testing.F) {
	s := signer{[]byte("key")}
	now := time.Unix(1_800_000_000, 0)
	text, _ := s.sign(claims{Issuer: service, Expires: now.Unix() + 10, Issued: now.Unix()})
	f.Add(text)
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, forged string) {
		if _, err := s.verify(forged, now); err == nil && forged != text {
			t.Errorf("accepted %q", forged)
		}
	})
}

func FuzzParseToken(f *testing.F) {
	f.Add([]byte(`{"passwords":["` + cheapHash(f, "x") + `"],"scopeMap":[{"repositories":["a/**"],"actions":["content/read"]}]}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		tok, err := parseToken("x", content)
		if err == nil && (tok == nil || len(tok.passwords) > 2) {
			t.Errorf("%q: %+v", content, tok)
		}
	})
}

func FuzzParseResource(f *testing.F) {
	for _, text := range []string{"repository:a/b:pull,push", "registry:catalog:*", "repository:host:5000/a:pull", "repository::", ":::", "repository:a:*"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		g, ok := parseResource(text)
		if ok && g.Name == "" {
			t.Errorf("%q: %+v", text, g)
		}
		for _, a := range g.Actions {
			if !slices.Contains(allActions, a) {
				t.Errorf("%q: action %q", text, a)
			}
		}
	})
}
