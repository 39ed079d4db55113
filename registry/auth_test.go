package registry

import (
	"context"
	"crypto/pbkdf2"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/crane"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
	"github.com/connected-registry/connected-registry/registry/auth"
)

// newAuthority has the token "team", which may read and write team/** and read
// shared, and the token "reader", which may read team/**. Each one's password
// is its name.
func newAuthority(t *testing.T, anonymous bool) *auth.Authority {
	t.Helper()
	dir := t.TempDir()
	const (
		read, write, del = v1alpha1.ActionContentRead, v1alpha1.ActionContentWrite, v1alpha1.ActionContentDelete
		meta             = v1alpha1.ActionMetadataRead
	)
	scope := func(repository string, actions ...v1alpha1.Action) v1alpha1.Scope {
		return v1alpha1.Scope{Repositories: []string{repository}, Actions: actions}
	}
	for name, scopes := range map[string][]v1alpha1.Scope{
		"team":   {scope("team/**", read, write, del, meta), scope("shared", read)},
		"reader": {scope("team/**", read, meta)},
	} {
		content, err := json.Marshal(clienttoken.File{Passwords: []string{cheapHash(t, name)}, ScopeMap: scopes})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name+".json"), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a, err := auth.New(auth.Config{Dir: dir, AnonymousPull: func() bool { return anonymous }})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// cheapHash is what clienttoken.HashPassword makes, of few iterations.
func cheapHash(t testing.TB, password string) string {
	t.Helper()
	salt := []byte("salt for a test")
	key, err := pbkdf2.Key(sha256.New, password, salt, 10, sha256.Size)
	if err != nil {
		t.Fatal(err)
	}
	enc := base64.RawStdEncoding
	return "$pbkdf2-sha256$i=10$" + enc.EncodeToString(salt) + "$" + enc.EncodeToString(key)
}

func TestCraneWithTokens(t *testing.T) {
	store := openStore(t)
	open := serveHandler(t, newServer(t, Config{Store: store}))
	layer := []byte("shared layer")
	open.pushImage("shared", "t", layer)
	open.pushImage("secret", "t", []byte("secret layer"))

	host, tr := startTLS(t, Config{Store: store, Auth: newAuthority(t, false)})
	as := func(name, password string) []crane.Option {
		return []crane.Option{crane.WithTransport(tr), crane.WithAuth(&authn.Basic{Username: name, Password: password})}
	}
	img, err := random.Image(1000, 2)
	if err != nil {
		t.Fatal(err)
	}
	if err := crane.Push(img, host+"/team/app:v1", as("team", "team")...); err != nil {
		t.Fatal(err)
	}
	if _, err := crane.Pull(host+"/team/app:v1", as("reader", "reader")...); err != nil {
		t.Errorf("reader pulls: %v", err)
	}
	if tags, err := crane.ListTags(host+"/team/app", as("reader", "reader")...); err != nil || len(tags) != 1 {
		t.Errorf("reader lists: %v, %v", tags, err)
	}
	for name, repos := range map[string][]string{"team": {"team/app"}, "reader": {"team/app"}} {
		got, err := crane.Catalog(host, as(name, name)...)
		if diff := cmp.Diff(repos, got); diff != "" || err != nil {
			t.Errorf("catalogue of %s: %v (-want +got):\n%s", name, err, diff)
		}
	}
	for what, err := range map[string]error{
		"reader pushes":          crane.Push(img, host+"/team/app:v2", as("reader", "reader")...),
		"reader deletes":         crane.Delete(host+"/team/app:v1", as("reader", "reader")...),
		"team pulls secret":      pull(host+"/secret:t", as("team", "team")),
		"wrong password":         pull(host+"/team/app:v1", as("reader", "wrong")),
		"nobody":                 pull(host+"/team/app:v1", []crane.Option{crane.WithTransport(tr)}),
		"team lists shared tags": func() error { _, err := crane.ListTags(host+"/shared", as("team", "team")...); return err }(),
	} {
		if err == nil {
			t.Errorf("%s: allowed", what)
		}
	}
	if err := crane.Copy(host+"/shared:t", host+"/team/copy:t", as("team", "team")...); err != nil {
		t.Errorf("copying from where it may read: %v", err)
	}
	if err := crane.Delete(host+"/team/app:v1", as("team", "team")...); err != nil {
		t.Errorf("team deletes: %v", err)
	}
}

func pull(ref string, options []crane.Option) error {
	_, err := crane.Pull(ref, options...)
	return err
}

// A blob cannot be had by mounting it from where one may not read.
func TestMountNeedsReading(t *testing.T) {
	store := openStore(t)
	open := serveHandler(t, newServer(t, Config{Store: store}))
	open.pushImage("secret", "t", []byte("more of it"))
	secret := open.pushBlob("secret", []byte("secret"))
	shared := open.pushBlob("shared", []byte("shared"))
	c := serveHandler(t, newServer(t, Config{Store: store, Auth: newAuthority(t, false)}))
	basic := []string{"Authorization", "Basic dGVhbTp0ZWFt"} // team:team
	c.want(c.do("POST", "/v2/team/x/blobs/uploads/?mount="+shared.String()+"&from=shared", nil, basic...), 201, "")
	c.want(c.do("POST", "/v2/team/x/blobs/uploads/?mount="+secret.String()+"&from=secret", nil, basic...), 202, "")
	c.want(c.do("POST", "/v2/team/x/blobs/uploads/?mount="+secret.String(), nil, basic...), 202, "")
	c.want(c.do("GET", "/v2/team/x/blobs/"+secret.String(), nil, basic...), 404, "BLOB_UNKNOWN")
}

func TestRefusals(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{Auth: newAuthority(t, false)}))
	team := []string{"Authorization", "Basic dGVhbTp0ZWFt"}
	reader := []string{"Authorization", "Basic cmVhZGVyOnJlYWRlcg=="}
	d := digest.FromString("x").String()
	for _, path := range []string{"/v2/", "/v2/_catalog", "/v2/a/tags/list", "/v2/a/manifests/t", "/v2/a/blobs/" + d, "/v2/a/referrers/" + d} {
		a := c.want(c.do("GET", path, nil), 401, "UNAUTHORIZED")
		if a.header.Get("Www-Authenticate") == "" {
			t.Errorf("%s: no challenge", path)
		}
		if a := c.do("GET", path+"?ns=docker.io", nil); a.status != 401 || a.header.Get("Www-Authenticate") != "" {
			t.Errorf("%s as a mirror: %d, challenge %q", path, a.status, a.header.Get("Www-Authenticate"))
		}
	}
	c.want(c.do("GET", "/v2/", nil, team...), 200, "")
	c.want(c.do("GET", "/v2/team/a/manifests/t", nil, team...), 404, "MANIFEST_UNKNOWN")
	// Whether it exists is not told.
	c.want(c.do("GET", "/v2/other/manifests/t", nil, team...), 403, "DENIED")
	for _, req := range [][2]string{
		{"PUT", "/v2/team/a/manifests/t"}, {"DELETE", "/v2/team/a/manifests/t"}, {"DELETE", "/v2/team/a/blobs/" + d},
		{"POST", "/v2/team/a/blobs/uploads/"}, {"GET", "/v2/team/a/blobs/uploads/x"}, {"PATCH", "/v2/team/a/blobs/uploads/x"},
	} {
		c.want(c.do(req[0], req[1], nil, reader...), 403, "DENIED")
	}
}

