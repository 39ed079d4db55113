package syncer

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// azure is what an Azure container registry's pull meets, as the documents say:
// Microsoft Entra ID, the instance metadata service and the registry's own token
// service.
type azure struct {
	parent   *testParent
	entra    *httptest.Server
	metadata *httptest.Server
	file     string // the pod's token

	mu    sync.Mutex
	asked []string
	deny  string // part of the path whose requests are refused
	life  time.Duration
}

const (
	entraToken  = "entra.access.token"
	accessToken = "registry-access-token"
)

func newAzure(t *testing.T) *azure {
	t.Helper()
	a := &azure{parent: newTestParent(t), file: filepath.Join(t.TempDir(), "token"), life: 3 * time.Hour}
	if err := os.WriteFile(a.file, []byte("pod.service.token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	a.entra = httptest.NewServer(http.HandlerFunc(a.serveEntra))
	t.Cleanup(a.entra.Close)
	a.metadata = httptest.NewServer(http.HandlerFunc(a.serveMetadata))
	t.Cleanup(a.metadata.Close)
	a.parent.setFault(a.serveRegistry)
	return a
}

// note takes a request down and answers it when it is to be refused.
func (a *azure) note(w http.ResponseWriter, r *http.Request, what string) (refused bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked = append(a.asked, what)
	if a.deny != "" && strings.Contains(what, a.deny) {
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = fmt.Fprintf(w, `{"error":"invalid_client","error_description":"secret %s"}`, r.PostForm.Encode())
		return true
	}
	return false
}

func reply(w http.ResponseWriter, answer map[string]any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer)
}

func wants(w http.ResponseWriter, got, want url.Values) bool {
	if diff := cmp.Diff(want, got); diff != "" {
		http.Error(w, diff, http.StatusBadRequest)
		return false
	}
	return true
}

func (a *azure) serveEntra(w http.ResponseWriter, r *http.Request) {
	_ = r.ParseForm()
	if a.note(w, r, r.Method+" entra"+r.URL.Path) {
		return
	}
	if wants(w, r.PostForm, url.Values{
		"grant_type":            {"client_credentials"},
		"client_id":             {"client-1"},
		"scope":                 {"https://containerregistry.azure.net/.default"},
		"client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"},
		"client_assertion":      {"pod.service.token"},
	}) {
		reply(w, map[string]any{"token_type": "Bearer", "expires_in": 3599, "access_token": entraToken})
	}
}

func (a *azure) serveMetadata(w http.ResponseWriter, r *http.Request) {
	if a.note(w, r, r.Method+" metadata"+r.URL.Path+" "+r.URL.Query().Get("client_id")) {
		return
	}
	if r.Header.Get("Metadata") != "true" || r.URL.Query().Get("api-version") != "2018-02-01" || r.URL.Query().Get("resource") != "https://containerregistry.azure.net" {
		http.Error(w, `{"error":"invalid_request"}`, http.StatusBadRequest)
		return
	}
	reply(w, map[string]any{"access_token": entraToken, "expires_in": "86399", "expires_on": "1800000000", "token_type": "Bearer"})
}

