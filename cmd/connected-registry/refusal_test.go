package main

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestParentRefuses wants one line that names the parent and the remedy, an
// error as the end, and no password anywhere.
func TestParentRefuses(t *testing.T) {
	parent := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("WWW-Authenticate", `Basic realm="parent"`)
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
	}))
	parent.Config.ErrorLog = log.New(io.Discard, "", 0)
	parent.StartTLS()
	defer parent.Close()
	host := strings.TrimPrefix(parent.URL, "https://")
	dir := t.TempDir()
	for file, content := range map[string]string{
		"secrets/ca/ca.crt":          string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: parent.Certificate().Raw})),
		"secrets/robot/username":     "robot",
		"secrets/robot/password":     "hunter2",
		"secrets/empty/placeholder":  "",
		"secrets/wrong-key/password": "hunter2",
	} {
		name := filepath.Join(dir, filepath.FromSlash(file))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct{ name, parent, want string }{
		{"CA not trusted", "", "has a certificate from a CA that is not trusted: put that CA's certificate into the Secret that spec.parent.caSecretRef names"},
		{"no credentials", "caSecretRef: {name: ca}", "wants credentials for the tags of team/app (401): name them in spec.parent.credentialsSecretRef"},
		{"wrong credentials", "caSecretRef: {name: ca}, credentialsSecretRef: {name: robot}", "refused the credentials for the tags of team/app (401): check the Secret that holds them"},
		{"no CA in the Secret", "caSecretRef: {name: empty}", "Secret empty: open "},
		{"no user in the Secret", "credentialsSecretRef: {name: wrong-key}", "Secret wrong-key: open "},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := filepath.Join(dir, "registry.yaml")
			err := os.WriteFile(config, fmt.Appendf(nil, `apiVersion: connectedregistry.io/v1alpha1
kind: ConnectedRegistry
metadata: {name: test}
spec:
  parent: {endpoint: %q, %s}
  repositories: [{name: team/app}]
`, host, test.parent), 0o644)
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			err = run(t.Context(), []string{"sync", "--config", config, "--data", filepath.Join(dir, "data"), "--secrets", filepath.Join(dir, "secrets")}, &out, &out)
			if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %v, expected one line with %q", err, test.want)
			}
			if strings.Contains(fmt.Sprint(err)+out.String(), "hunter2") {
				t.Error("the password is shown")
			}
		})
	}
}
