package cache

import (
	"bytes"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// clock is a clock that a test sets.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time           { return time.Now().Add(time.Duration(c.offset.Load())) }
func (c *clock) advance(by time.Duration) { c.offset.Add(int64(by)) }

// guard lets each credential read the repositories named for it.
func guard(o *origin, challenge string, allow map[string][]string) {
	o.setFront(func(w http.ResponseWriter, r *http.Request) bool {
		for _, repo := range allow[r.Header.Get("Authorization")] {
			if strings.HasPrefix(r.URL.Path, "/v2/"+repo+"/") {
				return false
			}
		}
		w.Header().Set("Www-Authenticate", challenge)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
}

const basic = `Basic realm="registry.example"`

// TestPrivateContent walks through who may read what.
func TestPrivateContent(t *testing.T) {
	body := random(5<<20, 50)
	o := newOrigin(t)
	d := o.blob("team/a", body)
	o.blob("team/b", body)
	m := testManifest(d)
	md := o.manifest("team/a", "v1", m)
	guard(o, basic, map[string][]string{"Basic alice": {"team/a"}, "Basic bob": {"team/b"}})
	n := start(t, Config{Registries: upstreams(o.URL)})
	a, b := blobURL("team/a", d), blobURL("team/b", d)
	const denied = "fwd=miss; fwd-status=401"

	r := n.get(a)
	n.wantRefused(r, 401, denied)
	if got := r.header.Get("Www-Authenticate"); got != basic {
		t.Errorf("challenge %q", got)
	}
	n.wantBlob(n.get(a, "Authorization", "Basic alice"), body, "fwd=miss; stored")
	n.settled()
	for _, path := range []string{a, b, manifestURL("team/a", "v1"), manifestURL("team/a", md.String())} {
		n.wantRefused(n.get(path), 401, denied)
		n.wantRefused(n.do("HEAD", path), 401, denied)
	}
	n.wantRefused(n.get(a, "Authorization", "Basic bob"), 401, denied)
	n.wantRefused(n.get(b, "Authorization", "Basic alice"), 401, denied)
	n.wantBlob(n.get(b, "Authorization", "Basic bob"), body, "hit; detail=checked")

	o.forget()
	n.wantBlob(n.get(a, "Authorization", "Basic alice"), body, "hit")
	n.wantBlob(n.get(b, "Authorization", "Basic bob"), body, "hit")
	if len(o.asked) != 0 {
		t.Errorf("asked again: %q", o.asked)
	}
	// Alice may read team/a, but this blob is not known to be of it.
	other := digest.FromBytes(random(1000, 51))
	o.blob("team/b", random(1000, 51))
	n.get(blobURL("team/b", other), "Authorization", "Basic bob")
	n.settled()
	n.wantRefused(n.get(blobURL("team/a", other), "Authorization", "Basic alice"), 404, "fwd=miss; fwd-status=404")
}

// TestJoinsOnlyWithPermission checks that a download under way is not open to
// whoever asks for it.
func TestJoinsOnlyWithPermission(t *testing.T) {
	body := random(8<<20, 52)
	o := newOrigin(t)
	d := o.blob("app", body)
	g := newGate(5 << 20)
	serve := g.serve(body)
	o.setFront(func(w http.ResponseWriter, r *http.Request) bool {
		if auth := r.Header.Get("Authorization"); auth != "Basic alice" && auth != "Basic carol" {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		return serve(w, r)
	})
	n := start(t, Config{Registries: upstreams(o.URL)})
	first, second := make(chan reply), make(chan reply)
	go func() { first <- n.get(blobURL("app", d), "Authorization", "Basic alice") }()
	n.await(func() bool { return o.count("GET") == 1 })
	n.wantRefused(n.get(blobURL("app", d), "Authorization", "Basic mallory"), 403, "fwd=miss; fwd-status=403")
	n.wantRefused(n.get(blobURL("app", d)), 403, "fwd=miss; fwd-status=403")
	go func() { second <- n.get(blobURL("app", d), "Authorization", "Basic carol") }()
	n.await(func() bool { return o.count("HEAD") == 3 })
	g.open(len(body))
	n.wantBlob(<-first, body, "fwd=miss; stored")
	n.wantBlob(<-second, body, "fwd=miss; collapsed; stored")
	if got := o.count("GET"); got != 1 {
		t.Errorf("%d fetches", got)
	}
}

// TestRefusedStarterDoesNotHarmOthers has one without permission ask first.
func TestRefusedStarterDoesNotHarmOthers(t *testing.T) {
	body := random(1000, 53)
	o := newOrigin(t)
	d := o.blob("app", body)
	release := make(chan struct{})
	o.setFront(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == "Basic alice" {
			return false
		}
		<-release
		w.WriteHeader(http.StatusForbidden)
		return true
	})
	n := start(t, Config{Registries: upstreams(o.URL)})
	denied, allowed := make(chan reply), make(chan reply)
	go func() { denied <- n.get(blobURL("app", d)) }()
	n.await(func() bool { return o.count("GET") == 1 })
	go func() { allowed <- n.get(blobURL("app", d), "Authorization", "Basic alice") }()
	n.await(func() bool {
		n.mu.Lock()
		f := n.fills[d]
		n.mu.Unlock()
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.readers == 2
	})
	close(release)
	n.wantRefused(<-denied, 403, "fwd=miss; fwd-status=403")
	n.wantBlob(<-allowed, body, "fwd=miss; stored")
}

// TestPermissionExpires checks how long the registry's word counts, online and
// offline, across restarts and changes of the clock.
func TestPermissionExpires(t *testing.T) {
	body := random(1000, 54)
	o := newOrigin(t)
	d := o.blob("app", body)
	guard(o, basic, map[string][]string{"Basic alice": {"app"}})
	clk := &clock{}
	n := start(t, Config{Registries: upstreams(o.URL), Now: clk.now, OfflineTTL: 10 * time.Hour})
	get := func(auth string) reply { return n.get(blobURL("app", d), "Authorization", auth) }
	n.wantBlob(get("Basic alice"), body, "fwd=miss; stored")
	n.settled()
	n.wantBlob(get("Basic alice"), body, "hit")
	clk.advance(6 * time.Minute)
	n.wantBlob(get("Basic alice"), body, "hit; detail=checked")
	n.wantBlob(get("Basic alice"), body, "hit")
	clk.advance(61 * time.Minute)
	n = n.restart()
	n.wantBlob(get("Basic alice"), body, "hit; detail=checked")
	n.wantBlob(get("Basic alice"), body, "hit")
	clk.advance(-3 * time.Hour) // a confirmation from the future is no confirmation
	n.wantBlob(get("Basic alice"), body, "hit; detail=checked")

	o.Close()
	clk.advance(time.Hour)
	n.wantBlob(get("Basic alice"), body, "hit; detail=offline")
	n.wantRefused(get("Basic mallory"), 502, "fwd=miss; detail=unreachable")
	clk.advance(-2 * time.Hour)
	n.wantBlob(get("Basic alice"), body, "hit; detail=offline")
	n = n.restart()
	n.wantBlob(get("Basic alice"), body, "hit; detail=offline")
	clk.advance(12 * time.Hour)
	n.wantRefused(get("Basic alice"), 502, "fwd=miss; detail=unreachable")
}

// TestWithdrawnPermission checks that a refusal ends what had been allowed, for
// the time offline as well.
func TestWithdrawnPermission(t *testing.T) {
	body := random(1000, 55)
	for _, status := range []int{401, 403, 404} {
		o := newOrigin(t)
		d := o.blob("app", body)
		clk := &clock{}
		n := start(t, Config{Registries: upstreams(o.URL), Now: clk.now})
		get := func() reply { return n.get(blobURL("app", d), "Authorization", "Basic alice") }
		n.wantBlob(get(), body, "fwd=miss; stored")
		n.settled()
		clk.advance(10 * time.Minute)
		o.setFront(answering(status))
		if r := get(); r.status != status {
			t.Errorf("%d became %d", status, r.status)
		}
		o.Close()
		n = n.restart()
		n.wantRefused(get(), 502, "fwd=miss; detail=unreachable")
	}
}

// TestChallengesOffline checks that a registry that takes credentials can be
// unreachable without locking out those who had been allowed.
func TestChallengesOffline(t *testing.T) {
	body := random(1000, 56)
	for _, challenge := range []string{basic, `Bearer realm="http://registry.example/token"`} {
		o := newOrigin(t)
		d := o.blob("app", body)
		guard(o, challenge, map[string][]string{"Basic alice": {"app"}})
		n := start(t, Config{Registries: upstreams(o.URL)})
		path := blobURL("app", d)
		n.wantRefused(n.get(path), 401, "fwd=miss; fwd-status=401")
		n.wantBlob(n.get(path, "Authorization", "Basic alice"), body, "fwd=miss; stored")
		n.settled()
		o.Close()
		n = n.restart()
		r := n.get(path)
		n.wantRefused(r, 401, "fwd=miss; detail=unreachable")
		want, _, _ := strings.Cut(challenge, "registry.example")
		if strings.HasPrefix(challenge, "Bearer") {
			want = `Bearer realm="` + n.url + tokenPath // see TestBearerOffline
		}
		if got := r.header.Get("Www-Authenticate"); !strings.HasPrefix(got, want) {
			t.Errorf("challenge %q, want %q", got, want)
		}
		n.wantBlob(n.get(path, "Authorization", "Basic alice"), body, "hit")
		n.wantRefused(n.get(path, "Authorization", "Basic mallory"), 502, "fwd=miss; detail=unreachable")
	}
}

// TestNoCredentialOnDisk looks for what was said in all that is stored.
func TestNoCredentialOnDisk(t *testing.T) {
	body := random(1000, 57)
	o := newOrigin(t)
	d := o.blob("secret/repository", body)
	o.manifest("secret/repository", "v1", testManifest(d))
	var log bytes.Buffer
	n := start(t, Config{Registries: upstreams(o.URL), Logger: debugLog(&log)})
	auth := "Basic YWxpY2U6czNjcmV0"
	n.get(blobURL("secret/repository", d), "Authorization", auth)
	n.get(manifestURL("secret/repository", "v1"), "Authorization", auth)
	n.get(manifestURL("secret/repository", "v2"), "Authorization", auth)
	o.setFront(answering(401, "Www-Authenticate", basic))
	n.get(manifestURL("secret/repository", "v1"), "Authorization", "Basic "+"b3RoZXI")
	n.settled()
	n.stop()
	files := 0
	err := filepath.WalkDir(n.cfg.Dir, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		if perm := fi.Mode().Perm(); perm&0o077 != 0 && path != n.cfg.Dir {
			t.Errorf("%s has mode %o", path, perm)
		}
		if e.IsDir() {
			return nil
		}
		files++
		content, err := os.ReadFile(path)
		for _, secret := range []string{"YWxpY2U6czNjcmV0", "s3cret", "b3RoZXI"} {
			if bytes.Contains(content, []byte(secret)) || strings.Contains(path, secret) {
				t.Errorf("%s tells %q", path, secret)
			}
		}
		return err
	})
	if err != nil || files < 5 {
		t.Errorf("%d files, %v", files, err)
	}
	for _, secret := range []string{"YWxpY2U6czNjcmV0", "b3RoZXI"} {
		if strings.Contains(log.String(), secret) {
			t.Errorf("the log tells %q", secret)
		}
	}
}

// TestTagsOffline walks a tag through the registry's absence and changes.
func TestTagsOffline(t *testing.T) {
	o := newOrigin(t)
	first, second := testManifest(), testManifest(digest.FromString("x"))
	d1 := o.manifest("app", "latest", first)
	n := start(t, Config{Registries: upstreams(o.URL)})
	want := func(r reply, status int, cache, body string) {
		t.Helper()
		if r.status != status || r.cache() != cache || body != "" && string(r.body) != body {
			t.Errorf("%d %s: %.80s; want %d %s", r.status, r.cache(), r.body, status, cache)
		}
	}
	get := func() reply { return n.get(manifestURL("app", "latest")) }
	want(get(), 200, "fwd=miss; stored", first)
	want(get(), 200, "hit; detail=checked", first)
	o.manifest("app", "latest", second)
	want(get(), 200, "fwd=miss; stored", second)
	n.settled()

	for _, status := range []int{500, 503, 429} {
		o.setFront(answering(status))
		want(get(), 200, "hit; detail=stale-tag", second)
	}
	n = n.restart()
	want(get(), 200, "hit; detail=stale-tag", second)
	head := n.do("HEAD", manifestURL("app", "latest"))
	if head.header.Get("Docker-Content-Digest") != digest.FromString(second).String() || head.header.Get("Content-Length") == "" {
		t.Errorf("HEAD: %v", head.header)
	}
	want(n.get(manifestURL("app", "other")), 502, "fwd=miss; detail=unreachable", "")
	want(n.get(manifestURL("app", "latest"), "Authorization", "Basic mallory"), 502, "fwd=miss; detail=unreachable", "")
	want(n.get(manifestURL("app", d1.String())), 200, "hit", first)

	o.setFront(answering(404)) // deleted: that is an answer
	want(get(), 404, "fwd=miss; fwd-status=404", "")
	o.setFront(answering(500))
	want(get(), 502, "fwd=miss; detail=unreachable", "")
}

// TestTagOf404AndSilence has one replica that lacks the tag and one that does
// not answer, which together are not a definite no.
func TestTagOf404AndSilence(t *testing.T) {
	o := newOrigin(t)
	m := testManifest()
	o.manifest("app", "v1", m)
	n := start(t, Config{Registries: upstreams(o.URL)})
	n.get(manifestURL("app", "v1"))
	n.settled()
	o.setFront(answering(404))
	if err := n.SetRegistries(upstreams(o.URL, refusing(t))); err != nil {
		t.Fatal(err)
	}
	if r := n.get(manifestURL("app", "v1")); r.status != 200 || r.cache() != "hit; detail=stale-tag" {
		t.Errorf("%d %s", r.status, r.cache())
	}
}

func TestTagsUpstream(t *testing.T) {
	o := newOrigin(t)
	d := o.manifest("app", "v1", testManifest())
	regs := upstreams(o.URL)
	reg := regs[testHost]
	reg.TagsUpstream = true
	regs[testHost] = reg
	n := start(t, Config{Registries: regs})
	n.wantRefused(n.get(manifestURL("app", "v1")), 404, "fwd=miss; detail=tags-upstream")
	if r := n.get(manifestURL("app", d.String())); r.status != 200 {
		t.Errorf("by digest: %d", r.status)
	}
	if len(o.asked) != 1 {
		t.Errorf("asked %q", o.asked)
	}
}

// TestRegistryWithoutDigestHeader takes the digest from the manifest itself.
func TestRegistryWithoutDigestHeader(t *testing.T) {
	o := newOrigin(t)
	m := testManifest()
	d := digest.FromString(m)
	o.setFront(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet {
			w.Write([]byte(m))
		}
		return true
	})
	n := start(t, Config{Registries: upstreams(o.URL)})
	r := n.do("HEAD", manifestURL("app", "v1"))
	if r.status != 200 || r.header.Get("Docker-Content-Digest") != d.String() || r.header.Get("Content-Length") == "" {
		t.Errorf("%d %v", r.status, r.header)
	}
}

func TestReferrers(t *testing.T) {
	o := newOrigin(t)
	d := digest.FromString("subject")
	const list = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`
	o.setFront(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Type", "application/vnd.oci.image.index.v1+json")
		if r.URL.Query().Get("artifactType") == "application/x" {
			w.Header().Set("OCI-Filters-Applied", "artifactType")
		}
		w.Write([]byte(list))
		return true
	})
	n := start(t, Config{Registries: upstreams(o.URL)})
	r := n.get("/v2/app/referrers/" + d.String() + "?artifactType=application/x&ns=" + testHost)
	if r.status != 200 || string(r.body) != list || r.header.Get("OCI-Filters-Applied") != "artifactType" ||
		r.cache() != "fwd=bypass; detail=referrers" {
		t.Errorf("%d %v %s", r.status, r.header, r.body)
	}
	o.setFront(answering(404))
	n.wantRefused(n.get("/v2/app/referrers/"+d.String()), 404, "fwd=miss; fwd-status=404")
}

// TestNamespaces checks which upstream is asked for which registry, and what it
// is told.
func TestNamespaces(t *testing.T) {
	a, b := newOrigin(t), newOrigin(t)
	body := random(1000, 58)
	d := a.blob("app", body)
	var told []string
	a.setFront(func(_ http.ResponseWriter, r *http.Request) bool {
		told = append(told, r.URL.RawQuery)
		return false
	})
	n := start(t, Config{Registries: map[string]Registry{
		"a.example:5000": {Upstreams: []Upstream{{URL: a.URL}}},
		"alias.example":  {Upstreams: []Upstream{{URL: a.URL, Namespace: "a.example:5000"}}},
		"b.example":      {Upstreams: []Upstream{{URL: b.URL}}},
	}})
	path := blobURL("app", d)
	n.wantBlob(n.get(path+"?ns=a.example:5000"), body, "fwd=miss; stored")
	n.settled()
	n.wantBlob(n.get(path+"?ns=alias.example"), body, "hit; detail=checked")
	n.wantRefused(n.get(path+"?ns=b.example"), 404, "fwd=miss; fwd-status=404")
	n.wantRefused(n.get(path+"?ns=c.example"), 404, "")
	n.wantRefused(n.get(path+"?ns="), 404, "")
	for _, q := range told {
		if q != "ns=a.example%3A5000" {
			t.Errorf("told %q", told)
		}
	}
	if b.count("") != 1 {
		t.Errorf("b was asked %q", b.asked)
	}
}
