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
	"sync/atomic"
	"testing"
)

func TestProbe(t *testing.T) {
	status, header := http.StatusUnauthorized, "registry/2.0"
	var hang atomic.Bool
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if hang.Load() {
			<-r.Context().Done()
			return
		}
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
	both := filepath.Join(t.TempDir(), "both.crt")
	if err := os.WriteFile(both, []byte("-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"), 0o600); err != nil {
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
		err = run(t.Context(), append([]string{"probe", "--host=" + host, "--port=" + port, "--wait=300ms"}, args...), &stdout, &stdout)
		return stdout.String(), err
	}
	serves := func(server *httptest.Server, args ...string) {
		t.Helper()
		if out, err := probe(server, append(args, "--wait=1m")...); err != nil || !strings.HasSuffix(out, "/v2/ serves\n") {
			t.Errorf("%q, %v", out, err)
		}
	}
	fails := func(want string, server *httptest.Server, args ...string) {
		t.Helper()
		if _, err := probe(server, args...); err == nil || !strings.Contains(err.Error()+"$", want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("err = %v, want %q", err, want)
		}
	}
	serves(plain, "--plain-http")
	serves(secure, "--ca="+ca)
	fails("unknown authority: give the CA that its certificate comes from with --ca", secure)
	fails("HTTPS client: correct --port, or add --plain-http if it speaks no TLS", plain, "--ca="+ca)
	fails("400 Bad Request: leave --plain-http out if it speaks TLS", secure, "--plain-http")
	fails("localhost: give a name that its certificate holds with --host", secure, "--ca="+ca, "--host=localhost")
	fails("give a file with its certificates with --ca", secure, "--ca="+ca+".absent")
	fails("holds no certificate: give a file", secure, "--ca="+os.DevNull)
	fails("--port https is no port: give a number", secure, "--port=https")
	fails("--port 0 is no port: give a number", secure, "--port=0")
	fails(`--host "https://127.0.0.1" is neither a name nor an address: leave out https://`, secure, "--host=https://127.0.0.1")
	fails(`--host "127.0.0.1:443" is neither a name nor an address: leave out https://, and give the port with --port`, secure, "--host=127.0.0.1:443")
	fails("--wait 0s leaves no time to ask: give more", secure, "--wait=0")
	fails("contains a private key: give certificates only", secure, "--ca="+both)
	status = http.StatusOK
	serves(secure, "--ca="+ca)
	header = ""
	fails("no registry, since Docker-Distribution-Api-Version is \"\": correct --host and --port$", secure, "--ca="+ca)
	hang.Store(true)
	fails("it does not answer: see that it runs, and that nothing between stops the connection", secure, "--ca="+ca)
	hang.Store(false)
	status = http.StatusServiceUnavailable
	fails("503 Service Unavailable: see the log of its replicas", secure, "--ca="+ca)
	secure.Close()
	fails("refused: see that it runs", secure, "--ca="+ca)
}