// serveRegistry is the registry's token service, and what keeps out whoever has
// no token.
func (a *azure) serveRegistry(w http.ResponseWriter, r *http.Request) bool {
	_ = r.ParseForm()
	host := a.parent.host
	switch r.URL.Path {
	case "/oauth2/exchange":
		if a.note(w, r, "exchange") {
			return true
		}
		want := url.Values{"grant_type": {"access_token"}, "service": {host}, "access_token": {entraToken}}
		if r.PostForm.Has("tenant") {
			want.Set("tenant", "tenant-1")
		}
		if wants(w, r.PostForm, want) {
			reply(w, map[string]any{"refresh_token": a.refreshToken()})
		}
	case "/oauth2/token":
		if a.note(w, r, "token "+r.PostForm.Get("scope")) {
			return true
		}
		if r.PostForm.Get("grant_type") != "refresh_token" || r.PostForm.Get("refresh_token") != a.refreshToken() || r.PostForm.Get("service") != host {
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return true
		}
		reply(w, map[string]any{"access_token": accessToken, "expires_in": 3600})
	default:
		if r.URL.Path == "/v2/" || r.Header.Get("Authorization") == "Bearer "+accessToken {
			return false
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/oauth2/token",service="%s",scope="repository:app:pull"`, host, host))
		w.WriteHeader(http.StatusUnauthorized)
	}
	return true
}

// refreshToken is a JWT like the registry's.
func (a *azure) refreshToken() string {
	part := base64.RawURLEncoding.EncodeToString
	claims := fmt.Sprintf(`{"exp":%d}`, time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC).Add(a.life).Unix())
	return part([]byte(`{"alg":"none"}`)) + "." + part([]byte(claims)) + "." + part([]byte("signature"))
}

func (a *azure) identity(clientID string, workload bool) *azureIdentity {
	z := newAzureIdentity(Parent{Endpoint: a.parent.host, Insecure: true}, clientID)
	z.metadata = a.metadata.URL
	environment := map[string]string{}
	if workload {
		environment = map[string]string{
			"AZURE_FEDERATED_TOKEN_FILE": a.file,
			"AZURE_TENANT_ID":            "tenant-1",
			"AZURE_CLIENT_ID":            "client-1",
			"AZURE_AUTHORITY_HOST":       a.entra.URL + "/",
		}
	}
	z.environment = func(name string) string { return environment[name] }
	return z
}

func (a *azure) fixture(t *testing.T, z *azureIdentity) *fixture {
	return newFixtureAt(t, t.TempDir(), a.parent, func(c *Config) {
		c.Repositories = exactly("app")
		c.Parent.Credentials = z.credentials
	})
}

// The whole way from an identity to the image, twice; the second time the
// registry's refresh token is used that is there.
func TestAzureIdentity(t *testing.T) {
	for name, tt := range map[string]struct {
		clientID string
		workload bool
		want     string
	}{
		"workload identity":             {"", true, "POST entra/tenant-1/oauth2/v2.0/token"},
		"managed identity":              {"", false, "GET metadata/metadata/identity/oauth2/token "},
		"one of the managed identities": {"client-2", false, "GET metadata/metadata/identity/oauth2/token client-2"},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAzure(t)
			d := a.parent.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 1000)))
			f := a.fixture(t, a.identity(tt.clientID, tt.workload))
			f.mustSync(t)
			f.verifyHere(t, "app", d, nil)
			f.mustSync(t)
			want := []string{tt.want, "exchange", "token repository:app:pull", "token repository:app:pull"}
			if diff := cmp.Diff(want, a.asked); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// What refuses is named with the remedy, and no token gets out.
