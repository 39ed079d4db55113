package containerd

import (
	"net/http"
	"path/filepath"
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
		{"transfer service in chunks", daemonConfig{FetchBuffer: 128 << 10}, true},
		{"local pull", daemonConfig{LocalPull: true}, false},
		{"local pull in chunks", daemonConfig{LocalPull: true, FetchBuffer: 128 << 10}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			image := load(t, smallImage)
			parent := startParent(t, false)
			parent.push(t, repository+":1", image)

			certs := t.TempDir()
			writeHostsFile(t, filepath.Join(certs, "registry.test", "hosts.toml"), "[host.'http://"+parent.host+"']\n")
			test.config.CertsDir = certs
			d := startContainerd(t, test.config)

			for range 2 { // the second pull shows that the first one's bytes went
				parent.reset()
				pullAndCheck(t, d, "registry.test/team/app:1", image)
				if diff := cmp.Diff([]string{parent.host}, d.exchanges(t).asked()); diff != "" {
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