func TestTokenEndpointOnlyWithAuth(t *testing.T) {
	c := serveHandler(t, newServer(t, Config{}))
	c.want(c.do("GET", "/token", nil), 404, "NAME_UNKNOWN")
	c.want(c.do("GET", "/oauth2/token", nil), 404, "NAME_UNKNOWN")
}

// containerd pulls with a pull secret, by way of our challenge.
func TestContainerdPullsWithToken(t *testing.T) {
	store := openStore(t)
	d, _ := serveHandler(t, newServer(t, Config{Store: store})).pushImage("team/app", "v1", randomBytes(5000))
	for name, test := range map[string]struct {
		anonymous bool
		password  string
		ok        bool
	}{
		"right":     {false, "reader", true},
		"wrong":     {false, "wrong", false},
		"none":      {false, "", false},
		"anonymous": {true, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			host, tr := startTLS(t, Config{Store: store, Auth: newAuthority(t, test.anonymous)})
			client := &http.Client{Transport: tr}
			resolver := docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(
				docker.WithClient(client),
				docker.WithPlainHTTP(func(string) (bool, error) { return false, nil }),
				docker.WithAuthorizer(docker.NewDockerAuthorizer(
					docker.WithAuthClient(client),
					docker.WithAuthCreds(func(string) (string, string, error) {
						if test.password == "" {
							return "", "", nil
						}
						return "reader", test.password, nil
					}),
				)),
			)})
			_, desc, err := resolver.Resolve(context.Background(), host+"/team/app:v1")
			if (err == nil) != test.ok || (err == nil && desc.Digest != d) {
				t.Fatalf("Resolve: %v, %v", desc, err)
			}
			if !test.ok {
				return
			}
			f, err := resolver.Fetcher(context.Background(), host+"/team/app:v1")
			if err != nil {
				t.Fatal(err)
			}
			rc, err := f.Fetch(context.Background(), desc)
			if err != nil {
				t.Fatal(err)
			}
			defer rc.Close()
			if got, err := digest.FromReader(rc); err != nil || got != d {
				t.Errorf("fetched %s, %v", got, err)
			}
		})
	}
}