func TestAzureIdentityRefused(t *testing.T) {
	for deny, tt := range map[string]struct {
		workload bool
		want     string
	}{
		"entra":    {true, "Microsoft Entra ID at ENTRA refuses the workload identity client-1 (401): check the identity's federated credential and that it names this pod's service account"},
		"metadata": {false, "Azure's instance metadata service refuses the managed identity of this machine (401): assign the identity to this machine, or give the pod a workload identity, or correct spec.parent.azureIdentity.clientID"},
		"exchange": {false, "parent PARENT refuses the identity (401): give it the role AcrPull on the registry"},
		"token r":  {false, "parent PARENT refused the credentials for repository:app:pull (401): check the Secret that holds them, and what they may read"},
	} {
		t.Run(deny, func(t *testing.T) {
			a := newAzure(t)
			a.parent.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 1000)))
			a.deny = deny
			_, err := a.fixture(t, a.identity("", tt.workload)).Sync(t.Context(), v1alpha1.SyncTriggerManual)
			want := strings.NewReplacer("ENTRA", strings.TrimPrefix(a.entra.URL, "http://"), "PARENT", a.parent.host).Replace(tt.want)
			if err == nil || err.Error() != want {
				t.Errorf("%v\nwant %s", err, want)
			}
		})
	}
	t.Run("no metadata service", func(t *testing.T) {
		a := newAzure(t)
		a.metadata.Close()
		f := a.fixture(t, a.identity("", false))
		f.limits.attempts = 1
		_, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
		want := "Azure's instance metadata service refuses connections: is it running, and is spec.parent.endpoint its port?: assign the identity"
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v", err)
		}
	})
	t.Run("no token for the pod", func(t *testing.T) {
		a := newAzure(t)
		if err := os.Remove(a.file); err != nil {
			t.Fatal(err)
		}
		_, err := a.fixture(t, a.identity("", true)).Sync(t.Context(), v1alpha1.SyncTriggerManual)
		if err == nil || !strings.HasPrefix(err.Error(), "reading the pod's token for its workload identity: ") {
			t.Errorf("%v", err)
		}
	})
}

func TestExpiry(t *testing.T) {
	now := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	jwt := func(claims string) string {
		return "x." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".y"
	}
	for token, want := range map[string]time.Duration{
		jwt(fmt.Sprintf(`{"exp":%d}`, now.Add(4*time.Hour).Unix())):  3 * time.Hour,
		jwt(fmt.Sprintf(`{"exp":%d}`, now.Add(-4*time.Hour).Unix())): 0,
		jwt(`{}`):     0,
		jwt(`nope`):   0,
		"opaque":      0,
		"a.%%%.c":     0,
		"a.b.c.d.e.f": 0,
	} {
		if got := expiry(token, now).Sub(now); got != want {
			t.Errorf("%s: %s, want %s", token, got, want)
		}
	}
}

// A credential helper is asked as docker asks it.
func TestCredentialHelper(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	script := `#!/bin/sh
[ "$1" = get ] || exit 2
read -r server
case "$server" in
registry.example.com) echo '{"ServerURL":"registry.example.com","Username":"u","Secret":"hunter2"}' ;;
https://index.docker.io/v1/) echo '{"Username":"<token>","Secret":"identity"}' ;;
odd.example.com) echo 'hunter3' ;;
*) echo "credentials not found: hunter3"; exit 1 ;;
esac
`
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-test"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	config := []byte(`{"auths":{"own.example.com":{"auth":"dTpw"}},"credHelpers":{"registry.example.com":"test","evil.example.com":"../x"},"credsStore":"test"}`)
	for host, want := range map[string]string{
		"registry.example.com": "u hunter2",
		"registry-1.docker.io": " identity",
		"own.example.com":      "u p",
		"odd.example.com":      "the credential helper docker-credential-test answered for odd.example.com with what are no credentials",
		"none.example.com":     "the credential helper docker-credential-test has nothing for none.example.com: exit status 1: run it by hand with the argument get",
		"evil.example.com":     "its credential helper has a name that cannot be a program's",
	} {
		p := &Parent{Endpoint: host}
		err := dockerCredentials(config, p, true)
		username, password := p.Username, p.Password
		if err == nil && p.Credentials != nil {
			username, password, err = p.Credentials(t.Context())
		}
		got := username + " " + password
		if err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
	}
	want := "it names the credential helper test, and helpers are run in standalone mode alone: put the credentials themselves into the Secret"
	if err := dockerCredentials(config, &Parent{Endpoint: "x.example.com"}, false); err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	p := &Parent{Endpoint: "r.example.com"}
	if err := dockerCredentials([]byte(`{"auths":{"r.example.com":{"auth":"MDA6","identitytoken":"refresh"}}}`), p, false); err != nil || p.Username != "" || p.Password != "refresh" {
		t.Errorf("%v %+v", err, p)
	}
}
