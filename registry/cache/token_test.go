package cache

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// tokenServer issues tokens for alice, by GET and POST, with any password but
// the wrong one.
type tokenServer struct {
	*httptest.Server
	mu    sync.Mutex // guards what follows
	life  int        // seconds
	count int
	valid map[string]string // user by token
}

func newTokenServer(t *testing.T) *tokenServer {
	s := &tokenServer{life: 300, valid: map[string]string{}}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *tokenServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	user, password, _ := r.BasicAuth()
	if r.Method == http.MethodPost {
		user, password = r.PostFormValue("username"), r.PostFormValue("password")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count++
	if r.FormValue("service") != "reg" || user != "alice" || password == "wrong" {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	token := fmt.Sprintf("token-%d", s.count)
	s.valid[token] = user
	fmt.Fprintf(w, `{"token":%[1]q,"access_token":%[1]q,"expires_in":%[2]d}`, token, s.life)
}

// guardBy has o accept the tokens of s.
func (s *tokenServer) guard(o *origin) {
	o.setFront(func(w http.ResponseWriter, r *http.Request) bool {
		token, _ := bearerToken(r.Header.Get("Authorization"))
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.valid[token] != "" {
			return false
		}
		w.Header().Set("Www-Authenticate", `Bearer realm="`+s.URL+`/token",service="reg",scope="repository:app:pull"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
}

// TestBearerOffline pulls a private image with a pull secret from a registry
// that takes tokens, then with registry and token service gone, also after a
// restart of the cache. Who was never allowed is not served.
func TestBearerOffline(t *testing.T) {
	o, tokens := newOrigin(t), newTokenServer(t)
	all := image(o, random(5<<20, 200))
	tokens.guard(o)
	n := start(t, Config{Registries: upstreams(o.URL)})
	for _, phase := range []string{"cold", "warm", "offline", "offline after a restart"} {
		switch phase {
		case "offline":
			n.settled()
			o.Close()
			tokens.Close()
		case "offline after a restart":
			n = n.restart()
		}
		for _, user := range []string{"", "mallory"} {
			c := newContainerd(t, n.url, refusing(t))
			c.user = user
			if err := c.pull(1); err == nil {
				t.Errorf("%s: %q could pull", phase, user)
			}
		}
		alice := newContainerd(t, n.url, refusing(t))
		alice.user = "alice"
		if err := alice.pull(1); err != nil {
			t.Fatalf("%s: %v", phase, err)
		}
		for _, body := range all {
			alice.has(body)
		}
	}
}

// askToken asks the cache for a token, by GET with Basic credentials, or POST.
func (n *node) askToken(method, user, password string) (status int, answer string) {
	n.t.Helper()
	where := n.url + tokenPath + "?ns=" + testHost
	req, err := http.NewRequest(method, where+"&service=reg&scope=repository:app:pull", nil)
	if method == http.MethodPost {
		form := url.Values{"grant_type": {"password"}, "service": {"reg"}, "username": {user}, "password": {password}}
		req, err = http.NewRequest(method, where, strings.NewReader(form.Encode()))
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	} else if user != "" {
		req.SetBasicAuth(user, password)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	resp, err := n.client.Do(req)
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		n.t.Fatal(err)
	}
	if _, token, ok := strings.Cut(string(body), `"token":"`); ok {
		token, _, _ = strings.Cut(token, `"`)
		return resp.StatusCode, token
	}
	return resp.StatusCode, string(body)
}

// TestTokens walks through what tokens are good for.
func TestTokens(t *testing.T) {
	o, tokens := newOrigin(t), newTokenServer(t)
	body := random(1000, 201)
	path := blobURL("app", o.blob("app", body))
	tokens.guard(o)
	n := start(t, Config{Registries: upstreams(o.URL)})

	r := n.get(path)
	n.wantRefused(r, 401, "fwd=miss; fwd-status=401")
	want := `Bearer realm="` + n.url + tokenPath + `?ns=` + testHost + `",service="reg",scope="repository:app:pull"`
	if got := r.header.Get("Www-Authenticate"); got != want {
		t.Errorf("challenge %s, want %s", got, want)
	}
	if status, _ := n.askToken("GET", "alice", "wrong"); status != 401 {
		t.Errorf("a wrong password: %d", status)
	}
	_, byGet := n.askToken("GET", "alice", "secret")
	_, byPost := n.askToken("POST", "alice", "secret")
	if byGet == byPost || !strings.HasPrefix(byGet, "token-") || !strings.HasPrefix(byPost, "token-") {
		t.Fatalf("tokens %q and %q", byGet, byPost)
	}
	n.wantBlob(n.get(path, "Authorization", "Bearer "+byGet), body, "fwd=miss; stored")
	n.settled()
	o.forget()
	n.wantBlob(n.get(path, "Authorization", "Bearer "+byPost), body, "hit") // the same credential
	if len(o.asked) > 0 {
		t.Errorf("asked %q", o.asked)
	}
	n.wantRefused(n.get(path, "Authorization", "Bearer x"), 401, "fwd=miss; fwd-status=401")

	o.Close()
	tokens.Close()
	for _, method := range []string{"GET", "POST"} {
		status, own := n.askToken(method, "alice", "secret")
		if status != 200 || !strings.HasPrefix(own, "offline-") {
			t.Fatalf("%s offline: %d %q", method, status, own)
		}
		n.wantBlob(n.get(path, "Authorization", "Bearer "+own), body, "hit")
		n.wantRefused(n.get(blobURL("other", missingDigest), "Authorization", "Bearer "+own), 502, "fwd=miss; detail=unreachable")
	}
	for _, who := range [][2]string{{"alice", "wrong"}, {"mallory", "secret"}, {"", ""}} {
		if status, answer := n.askToken("GET", who[0], who[1]); status != 502 {
			t.Errorf("%q offline: %d %q", who, status, answer)
		}
	}
	// A token that has run out makes the client ask for a new one.
	n.wantRefused(n.get(path, "Authorization", "Bearer offline-old"), 401, "fwd=miss; detail=unreachable")
}

// TestOwnTokenIsNotPassedOn has the registry come back while a client still uses
// a token of the cache.
func TestOwnTokenIsNotPassedOn(t *testing.T) {
	o, tokens := newOrigin(t), newTokenServer(t)
	body := random(1000, 202)
	path := blobURL("app", o.blob("app", body))
	tokens.guard(o)
	var c clock
	n := start(t, Config{Registries: upstreams(o.URL), Now: c.now})
	n.get(path)
	_, token := n.askToken("GET", "alice", "secret")
	n.wantBlob(n.get(path, "Authorization", "Bearer "+token), body, "fwd=miss; stored")
	n.settled()
	front := o.front
	o.setFront(answering(500))
	tokens.Close()
	_, own := n.askToken("GET", "alice", "secret")
	c.advance(time.Hour)
	n.wantBlob(n.get(path, "Authorization", "Bearer "+own), body, "hit; detail=offline")
	o.setFront(front)
	o.forget()
	n.wantRefused(n.get(path, "Authorization", "Bearer "+own), 401, "fwd=miss; fwd-status=401")
	for _, auth := range o.auth {
		if auth != "" {
			t.Errorf("the registry has been shown %q", auth)
		}
	}
	o.setFront(answering(500))
	n.wantBlob(n.get(path, "Authorization", "Bearer "+own), body, "hit; detail=offline") // nothing was revoked
}

// TestTokenRequests checks what is refused.
func TestTokenRequests(t *testing.T) {
	o, tokens := newOrigin(t), newTokenServer(t)
	tokens.guard(o)
	n := start(t, Config{Registries: upstreams(o.URL)})
	if status, _ := n.askToken("GET", "alice", "secret"); status != 502 {
		t.Errorf("before any challenge: %d", status)
	}
	n.get(blobURL("app", missingDigest))
	for _, tt := range []struct {
		name, method, query, media, body string
		want                             int
	}{
		{"unknown registry", "GET", "?ns=unknown.test", "", "", 404},
		{"another method", "PUT", "?ns=" + testHost, "", "", 405},
		{"no form", "POST", "?ns=" + testHost, "application/json", "{}", 400},
		{"a huge form", "POST", "?ns=" + testHost, "application/x-www-form-urlencoded", strings.Repeat("x", maxTokenForm+1), 400},
	} {
		req, err := http.NewRequest(tt.method, n.url+tokenPath+tt.query, strings.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", tt.media)
		resp, err := n.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, resp.StatusCode, tt.want)
		}
	}
}

// TestNoPasswordOnDisk looks for what came by.
func TestNoPasswordOnDisk(t *testing.T) {
	o, tokens := newOrigin(t), newTokenServer(t)
	body := random(1000, 203)
	path := blobURL("app", o.blob("app", body))
	tokens.guard(o)
	n := start(t, Config{Registries: upstreams(o.URL)})
	n.get(path)
	_, token := n.askToken("GET", "alice", "very secret")
	n.get(path, "Authorization", "Bearer "+token)
	n.stop()
	err := filepath.Walk(n.cfg.Dir, func(path string, fi os.FileInfo, err error) error {
		if err != nil || !fi.Mode().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		for _, secret := range []string{"alice", "very secret", token} {
			if strings.Contains(string(b), secret) {
				t.Errorf("%s holds %q", path, secret)
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestBearersAreBounded(t *testing.T) {
	var b bearers
	for i := range 3 * maxTokens {
		b.put(factKey{byte(i), byte(i >> 8), byte(i >> 16)}, bearer{until: time.Now().Add(time.Hour)})
		if len(b.tokens) > maxTokens {
			t.Fatalf("%d are remembered", len(b.tokens))
		}
	}
}

// replicaWithTokens has o want tokens of its own token service, which has its
// address as clients know it.
func replicaWithTokens(o *origin) {
	o.setFront(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/oauth2/token" {
			fmt.Fprint(w, `{"token":"token-1","expires_in":300}`)
			return true
		}
		if r.Header.Get("Authorization") == "Bearer token-1" {
			return false
		}
		w.Header().Set("Www-Authenticate", `Bearer realm="http://`+r.Host+`/oauth2/token",service="reg"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
}

// TestTokensFromAnotherReplica has all replicas but one be gone, or never answer,
// after the one that wanted a token.
func TestTokensFromAnotherReplica(t *testing.T) {
	for name, broken := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"breaks off": func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) },
		"hangs": func(w http.ResponseWriter, r *http.Request) bool {
			_, _ = io.Copy(io.Discard, r.Body) // or it would not be told when the cache leaves
			return hang(w, r)
		},
		"500": answering(500),
	} {
		bubble(t, name, func(t *testing.T, net *network) {
			body := random(1000, 204)
			var path string
			var all []*origin
			for _, address := range []string{"a:80", "b:80", "service:80"} {
				o := net.serve(t, address)
				path = blobURL("app", o.blob("app", body))
				replicaWithTokens(o)
				all = append(all, o)
			}
			n := net.runWith(t, Config{Registries: behind("a:80", "b:80")})
			for _, sound := range []int{0, 1, 2} {
				n.wantRefused(n.get(path), 401, "fwd=miss; fwd-status=401")
				for i, o := range all {
					if i != sound {
						o.setFront(broken)
					}
				}
				began := time.Now()
				status, token := n.askToken("POST", "alice", "secret")
				if took := time.Since(began); status != 200 || token != "token-1" || took > 2*time.Second {
					t.Errorf("only %d is sound: %d %q after %s", sound, status, token, took)
				}
				for _, o := range all {
					replicaWithTokens(o)
				}
				time.Sleep(10 * time.Second) // until all are trusted again
			}
		})
	}
}
