package containerd

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestHarness pulls through a host configuration written by hand, so that a
// fault in the harness is not taken for one in the product.
func TestHarness(t *testing.T) {
	for _, test := range []struct {
		name   string
		config daemonConfig
		ranges bool
	}{
		{"transfer service", daemonConfig{}, false},
		{"transfer service in chunks", daemonConfig{FetchBuffer: 4 << 20}, true},
		{"local pull", daemonConfig{LocalPull: true}, false},
		{"local pull in chunks", daemonConfig{LocalPull: true, FetchBuffer: 4 << 20}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			image := load(t, bigImage)
			parent := startParent(t)
			parent.push(t, "team/app:1", image)

			certs := t.TempDir()
			writeHosts(t, certs, "registry.test", "[host.'http://"+parent.host+"']\n")
			test.config.CertsDir = certs
			d := startContainerd(t, test.config)

			for range 2 { // the second pull shows that the first one's bytes went
				parent.reset()
				d.requests(t)
				pullAndCheck(t, d, "registry.test/team/app:1", image)
				if diff := cmp.Diff([]string{parent.host}, hostsAsked(d.requests(t))); diff != "" {
					t.Errorf("hosts asked (-want +got):\n%s", diff)
				}
				if parent.count(http.MethodGet, "/blobs/") < len(image.layers) {
					t.Errorf("the registry saw %v", parent.seen())
				}
				if got := parent.ranged(); got != test.ranges {
					t.Errorf("layers fetched by ranges: %v, want %v: %v", got, test.ranges, parent.seen())
				}
				d.remove(t, "registry.test/team/app:1")
			}
		})
	}
}

func writeHosts(t *testing.T, certs, host, content string) {
	t.Helper()
	dir := filepath.Join(certs, strings.ReplaceAll(host, ":", "_"))
	if host != filepath.Base(host) {
		t.Fatalf("host %q is no directory name", host)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}
