package registry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
	"github.com/connected-registry/connected-registry/registry/auth"
	"github.com/connected-registry/connected-registry/storage"
)

// rulesOf are the rules of a resource with this spec.
func rulesOf(t *testing.T, spec string) *Rules {
	t.Helper()
	r, err := v1alpha1.Load("f", []byte("apiVersion: connectedregistry.io/v1alpha1\nkind: ConnectedRegistry\nmetadata: {name: edge}\nspec:\n"+spec))
	if err != nil {
		t.Fatal(err)
	}
	rules, err := NewRules(&r.Spec)
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

func serveRules(t *testing.T, spec string) (*client, *storage.Store) {
	t.Helper()
	store, rules := openStore(t), rulesOf(t, spec)
	return serveHandler(t, newServer(t, Config{Store: store, Rules: func() *Rules { return rules }})), store
}

func TestImmutableTags(t *testing.T) {
	c, _ := serveRules(t, "  immutableTags:\n  - {repositories: [team/**], tags: ['v*', 'regex:[0-9]+']}\n  - {repositories: [locked]}\n")
	d, content := c.pushImage("team/a", "v1", []byte("1"))
	c.pushImage("team/a", "latest", []byte("2"))
	other := bytes.Replace(content, []byte("{"), []byte("{ "), 1)
	for _, tag := range []string{"v1"} {
		a := c.want(c.do("PUT", "/v2/team/a/manifests/"+tag, other, "Content-Type", typeOCIManifest), 403, "DENIED")
		if !strings.Contains(string(a.body), "tag v1 of repository team/a is immutable") {
			t.Errorf("says %s", a.body)
		}
		c.want(c.do("PUT", "/v2/team/a/manifests/"+tag, content, "Content-Type", typeOCIManifest), 201, "")
		c.want(c.do("DELETE", "/v2/team/a/manifests/"+tag, nil), 403, "DENIED")
		c.want(c.do("DELETE", "/v2/team/a/manifests/"+d.String(), nil), 403, "DENIED")
		c.want(c.do("DELETE", "/v2/team/a/", nil), 403, "DENIED")
	}
	if a := c.do("GET", "/v2/team/a/manifests/v1", nil); !bytes.Equal(a.body, content) {
		t.Errorf("the tag names %s", a.body)
	}
	c.want(c.do("PUT", "/v2/team/a/manifests/latest", other, "Content-Type", typeOCIManifest), 201, "")
	c.want(c.do("DELETE", "/v2/team/a/manifests/latest", nil), 202, "")
	c.want(c.do("DELETE", "/v2/team/a/manifests/"+digest.FromBytes(other).String(), nil), 202, "")
	c.pushImage("locked", "any", []byte("x"))
	c.want(c.do("DELETE", "/v2/locked/manifests/any", nil), 403, "DENIED")
	c.pushImage("free", "v1", []byte("x"))
	c.pushImage("free", "v1", []byte("y"))
	c.want(c.do("DELETE", "/v2/free/", nil), 202, "")
}

// Of several who push the same immutable tag at once, one is told that it did.
func TestImmutableTagHasOneWinner(t *testing.T) {
	c, _ := serveRules(t, "  immutableTags:\n  - {repositories: ['**']}\n")
	_, content := c.pushImage("a", "seed", []byte("1"))
	for round := range 10 {
		var created sync.Map
		var pushers sync.WaitGroup
		for i := range 4 {
			mine := append(bytes.Repeat([]byte(" "), i+1), content...)
			pushers.Go(func() {
				req, _ := http.NewRequestWithContext(t.Context(), "PUT", fmt.Sprintf("%s/v2/a/manifests/t%d", c.base, round), bytes.NewReader(mine))
				resp, err := c.http.Do(req)
				if err != nil {
					t.Error(err)
					return
				}
				resp.Body.Close()
				if resp.StatusCode == 201 {
					created.Store(digest.FromBytes(mine).String(), true)
				} else if resp.StatusCode != 403 {
					t.Errorf("status %d", resp.StatusCode)
				}
			})
		}
		pushers.Wait()
		n := 0
		created.Range(func(d, _ any) bool {
			n++
			if a := c.do("HEAD", fmt.Sprintf("/v2/a/manifests/t%d", round), nil); a.header.Get("Docker-Content-Digest") != d {
				t.Errorf("tag names %s, and %s was acknowledged", a.header.Get("Docker-Content-Digest"), d)
			}
			return true
		})
		if n != 1 {
			t.Errorf("%d pushes were acknowledged", n)
		}
	}
}

func TestQuota(t *testing.T) {
	c, _ := serveRules(t, "  quota: {total: 10Ki, perRepository: 4Ki}\n")
	first := randomBytes(3000)
	d := c.pushBlob("a", first)
	refused := func(a answer, words ...string) {
		t.Helper()
		c.want(a, 403, "DENIED")
		for _, w := range words {
			if !strings.Contains(string(a.body), w) {
				t.Errorf("%s does not say %q", a.body, w)
			}
		}
	}
	start := func(repo string) string {
		t.Helper()
		return c.want(c.do("POST", "/v2/"+repo+"/blobs/uploads/", nil), 202, "").header.Get("Location")
	}
	second := randomBytes(2000)
	put := "?digest=" + digest.FromBytes(second).String()
	refused(c.do("POST", "/v2/a/blobs/uploads/"+put, second), "repository a holds 3000 of the 4Ki that spec.quota.perRepository allows", `"used":3000`, `"limit":4096`)
	refused(c.do("PUT", start("a")+put, second), "3000")
	refused(c.do("PATCH", start("a"), second))
	refused(c.do("PATCH", start("a"), io.MultiReader(bytes.NewReader(second))), "3000") // of unknown length
	location := start("a")
	location = c.want(c.do("PATCH", location, second[:1000]), 202, "").header.Get("Location")
	refused(c.do("PATCH", location, second[1000:]))
	c.want(c.do("PATCH", location, second[1000:]), 404, "BLOB_UPLOAD_UNKNOWN") // and its space is free
	manifest := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[],"annotations":{"x":%q}}`, typeOCIIndex, strings.Repeat("x", 1500))
	refused(c.do("PUT", "/v2/a/manifests/t", manifest), "3000")
	c.want(c.do("GET", "/v2/a/manifests/t", nil), 404, "MANIFEST_UNKNOWN")

	c.pushBlob("b", second)
	refused(c.do("POST", "/v2/b/blobs/uploads/?mount="+d.String()+"&from=a", nil), "repository b")
	c.want(c.do("POST", "/v2/c/blobs/uploads/?mount="+d.String()+"&from=a", nil), 201, "") // nothing is added in total
	c.pushBlob("d", randomBytes(3000))
	refused(c.do("POST", "/v2/e/blobs/uploads/?digest="+digest.FromBytes(randomBytes(1)).String(), randomBytes(3000)), "this registry holds", "spec.quota.total")
	noUploads(t, c.root, "a")

	c.want(c.do("DELETE", "/v2/a/", nil), 202, "")
	c.pushBlob("a", second)
}

func TestJournalOfPushesAndDeletions(t *testing.T) {
	c, store := serveRules(t, "  mode: ReadWrite\n  parent: {endpoint: parent.example}\n")
	d, content := c.pushImage("a", "t", []byte("1"))
	c.want(c.do("PUT", "/v2/a/manifests/"+d.String(), content, "Content-Type", typeOCIManifest), 201, "")
	c.want(c.do("DELETE", "/v2/a/manifests/t", nil), 202, "")
	c.want(c.do("DELETE", "/v2/a/manifests/"+d.String(), nil), 202, "")
	c.want(c.do("DELETE", "/v2/a/", nil), 202, "")
	// What was refused is not there.
	c.want(c.do("DELETE", "/v2/a/", nil), 404, "NAME_UNKNOWN")
	c.want(c.do("DELETE", "/v2/a/manifests/"+d.String(), nil), 404, "MANIFEST_UNKNOWN")
	c.want(c.do("PUT", "/v2/a/manifests/t", content, "Content-Type", typeOCIManifest), 400, "MANIFEST_BLOB_UNKNOWN")
	got, err := store.Journal().Entries(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	push := storage.Change{Action: storage.ActionPush, Repository: "a", Tag: "t", Digest: d, MediaType: typeOCIManifest, Size: int64(len(content))}
	untagged := push
	untagged.Tag = ""
	want := []storage.Entry{{Change: push}, {Change: untagged},
		{Change: storage.Change{Action: storage.ActionDelete, Repository: "a", Tag: "t", Digest: d, Previous: d}},
		{Change: storage.Change{Action: storage.ActionDelete, Repository: "a", Digest: d}},
		{Change: storage.Change{Action: storage.ActionDelete, Repository: "a"}}}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(storage.Entry{}, "ID", "Time")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A push that the journal cannot take changes nothing.
func TestPushWithoutJournalIsRefused(t *testing.T) {
	c, store := serveRules(t, "  mode: ReadWrite\n  parent: {endpoint: parent.example}\n")
	d, content := c.pushImage("a", "t", []byte("1"))
	journal := filepath.Join(store.Root(), "journal")
	if err := os.RemoveAll(journal); err != nil {
		t.Fatal(err)
	}
	c.want(c.do("PUT", "/v2/a/manifests/u", content, "Content-Type", typeOCIManifest), 500, "UNKNOWN")
	c.want(c.do("DELETE", "/v2/a/manifests/t", nil), 500, "UNKNOWN")
	c.want(c.do("GET", "/v2/a/manifests/u", nil), 404, "MANIFEST_UNKNOWN")
	c.want(c.do("GET", "/v2/a/manifests/t", nil), 200, "")
	c.want(c.do("GET", "/v2/a/manifests/"+d.String(), nil), 200, "")
}

func TestDeleteRepository(t *testing.T) {
	c, store := serveRules(t, "  {}\n")
	d, content := c.pushImage("a", "t", []byte("1"))
	c.pushImage("a/b", "t", []byte("2"))
	location := c.do("POST", "/v2/a/blobs/uploads/", nil).header.Get("Location")
	c.want(c.do("GET", "/v2/a/", nil), 404, "NAME_UNKNOWN")
	c.want(c.do("PUT", "/v2/a/", nil), 405, "UNSUPPORTED")
	c.want(c.do("DELETE", "/v2/A/", nil), 400, "NAME_INVALID")
	c.want(c.do("DELETE", "/v2/a/", nil), 202, "")
	c.want(c.do("DELETE", "/v2/a/", nil), 404, "NAME_UNKNOWN")
	c.want(c.do("GET", "/v2/a/tags/list", nil), 404, "NAME_UNKNOWN")
	c.want(c.do("GET", "/v2/a/manifests/"+d.String(), nil), 404, "MANIFEST_UNKNOWN")
	c.want(c.do("GET", location, nil), 404, "BLOB_UPLOAD_UNKNOWN")
	c.want(c.do("GET", "/v2/a/b/manifests/t", nil), 200, "")
	if a := c.do("GET", "/v2/_catalog", nil); string(a.body) != `{"repositories":["a/b"]}` {
		t.Errorf("catalogue %s", a.body)
	}
	c.want(c.do("PUT", "/v2/a/manifests/t", content, "Content-Type", typeOCIManifest), 400, "MANIFEST_BLOB_UNKNOWN")
	c.pushImage("a", "t", []byte("1"))
	if _, total, err := store.Used(t.Context(), "a"); err != nil || total == 0 {
		t.Error(total, err)
	}
}

func TestDeletingARepositoryNeedsBothActions(t *testing.T) {
	authority := newAuthority(t, true)
	c := serveHandler(t, newServer(t, Config{Auth: authority}))
	a := c.do("DELETE", "/v2/a/", nil)
	c.want(a, 401, "UNAUTHORIZED")
	if h := a.header.Get("Www-Authenticate"); !strings.Contains(h, "repository:a:delete") {
		t.Errorf("challenge %q", h)
	}
	want := []auth.Need{
		{Repository: "a", AnyOf: []v1alpha1.Action{v1alpha1.ActionContentDelete}},
		{Repository: "a", AnyOf: []v1alpha1.Action{v1alpha1.ActionMetadataWrite}},
	}
	if diff := cmp.Diff(want, needs(parseRoute("/v2/a/"), "DELETE")); diff != "" {
		t.Error(diff)
	}
}

func TestAnonymousPullForMirrors(t *testing.T) {
	rules := rulesOf(t, `  parent: {endpoint: parent.example}
  repositories: [{name: team/**}]
  upstreams:
  - {endpoint: registry-1.docker.io, prefix: hub, repositories: [{name: library/*}]}
  - {endpoint: ghcr.io, repositories: [{name: org/app, prefix: gh}]}
  mirrors:
  - {registry: docker.io, anonymousPull: true}
  - {registry: ghcr.io, anonymousPull: true}
  - {registry: parent.example}
`)
	for _, tt := range []struct {
		registry, repository string
		want                 bool
	}{
		{"docker.io", "hub/library/nginx", true},
		{"docker.io", "library/nginx", false},
		{"docker.io", "hub/library/a/b", false},
		{"docker.io", "team/secret", false},
		{"ghcr.io", "gh/org/app", true},
		{"ghcr.io", "gh/org/other", false},
		{"parent.example", "team/a", false}, // not opened
		{"quay.io", "hub/library/nginx", false},
		{"", "hub/library/nginx", false},
	} {
		if got := rules.AnonymousPullFor(tt.registry, tt.repository); got != tt.want {
			t.Errorf("%s of %s: %v", tt.repository, tt.registry, got)
		}
	}
	named := rulesOf(t, "  parent: {connectionStringSecretRef: {name: s}}\n  repositories: [{name: team/*}]\n  mirrors: [{registry: x.azurecr.io, anonymousPull: true}]\n")
	if !named.AnonymousPullFor("x.azurecr.io", "team/a") || named.AnonymousPullFor("x.azurecr.io", "other/a") {
		t.Error("a parent that is known by its connection string alone")
	}
}

// What a client without credentials gets is what comes from the registry that it
// speaks for, and nothing else, whatever it says.
func TestMirrorOpensNothingElse(t *testing.T) {
	store := openStore(t)
	seed := serveHandler(t, newServer(t, Config{Store: store}))
	layer := []byte("layer")
	d, _ := seed.pushImage("hub/nginx", "t", layer)
	seed.pushImage("private", "t", []byte("secret"))
	rules := rulesOf(t, "  upstreams: [{endpoint: docker.io, prefix: hub, repositories: [{name: '*'}]}]\n  mirrors: [{registry: docker.io, anonymousPull: true}]\n")
	authority := mirrorAuthority(t, rules.AnonymousPullFor)
	c := serveHandler(t, newServer(t, Config{Store: store, Auth: authority}))
	for _, path := range []string{"manifests/t", "manifests/" + d.String(), "blobs/" + digest.FromBytes(layer).String(), "referrers/" + d.String()} {
		c.want(c.do("GET", "/v2/hub/nginx/"+path+"?ns=docker.io", nil), 200, "")
		// Credentials are those of another registry, and are not looked at.
		c.want(c.do("GET", "/v2/hub/nginx/"+path+"?ns=docker.io", nil, "Authorization", "Basic eDp5"), 200, "")
		c.want(c.do("GET", "/v2/hub/nginx/"+path, nil), 401, "UNAUTHORIZED")
		c.want(c.do("GET", "/v2/private/"+path+"?ns=docker.io", nil), 401, "UNAUTHORIZED")
		c.want(c.do("GET", "/v2/hub/nginx/"+path+"?ns=quay.io", nil), 401, "UNAUTHORIZED")
	}
	host := strings.TrimPrefix(c.base, "http://")
	for _, path := range []string{"/v2/_catalog?ns=docker.io", "/v2/hub/nginx/tags/list?ns=docker.io", "/v2/?ns=docker.io", "/v2/hub/nginx/manifests/t?ns=" + host, "/v2/hub/nginx/manifests/t?ns=docker.io&ns="} {
		if a := c.do("GET", path, nil); a.status == 200 && !strings.HasSuffix(path, "ns=") {
			t.Errorf("GET %s: %d %s", path, a.status, a.body)
		}
	}
	a := c.do("GET", "/v2/private/manifests/t?ns=docker.io", nil)
	if h := a.header.Get("Www-Authenticate"); h != "" {
		t.Errorf("challenged for another registry: %q", h)
	}
	c.want(c.do("PUT", "/v2/hub/nginx/manifests/t?ns=docker.io", "{}"), 401, "UNAUTHORIZED")
	c.want(c.do("DELETE", "/v2/hub/nginx/manifests/t?ns=docker.io", nil), 401, "UNAUTHORIZED")
	c.want(c.do("POST", "/v2/hub/x/blobs/uploads/?ns=docker.io&from=private&mount="+d.String(), nil), 401, "UNAUTHORIZED")
}

func mirrorAuthority(t *testing.T, pull func(registry, repository string) bool) *auth.Authority {
	t.Helper()
	dir := t.TempDir()
	file, err := json.Marshal(clienttoken.File{Passwords: []string{cheapHash(t, "p")}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "someone.json"), file, 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := auth.New(auth.Config{Dir: dir, AnonymousPullFor: pull})
	if err != nil {
		t.Fatal(err)
	}
	return a
}
