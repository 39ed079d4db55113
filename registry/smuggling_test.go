package registry

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"time"
)

// startPrivate runs a private registry on TLS, which logs its faults.
func startPrivate(t *testing.T) (p *private, host string, trust *tls.Config, log *written) {
	t.Helper()
	store := openStore(t)
	rules := rulesOf(t, "  upstreams: [{endpoint: docker.io, prefix: hub, repositories: [{name: '*'}]}]\n  mirrors: [{registry: docker.io, anonymousPull: true}]\n")
	cfg := Config{Store: store, Auth: teamAuthority(t, rules.AnonymousPullFor), Rules: func() *Rules { return rules }}
	p = newPrivate(t, store)
	p.serve(t, cfg, "Basic "+base64.StdEncoding.EncodeToString([]byte("team:team"))) // for its tokens
	log = new(written)
	authority := newCA(t)
	cfg.CertFile, cfg.KeyFile = tlsFiles(t)
	authority.issue(t, 2, cfg.CertFile, cfg.KeyFile)
	cfg.Listener = listen(t)
	cfg.Logger = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelError}))
	start(t, newServer(t, cfg))
	trust = tlsClient(t, authority).Transport.(*http.Transport).TLSClientConfig
	return p, cfg.Listener.Addr().String(), trust, log
}

// TestMalformedRequestsOverTLS sends what TestMalformedRequests does over
// connections, by HTTP/2 and by HTTP/1.1.
func TestMalformedRequestsOverTLS(t *testing.T) {
	p, host, trust, log := startPrivate(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	pick := func(from []string) string { return from[r.IntN(len(from))] }
	for proto, two := range map[string]bool{"HTTP/2.0": true, "HTTP/1.1": false} {
		transport := &http.Transport{TLSClientConfig: trust.Clone(), ForceAttemptHTTP2: two}
		defer transport.CloseIdleConnections()
		client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
		answered := 0
		for range 1500 {
			target := pick(p.targets)
			for range r.IntN(3) {
				at := 1 + r.IntN(len(target))
				target = target[:at] + pick(malformed.parts) + target[at:]
			}
			req, err := http.NewRequestWithContext(t.Context(), pick(malformed.methods), "https://"+host, strings.NewReader(pick(malformedBodies)))
			if err != nil {
				continue // the client refuses it
			}
			if req.URL, err = req.URL.Parse("https://" + host + target); err != nil || req.URL.Host != host {
				continue
			}
			req.Header[http.CanonicalHeaderKey(pick(malformed.headers))] = []string{pick(malformed.values)}
			if token := pick(p.tokens); token != "" {
				req.Header.Set("Authorization", token)
			}
			answer, err := client.Do(req)
			if err != nil {
				continue // likewise
			}
			body, err := io.ReadAll(answer.Body)
			answer.Body.Close()
			what := fmt.Sprintf("%s %s %q %v", proto, req.Method, target, req.Header)
			if err != nil || answer.StatusCode >= 500 || answer.Proto != proto {
				t.Errorf("%s: %s %s %v", what, answer.Proto, answer.Status, err)
			}
			p.tellsNothing(t, what, body)
			answered++
		}
		if answered < 500 {
			t.Errorf("%s: only %d requests were answered", proto, answered)
		}
	}
	if log.String() != "" {
		t.Errorf("logged: %s", log)
	}
}

// tellsNothing finds what is private in an answer.
func (p *private) tellsNothing(t *testing.T, what string, answer []byte) {
	t.Helper()
	for _, secret := range p.secrets {
		if bytes.Contains(answer, secret) {
			t.Errorf("%s: tells %q", what, secret)
		}
	}
}

// smuggled are requests that one reader takes for one and another for two, or
// that no reader should take at all. %[1]s is a request for what is private.
var smuggled = []string{
	"POST /v2/team/open/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n%[1]s",
	"POST /v2/team/open/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n%[1]s",
	"POST /v2/team/open/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 60\r\n\r\n%[1]s",
	"POST /v2/team/open/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0, 60\r\n\r\n%[1]s",
	"POST /v2/team/open/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nContent-Length: +0\r\n\r\n%[1]s",
	"POST /v2/team/open/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n%[1]s",
	"POST /v2/team/open/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n%[1]s",
	"POST /v2/team/open/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n%[1]s",
	"POST /v2/team/open/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n%[1]s",
	"POST /v2/team/open/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0;x\n\r\n%[1]s",
	"POST /v2/team/open/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff0\r\n%[1]s",
	"PATCH /v2/team/open/blobs/uploads/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n%[1]s",
	"GET /v2/ HTTP/1.1\r\nHost: x\r\nX: y\n\n%[1]s",
	"GET /v2/ HTTP/1.1\r\nHost: x\r\n X: folded\r\n\r\n%[1]s",
	"GET /v2/ HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n%[1]s",
	"GET /v2/ HTTP/1.1\r\n\r\n%[1]s",
	"GET /v2/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n%[1]s",
	"GET /v2/ HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n%[1]s",
	"GET http://other.example/v2/ HTTP/1.1\r\nHost: x\r\n\r\n%[1]s",
	"CONNECT private:443 HTTP/1.1\r\nHost: x\r\n\r\n%[1]s",
	"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n%[1]s",
	"GET /v2/team/open/manifests/secret-tag HTTP/1.1\r\nHost: x\r\nAuthorization: Basic x\r\nAuthorization: Basic dGVhbTp0ZWFt\r\n\r\n%[1]s",
	"GET /v2/ HTTP/9.9\r\nHost: x\r\n\r\n%[1]s",
	"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n%[1]s",
	"\x16\x03\x01\x00\x05%[1]s",
	"GET /v2/" + strings.Repeat("a", 100_000) + " HTTP/1.1\r\nHost: x\r\n\r\n%[1]s",
	"GET /v2/ HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("a", 100_000) + "\r\n\r\n%[1]s",
	"GET /v2/ HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X: y\r\n", 20_000) + "\r\n%[1]s",
	"GET /v2/\x00 HTTP/1.1\r\nHost: x\r\n\r\n%[1]s",
	"GET /v2/ HTTP/1.1\r\nHost: x\x00y\r\n\r\n%[1]s",
	"GET  /v2/ HTTP/1.1\r\nHost: x\r\n\r\n%[1]s",
	"GET /v2/private/a/manifests/secret-tag\r\n\r\n%[1]s",
}

