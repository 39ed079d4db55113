package main

import (
	"bytes"
	"encoding/pem"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestProbe(t *testing.T) {
	status, header := http.StatusUnauthorized, "registry/2.0"
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v2/" {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Docker-Distribution-Api-Version", header)
		w.WriteHeader(status)
	})
	plain, secure := httptest.NewServer(handler), httptest.NewTLSServer(handler)
	defer plain.Close()
	defer secure.Close()
	ca := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	probe := func(server *httptest.Server, args ...string) (string, error) {
		u, err := url.Parse(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		host, port, err := net.SplitHostPort(u.Host)
		if err != nil {
			t.Fatal(err)
		}
		var stdout bytes.Buffer
		err = run(t.Context(), append([]string{"probe", "--host=" + host, "--port=" + port, "--wait=100ms"}, args...), &stdout, &stdout)
		return stdout.String(), err
	}
	serves := func(server *httptest.Server, args ...string) {
		t.Helper()
		if out, err := probe(server, args...); err != nil || !strings.HasSuffix(out, "/v2/ serves\n") {
			t.Errorf("%q, %v", out, err)
		}
	}
	fails := func(want string, server *httptest.Server, args ...string) {
		t.Helper()
		if _, err := probe(server, args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("err = %v, want %q", err, want)
		}
	}
	serves(plain, "--plain-http")
	serves(secure, "--ca="+ca)
	fails("unknown authority", secure)
	fails("HTTPS", plain, "--ca="+ca)
	status = http.StatusOK
	serves(secure, "--ca="+ca)
	header = ""
	fails("no registry", secure, "--ca="+ca)
	status = http.StatusServiceUnavailable
	fails("503", secure, "--ca="+ca)
	secure.Close()
	fails("refused", secure, "--ca="+ca)
}
