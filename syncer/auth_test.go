package syncer

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// tokenService gives out tokens for scopes to those who know the password, and
// checks them. (distribution's token authentication specification.)
type tokenService struct {
	*httptest.Server
	username, password string // "" takes anonymous clients
	lifetime           int    // seconds, 0: not said

	mu     sync.Mutex
	issued map[string]string // scope by token
	asked  []string          // METHOD scopes
	served atomic.Int64
}

func newTokenService(t *testing.T, username, password string) *tokenService {
	s := &tokenService{username: username, password: password, issued: make(map[string]string)}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *tokenService) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	user, pass, _ := r.BasicAuth()
	ok := user == s.username && pass == s.password
	if r.Method == http.MethodPost {
		ok = r.PostForm.Get("grant_type") == "refresh_token" && r.PostForm.Get("refresh_token") == s.password && s.username == ""
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, r.Method+" "+r.Form.Get("scope"))
	if !ok {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	token := fmt.Sprintf("token-%d", len(s.issued))
	s.issued[token] = r.Form.Get("scope")
	answer := map[string]any{"token": token, "access_token": token}
	if s.lifetime > 0 {
		answer["expires_in"] = s.lifetime
	}
	_ = json.NewEncoder(w).Encode(answer)
}

// revoke makes every token that was given out worthless.
func (s *tokenService) revoke() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for token := range s.issued {
		s.issued[token] = "revoked"
	}
}

func (s *tokenService) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

// guard challenges whoever comes without a token for what is asked.
func (s *tokenService) guard(w http.ResponseWriter, r *http.Request) bool {
	scope := ""
	switch path := strings.TrimPrefix(r.URL.Path, "/v2/"); path {
	case "":
	case "_catalog":
		scope = catalogScope
	default:
		for _, part := range []string{"/manifests/", "/blobs/", "/tags/", "/referrers/"} {
			if name, _, ok := strings.Cut(path, part); ok {
				scope = repositoryScope(name)
			}
		}
	}
	token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	s.mu.Lock()
	granted, ok := s.issued[token]
	s.mu.Unlock()
	if ok && granted == scope {
		s.served.Add(1)
		return false
	}
	challenge := fmt.Sprintf(`Bearer realm="%s/token",service="registry"`, s.URL)
	if scope != "" {
		challenge += fmt.Sprintf(`,scope="%s"`, scope)
	}
	w.Header().Set("WWW-Authenticate", challenge)
	w.WriteHeader(http.StatusUnauthorized)
	return true
}

func TestSyncWithTokens(t *testing.T) {
	for name, tt := range map[string]struct {
		username, password string // of the service
		parent             Parent
		method             string
	}{
		"password":       {"edge", "hunter2", Parent{Username: "edge", Password: "hunter2"}, "GET"},
		"anonymous":      {"", "", Parent{}, "GET"},
		"identity token": {"", "refresh", Parent{Password: "refresh"}, "POST"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newTestParent(t)
			d := p.pushImage(t, "team/app:1", testImage(t, "x", testLayer(1, 1000), testLayer(2, 1000)))
			p.pushImage(t, "team/web:1", testImage(t, "y", testLayer(3, 1000)))
			service := newTokenService(t, tt.username, tt.password)
			p.setFault(service.guard)
			f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
				tt.parent.Endpoint, tt.parent.Insecure = p.host, true
				c.Parent = tt.parent
				c.Repositories = exactly("team/**")
			})
			f.mustSync(t)
			f.verifyHere(t, "team/app", d, nil)
			got := service.requests()
			slices.Sort(got)
			want := []string{
				tt.method + " registry:catalog:*",
				tt.method + " repository:team/app:pull",
				tt.method + " repository:team/web:pull",
			}
			if !slices.Equal(got, want) {
				t.Errorf("tokens were asked for: %s", got)
			}
			// The parent is not asked first and shown the token afterwards.
			refused := len(p.asked("")) - int(service.served.Load())
			if refused != 1 {
				t.Errorf("%d requests were refused", refused)
			}
		})
	}
}

