package main

import (
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

// TestAPIServerMistakes asks API servers that are away, are none, or refuse. The
// one line that is told names the server or the object, and what to do.
func TestAPIServerMistakes(t *testing.T) {
	answer := func(code int, body string) string {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(code)
			_, _ = io.WriteString(w, body)
		}))
		t.Cleanup(server.Close)
		return server.URL
	}
	status := func(code int, reason, message, name string) string {
		return answer(code, fmt.Sprintf(`{"kind":"Status","apiVersion":"v1","status":"Failure","code":%d,"reason":%q,"message":%q,"details":{"name":%q}}`, code, reason, message, name))
	}
	untrusted := httptest.NewUnstartedServer(http.NotFoundHandler())
	untrusted.Config.ErrorLog = log.New(io.Discard, "", 0)
	untrusted.StartTLS()
	t.Cleanup(untrusted.Close)
	away := httptest.NewServer(http.NotFoundHandler())
	away.Close()
	for _, test := range []struct{ name, server, want string }{
		{"away", away.URL, away.URL + " cannot be asked: dial tcp .*: connection refused: see that it runs, or name another in $KUBECONFIG"},
		{"untrusted", untrusted.URL, untrusted.URL + " has a certificate from a CA that is not trusted: put that CA into certificate-authority-data of the kubeconfig"},
		{"forbidden", status(403, "Forbidden", "eve may not", "x"), ": eve may not: name a user that may do so in $KUBECONFIG"},
		{"unauthorized", status(401, "Unauthorized", "who is it", ""), ": who is it: name a user that may do so in $KUBECONFIG"},
		{"no API server", answer(404, "404 page not found"), "could not find the requested resource.*: is the API server http://127.0.0.1:.* the one where connected-registry is installed?"},
		{"no object", status(404, "NotFound", "it is not found", "x"), ": it is not found: correct the namespace and the name that are given"},
		{"broken", status(400, "BadRequest", "it is no good", ""), ": it is no good: is the API server http://127.0.0.1:.* the one where connected-registry is installed?"},
	} {
		kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
		if err := os.WriteFile(kubeconfig, fmt.Appendf(nil, "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: %q}}]\ncontexts: [{name: x, context: {cluster: c}}]\ncurrent-context: x\n", test.server), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("KUBECONFIG", kubeconfig)
		for _, command := range [][]string{{"resync"}, {"agent", "uninstall", "--timeout=1ms"}, {"agent", "uninstall", "--cancel"}} {
			err := run(t.Context(), command, io.Discard, io.Discard)
			if err == nil || !inOrder(err.Error(), strings.Split(test.want, ".*")) || strings.ContainsAny(err.Error(), "\n") {
				t.Errorf("%s, %v: %v, want one line with %q", test.name, command, err, test.want)
			}
		}
	}
	for name, want := range map[string]string{
		"empty":  "names no cluster",
		"broken": "give the kubeconfig of a cluster",
	} {
		kubeconfig := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(kubeconfig, []byte(map[string]string{"broken": "a: ["}[name]), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("KUBECONFIG", kubeconfig)
		if err := run(t.Context(), []string{"agent", "uninstall"}, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), kubeconfig) {
			t.Errorf("%s kubeconfig: %v, want %q", name, err, want)
		}
	}
	t.Setenv("KUBECONFIG", "")
	t.Setenv("HOME", t.TempDir())
	for command, want := range map[string]string{"resync": "no cluster is named: set $KUBECONFIG", "syncer": "no cluster is named: run in a pod with a service account, or set $KUBECONFIG"} {
		args := []string{command}
		if command == "syncer" {
			args = append(args, "--namespace=x", "--health-listen=127.0.0.1:0")
		}
		if err := run(t.Context(), args, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", command, err, want)
		}
	}
}

// inOrder reports whether text holds all parts, one after the other.
func inOrder(text string, parts []string) bool {
	for _, part := range parts {
		_, rest, ok := strings.Cut(text, part)
		if !ok {
			return false
		}
		text = rest
	}
	return true
}
