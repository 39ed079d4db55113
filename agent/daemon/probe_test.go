package daemon

import (
	"crypto/tls"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestRegistryThatHangs: it is passed over while it leaves callers waiting and
// the cache has noticed, and asked again as soon as it answers.
func TestRegistryThatHangs(t *testing.T) {
	registry, err := net.Listen("tcp", "127.0.0.1:0") // the kernel takes connections, nobody serves them
	if err != nil {
		t.Fatal(err)
	}
	defer registry.Close()
	address := registry.Addr().String()
	s := newSite(t)
	a, _ := authority(t, "a", time.Hour)
	s.mounted(strings.Replace(nodeYAML, "10.96.0.50:443", address, 1))
	s.setSecret(ControlSecret, secretOf(a), nil)
	s.start()
	s.trusts("docker.io", a)
	asks := func(name string) bool {
		data, err := os.ReadFile(filepath.Join(s.root, certs, name, "hosts.toml"))
		return err == nil && strings.Contains(string(data), "https://"+address)
	}
	if !asks("docker.io") {
		t.Error("the registry is left out though nobody doubts it")
	}
	s.cache.doubting.Store(true)
	s.eventually("passing over", func() bool { return !asks("docker.io") })
	if !asks("10.96.0.50") {
		t.Error("the registry's own images are not asked of it")
	}
	s.eventually("ready all the same", func() bool { return s.ready() == "ok" })
	registry.Close()
	s.eventually("asking it again", func() bool { return asks("docker.io") })
}

func TestHangs(t *testing.T) {
	answers := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(func() { answers.Close() })
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	speechless := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	speechless.TLS = &tls.Config{}
	speechless.StartTLS()
	t.Cleanup(func() { speechless.Close() })
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	for what, tt := range map[string]struct {
		url  string
		want bool
	}{
		"no answer to TLS":  {"https://" + silent.Addr().String() + "/v2/", true},
		"no answer to HTTP": {speechless.URL + "/v2/", true},
		"an answer":         {answers.URL + "/v2/", false},
		"a refusal":         {"https://" + closed.Addr().String() + "/v2/", false},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			if got := hangs(t.Context(), tt.url); got != tt.want {
				t.Errorf("hangs: %v", got)
			}
		})
	}
}