func TestSyncRenewsTokens(t *testing.T) {
	p := newTestParent(t)
	d := p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 1000)))
	service := newTokenService(t, "edge", "hunter2")
	var once sync.Once
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			once.Do(service.revoke)
		}
		return service.guard(w, r)
	})
	f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Parent = Parent{Endpoint: p.host, Insecure: true, Username: "edge", Password: "hunter2"}
		c.Repositories = exactly("app")
		c.Concurrency = 1
	})
	f.mustSync(t)
	f.verifyHere(t, "app", d, nil)
	if got := service.requests(); len(got) != 2 {
		t.Errorf("tokens were asked for: %s", got)
	}
}

func TestTokenExpires(t *testing.T) {
	service := newTokenService(t, "", "")
	service.lifetime = 1
	a := newParent(Parent{Endpoint: "p", Insecure: true}, defaultLimits(), nil, nil).auth
	defer a.client.CloseIdleConnections()
	a.bearer.Realm = service.URL
	get := func() string {
		value, err := a.token(t.Context(), "s", "")
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
	if first := get(); get() != first {
		t.Error("a token was not used again")
	}
	a.tokens["s"].expires = time.Now()
	if get() != "token-1" {
		t.Error("a token was used beyond its time")
	}
}

func TestSyncRefusedCredentials(t *testing.T) {
	basic := func(w http.ResponseWriter, r *http.Request) bool {
		if user, pass, _ := r.BasicAuth(); user == "edge" && pass == "hunter2" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="registry"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	service := newTokenService(t, "edge", "hunter2")
	garbage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"token":7,"x":"hunter2"}`) }))
	t.Cleanup(garbage.Close)
	challenge := func(value string) func(w http.ResponseWriter, r *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", value)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
	}
	for name, tt := range map[string]struct {
		guard              func(w http.ResponseWriter, r *http.Request) bool
		username, password string
		want               string
	}{
		"basic":                  {basic, "edge", "hunter2", ""},
		"basic, wrong password":  {basic, "edge", "hunter3", "P refused the credentials for the tags of app (401): check the Secret that holds them, and what they may read"},
		"basic, no password":     {basic, "", "", "P wants credentials for the tags of app (401): name them in spec.parent.credentialsSecretRef"},
		"bearer":                 {service.guard, "edge", "hunter2", ""},
		"bearer, wrong password": {service.guard, "edge", "hunter3", "P's token service S refused the credentials for repository:app:pull (401): check the Secret that holds them, and what they may read"},
		"bearer, no password":    {service.guard, "", "", "P's token service S wants credentials for repository:app:pull (401): name them in spec.parent.credentialsSecretRef"},
		"token is never enough": {func(w http.ResponseWriter, r *http.Request) bool {
			r.Header.Del("Authorization")
			return service.guard(w, r)
		}, "edge", "hunter2", "P refused the credentials for the tags of app (401): check the Secret that holds them, and what they may read"},
		"token service is no URL":  {challenge(`Bearer realm="nowhere"`), "edge", "hunter2", "P gave a wrong answer for authentication: its token service is not a URL"},
		"token service is missing": {challenge(`Bearer service="x"`), "edge", "hunter2", "P gave a wrong answer for authentication: no realm specified for token auth challenge"},
		"token is none":            {challenge(`Bearer realm="` + garbage.URL + `"`), "edge", "hunter2", "P's token service G gave a wrong answer for repository:app:pull: it is not a token"},
		"negotiation":              {challenge(`Negotiate`), "edge", "hunter2", "P refused the credentials for the tags of app (401): check the Secret that holds them, and what they may read"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newTestParent(t)
			p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 1000)))
			p.setFault(tt.guard)
			f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
				c.Parent = Parent{Endpoint: p.host, Insecure: true, Username: tt.username, Password: tt.password}
				c.Repositories = exactly("app")
			})
			_, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
			if tt.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			want := strings.NewReplacer("P's", "parent "+p.host+"'s", "P ", "parent "+p.host+" ", "service S ", "service "+hostOf(service.URL)+" ", "service G ", "service "+hostOf(garbage.URL)+" ").Replace(tt.want)
			if err == nil || err.Error() != want {
				t.Errorf("%v\nwant %s", err, want)
			}
			if err != nil && strings.Contains(err.Error(), "hunter") {
				t.Error("the error gives a password away")
			}
			if n := len(p.asked("")); n > 4 {
				t.Errorf("%d requests: %s", n, p.asked(""))
			}
		})
	}
}

func hostOf(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return u.Host
}

// Credentials for a parent that is spoken to over TLS do not go to a token
// service in the clear.
func TestRealmOverPlainHTTP(t *testing.T) {
	secret := newParent(Parent{Endpoint: "p", Username: "u", Password: "hunter2"}, defaultLimits(), nil, nil).auth
	if err := secret.checkRealm("http://auth.example/token"); err == nil || !strings.Contains(err.Error(), "auth.example would get the credentials over plain HTTP") {
		t.Error(err)
	}
	anonymous := newParent(Parent{Endpoint: "p"}, defaultLimits(), nil, nil).auth
	if err := anonymous.checkRealm("http://auth.example/token"); err != nil {
		t.Error(err)
	}
}

// Blob storage that the parent redirects to never sees credentials: neither on
// another port of the same host, nor on a host of the parent's domain.
func TestSyncRedirectsWithoutCredentials(t *testing.T) {
	for _, kind := range []string{"basic", "bearer"} {
		t.Run(kind, func(t *testing.T) {
			p := newTestParent(t)
			d := p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 100_000)))
			var stored atomic.Int64
			blobs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				stored.Add(1)
				if r.Header.Get("Authorization") != "" {
					t.Errorf("the storage got %q", r.Header.Get("Authorization"))
				}
				if stored.Load() == 1 {
					w.WriteHeader(http.StatusForbidden) // the link has expired
					return
				}
				p.handler.ServeHTTP(w, r)
			}))
			t.Cleanup(blobs.Close)
			service := newTokenService(t, "edge", "hunter2")
			p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
				if kind == "bearer" && service.guard(w, r) {
					return true
				}
				if user, pass, _ := r.BasicAuth(); kind == "basic" && (user != "edge" || pass != "hunter2") {
					w.Header().Set("WWW-Authenticate", `Basic realm="registry"`)
					w.WriteHeader(http.StatusUnauthorized)
					return true
				}
				if !strings.Contains(r.URL.Path, "/blobs/") {
					return false
				}
				http.Redirect(w, r, blobs.URL+r.URL.Path, http.StatusTemporaryRedirect)
				return true
			})
			f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
				c.Parent = Parent{Endpoint: p.host, Insecure: true, Username: "edge", Password: "hunter2"}
				c.Repositories = exactly("app")
			})
			f.mustSync(t)
			f.verifyHere(t, "app", d, nil)
			if stored.Load() != 3 {
				t.Errorf("%d requests to the storage", stored.Load())
			}
		})
	}
}

func TestRedirectPolicy(t *testing.T) {
	p := newParent(Parent{Endpoint: "registry.example.com"}, defaultLimits(), nil, nil)
	request := func(s string) *http.Request {
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, s, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer secret")
		return req
	}
	first := []*http.Request{request("https://registry.example.com/v2/")}
	for to, want := range map[string]struct{ keeps, fails bool }{
		"https://registry.example.com/elsewhere": {keeps: true},
		"https://data.registry.example.com/":     {},
		"https://registry.example.com:8443/":     {},
		"https://storage.example.net/":           {},
		"http://storage.example.net/":            {fails: true},
		"http://registry.example.com/":           {fails: true},
	} {
		req := request(to)
		err := p.redirect(req, first)
		if (err != nil) != want.fails || (req.Header.Get("Authorization") != "") != want.keeps {
			t.Errorf("%s: %v, %q", to, err, req.Header.Get("Authorization"))
		}
	}
	if p.redirect(request("https://registry.example.com/"), make5(first[0])) == nil {
		t.Error("redirects without end are followed")
	}
}

func make5(r *http.Request) []*http.Request { return []*http.Request{r, r, r, r, r} }

func TestSyncCatalog(t *testing.T) {
	p := newTestParent(t)
	img := testImage(t, "x", testLayer(1, 100))
	var want []string
	for i := range 7 {
		name := fmt.Sprintf("team/app%d", i)
		p.pushImage(t, name+":1", img)
		want = append(want, name)
	}
	// Pages of two, whatever is asked for, by relative and absolute links.
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/v2/_catalog" {
			return false
		}
		start := 0
		if last := r.URL.Query().Get("last"); last != "" {
			start = slices.Index(want, last) + 1
		}
		end := min(start+2, len(want))
		link := "/v2/_catalog?last=" + url.QueryEscape(want[end-1])
		if start > 2 {
			link = "http://internal.name:5000" + link
		}
		if end < len(want) {
			w.Header().Set("Link", "<"+link+`>; rel="next"`)
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"repositories": append([]string{"Not A Name", "../../etc"}, want[start:end]...)})
		return true
	})
	f := newFixture(t, p, v1alpha1.Repository{Name: "**"})
	result := f.mustSync(t)
	var got []string
	for _, repo := range result.Repositories {
		got = append(got, repo.Name)
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s", got)
	}

	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/v2/_catalog" {
			w.WriteHeader(http.StatusNotFound)
			return true
		}
		return false
	})
	f = newFixture(t, p, v1alpha1.Repository{Name: "**"}, v1alpha1.Repository{Name: "team/app1"})
	result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
	if err == nil || err.Error() != "parent "+p.host+" does not list its repositories (404): name them in spec.repositories without wildcards" {
		t.Error(err)
	}
	if len(result.Repositories) != 2 || result.Repositories[0].Name != "**" || result.Repositories[1].TagsPresent != 1 {
		t.Errorf("%+v", result.Repositories)
	}
}

// A parent that cuts its lists short without a link to the rest has all of it
// read nevertheless.
func TestNamesWithoutLinks(t *testing.T) {
	for name, tt := range map[string]struct {
		total, page int
		ignoresLast bool
		want        int
	}{
		"takes last":             {2500, pageSize, false, 2500},
		"ignores last":           {2500, pageSize, true, pageSize},
		"caps pages at 100":      {250, 100, false, 250},
		"caps pages at 50":       {120, 50, false, 120},
		"has a round number":     {200, 100, false, 200},
		"has all, a full page":   {100, 1000, false, 100},
		"sends all, always":      {5000, 5000, true, 5000},
		"has none":               {0, 100, false, 0},
		"has a page that is one": {1, 1000, false, 1},
	} {
		t.Run(name, func(t *testing.T) {
			var all []string
			for i := range tt.total {
				all = append(all, fmt.Sprintf("t%04d", i))
			}
			p := newTestParent(t)
			p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
				start := 0
				if last := r.URL.Query().Get("last"); last != "" && !tt.ignoresLast {
					start = slices.Index(all, last) + 1
				}
				_ = json.NewEncoder(w).Encode(map[string]any{"tags": all[start:min(start+tt.page, len(all))]})
				return true
			})
			client := newParent(Parent{Endpoint: p.host, Insecure: true}, defaultLimits(), nil, slog.New(slog.DiscardHandler))
			defer client.close()
			got, err := client.tags(t.Context(), "app")
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(got, all[:tt.want]) {
				t.Errorf("%d tags", len(got))
			}
		})
	}
}

// A parent that refuses every token it has given is not asked for each of many
// tags.
func TestSyncStopsAtRefusals(t *testing.T) {
	service := newTokenService(t, "", "")
	p := newTestParent(t)
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/v2/" {
			return false
		}
		r.Header.Del("Authorization")
		return service.guard(w, r)
	})
	var tags []string
	for i := range 200 {
		tags = append(tags, fmt.Sprint("t", i))
	}
	f := newFixtureAt(t, t.TempDir(), p, func(c *Config) {
		c.Repositories = []v1alpha1.Repository{{Name: "app", Tags: v1alpha1.Tags{Include: tags}}}
	})
	f.limits.asks = 2
	if _, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual); err == nil || !strings.Contains(err.Error(), "(401)") {
		t.Errorf("%v", err)
	}
	if got := len(p.asked("")) + len(service.requests()); got > 30 {
		t.Errorf("%d requests", got)
	}
}
