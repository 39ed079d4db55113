package daemon

import (
	"strings"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// TestPeerAddress: the Lease says where other nodes reach the cache while the
// configuration has them ask one another, and the node is not being left.
func TestPeerAddress(t *testing.T) {
	s := newSite(t)
	a, _ := authority(t, "a", time.Hour)
	on := strings.Replace(nodeYAML, "mirrors:", "nodeCache: {peers: true}\nmirrors:", 1)
	says := func() string { return s.said(testNode)[v1alpha1.AnnotationPeerAddress] }
	s.mounted(nodeYAML)
	s.setSecret(ControlSecret, secretOf(a), nil)
	s.start(func(c *Config) { c.PeerAddress = "192.0.2.1:5051" })
	s.trusts("docker.io", a)
	if got := says(); got != "" {
		t.Errorf("says %q without being told to", got)
	}
	s.mounted(on)
	s.eventually("address", func() bool { return says() == "192.0.2.1:5051" })
	s.mounted(nodeYAML)
	s.eventually("no address", func() bool { return says() == "" })
	s.mounted(on)
	s.eventually("address again", func() bool { return says() != "" })
	s.setSecret(ControlSecret, secretOf(a), map[string]string{AnnotationUninstall: "true"})
	s.eventually("cleaned", func() bool { return s.said(testNode)[AnnotationCleaned] == "true" && says() == "" })
}