// TestSmuggledRequests writes them to a connection as they are. Whoever asks for
// what is private has no credentials for it, whichever request that turns out to
// be a part of: nothing comes back, and the registry meets no fault.
func TestSmuggledRequests(t *testing.T) {
	p, host, trust, log := startPrivate(t)
	trust = trust.Clone()
	trust.NextProtos = []string{"http/1.1"}
	var asks []string
	for _, name := range []string{"private/a", "teams", "other"} {
		asks = append(asks, "GET /v2/"+name+"/manifests/secret-tag HTTP/1.1\r\nHost: x\r\n")
	}
	for _, ask := range asks {
		for _, token := range p.tokens {
			if token != "" {
				token = "Authorization: " + token + "\r\n"
			}
			for _, s := range smuggled {
				sent := fmt.Sprintf(s, ask+token+"\r\n")
				conn, err := tls.Dial("tcp", host, trust)
				if err != nil {
					t.Fatal(err)
				}
				got := exchange(conn, sent)
				what := fmt.Sprintf("%.300q", sent)
				p.tellsNothing(t, what, got)
				for _, status := range statuses(got) {
					if status >= 500 && status != http.StatusNotImplemented && status != http.StatusHTTPVersionNotSupported {
						t.Errorf("%s: %.300q", what, got)
					}
				}
			}
		}
	}
	if log.String() != "" {
		t.Errorf("logged: %s", log)
	}
}

// exchange writes, says that this is all, and returns what comes back.
func exchange(conn *tls.Conn, sent string) []byte {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	go func() {
		_, _ = io.WriteString(conn, sent)
		_ = conn.CloseWrite()
	}()
	got, _ := io.ReadAll(conn) // what came before the connection broke
	return got
}

// statuses are those of the answers in what came back.
func statuses(got []byte) (all []int) {
	r := bufio.NewReader(bytes.NewReader(got))
	for {
		answer, err := http.ReadResponse(r, nil)
		if err != nil {
			return all
		}
		_, _ = io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
		all = append(all, answer.StatusCode)
	}
}
