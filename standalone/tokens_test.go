package standalone

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	parentregistry "github.com/google/go-containerregistry/pkg/registry"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// TestClientTokens pulls with and without credentials, from the registry and
// through the cache, which must not let anybody in whom the registry would not.
func TestClientTokens(t *testing.T) {
	parent := httptest.NewServer(parentregistry.New(parentregistry.Logger(log.New(io.Discard, "", 0))))
	defer parent.Close()
	host := strings.TrimPrefix(parent.URL, "http://")
	push(t, host+"/team/app:v1")
	push(t, host+"/other/app:v1")

	secrets := t.TempDir()
	writeSecret(t, secrets, "ci", "password2", "hunter2\n")
	s, err := Open(t.Context(), Config{
		Resource: load(t, fmt.Sprintf(`  parent: {endpoint: %q, insecure: true}
  repositories: [{name: "**"}]
  clientTokens:
    - name: ci
      secretRef: {name: ci}
      scopeMap: [{repositories: ["team/**"], actions: [content/read, metadata/read]}]
`, host)),
		Data: t.TempDir(), Secrets: secrets, Listen: "127.0.0.1:0", CacheListen: "127.0.0.1:0",
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Syncer.Sync(t.Context(), v1alpha1.SyncTriggerManual); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	go func() { done <- s.Registry.Run(ctx) }()
	go func() { done <- s.Cache.Run(ctx) }()
	defer func() {
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.ca.Pool()}}}
	defer client.CloseIdleConnections()

	for _, hop := range []string{"https://" + s.LoginServer, s.CacheURL} {
		for _, test := range []struct {
			repository, password string
			want                 int
		}{
			{"team/app", "hunter2", http.StatusOK},
			{"team/app", "", http.StatusUnauthorized},
			{"team/app", "wrong", http.StatusUnauthorized},
			{"other/app", "hunter2", http.StatusForbidden},
			{"team/app", "hunter2", http.StatusOK},
		} {
			url := hop + "/v2/" + test.repository + "/manifests/v1?ns=" + s.LoginServer
			got := status(t, client, url, test.password, test.want == http.StatusOK)
			// A registry that takes its time over a wrong password may be too
			// slow for the cache, which refuses by itself then.
			if got != test.want && !(hop == s.CacheURL && test.want != http.StatusOK && got == http.StatusBadGateway) {
				t.Errorf("%s with password %q: %d, expected %d", url, test.password, got, test.want)
			}
		}
	}
}

// status gets url and returns what is answered. With insist, it asks again as
// long as the cache finds the registry too slow, which it means for seconds.
func status(t *testing.T, client *http.Client, url, password string, insist bool) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if password != "" {
		req.SetBasicAuth("ci", password)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if !insist || resp.StatusCode != http.StatusBadGateway || time.Now().After(deadline) {
			return resp.StatusCode
		}
	}
}

func TestRenderTokens(t *testing.T) {
	given, dir := t.TempDir(), t.TempDir()
	writeSecret(t, given, "a", "password1", "one")
	writeSecret(t, given, "a", "password2", "two")
	writeSecret(t, given, "b", "password1", "three")
	spec := `  clientTokens:
    - {name: a, secretRef: {name: a}, scopeMap: [{repositories: ["**"], actions: [content/read]}]}
`
	both := load(t, spec+`    - {name: b, secretRef: {name: b}, scopeMap: [{repositories: ["**"], actions: [content/read]}]}
`)
	render := func(r *v1alpha1.ConnectedRegistry) map[string]string {
		t.Helper()
		if err := renderTokens(t.Context(), r, secrets(given), dir); err != nil {
			t.Fatal(err)
		}
		files := map[string]string{}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			data, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			files[e.Name()] = string(data)
		}
		return files
	}
	first := render(both)
	if len(first) != 2 {
		t.Fatalf("files: %v", first)
	}
	for name, content := range first {
		for _, password := range []string{"one", "two", "three"} {
			if strings.Contains(content, password) {
				t.Errorf("%s holds a password in clear", name)
			}
		}
	}
	if second := render(both); second["a.json"] != first["a.json"] {
		t.Error("an unchanged password was hashed anew")
	}
	writeSecret(t, given, "a", "password2", "changed")
	if third := render(both); third["a.json"] == first["a.json"] {
		t.Error("a changed password kept its hash")
	}
	if last := render(load(t, spec)); len(last) != 1 {
		t.Errorf("a token that is gone left %v", last)
	}
	if err := renderTokens(t.Context(), load(t, strings.ReplaceAll(spec, "secretRef: {name: a}", "secretRef: {name: c}")), secrets(given), dir); err == nil || !strings.Contains(err.Error(), "spec.clientTokens[0]: Secret c: ") {
		t.Errorf("a Secret that is missing: %v", err)
	}
}
