package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

func TestPeerAddress(t *testing.T) {
	for _, test := range []struct {
		ip   string
		port uint16
		want string
		ok   bool
	}{
		{"", 0, "", true},
		{"192.0.2.1", 5051, "192.0.2.1:5051", true},
		{"2001:db8::1", 5051, "[2001:db8::1]:5051", true},
		{"", 5051, "", false},
		{"node.example.com", 5051, "", false},
	} {
		got, err := peerAddress(test.ip, test.port)
		if got != test.want || (err == nil) != test.ok {
			t.Errorf("%s, %d: %q, %v", test.ip, test.port, got, err)
		}
	}
	if _, err := newNodeCache(nodeCacheConfig{dir: t.TempDir(), listen: "127.0.0.1:0", peer: "192.0.2.1:5051", log: slog.Default()}); err == nil {
		t.Error("without the node's name and a certificate: no error")
	}
}

// TestNodeCachesAsPeers: caches serve while the certificate is not mounted yet,
// and ask one another when it is, until they are told not to.
func TestNodeCachesAsPeers(t *testing.T) {
	registry, stopRegistry := startReplica(t)
	defer stopRegistry()
	authority, err := trust.NewAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := authority.Issue([]string{"peers.test"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	configuration := &v1alpha1.NodeConfiguration{
		Registry: registry, PlainHTTP: true, Names: []string{registry},
		Mirrors:   []v1alpha1.NodeMirror{{Mirror: v1alpha1.Mirror{Registry: "mirror.example"}}},
		NodeCache: v1alpha1.NodeCache{Peers: true},
	}
	secret := t.TempDir()
	var nodes [2]*nodeCache
	for i := range nodes {
		c := nodeCacheConfig{
			dir: t.TempDir(), listen: freeAddress(t), node: fmt.Sprint("node-", i), peer: freeAddress(t), peerTLS: secret,
			log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		}
		configuration.Peers = append(configuration.Peers, v1alpha1.Peer{Node: c.node, Address: c.peer})
		var stop func()
		nodes[i], stop = runNodeCache(t, c)
		defer stop()
	}
	tell := func() {
		t.Helper()
		for _, n := range nodes {
			if err := n.Configure(configuration, ""); err != nil {
				t.Fatal(err)
			}
		}
	}
	const metric = "connected_registry_cache_peer_fetched_bytes_total"
	pulled := 0
	// pull has both nodes fetch a new layer, one after the other.
	pull := func() (fromPeers float64) {
		t.Helper()
		pulled++
		layers, err := pushRandom(t, registry, fmt.Sprintf("team/app:%d", pulled)).Layers()
		if err != nil {
			t.Fatal(err)
		}
		d, err := layers[0].Digest()
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range nodes {
			resp, err := http.Get("http://" + n.listen + "/v2/team/app/blobs/" + d.String() + "?ns=mirror.example")
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
				t.Fatalf("%s, %v", resp.Status, err)
			}
		}
		return gauge(t, nodes[0], metric, "") + gauge(t, nodes[1], metric, "")
	}
	tell()
	for _, n := range nodes {
		await(t, "serving", func() bool { return n.Serving() && n.Fault() != nil })
		if why := n.Fault().Error(); !strings.Contains(why, "certificate") || strings.Contains(why, "\n") {
			t.Errorf("without a certificate: %s", why)
		}
	}
	if got := pull(); got != 0 {
		t.Errorf("%v bytes from peers without a certificate", got)
	}
	mount(t, secret, map[string]string{"tls.crt": string(cert), "tls.key": string(key), "ca.crt": string(authority.Bundle().PEM())})
	for _, n := range nodes {
		await(t, "peering", func() bool { return n.Serving() && n.Fault() == nil })
	}
	if got := pull(); got < 64<<10 {
		t.Errorf("%v bytes from peers, want those of a layer", got)
	}
	configuration.NodeCache.Peers = false
	before := make([]any, len(nodes))
	for i, n := range nodes {
		n.mu.Lock()
		before[i] = n.running
		n.mu.Unlock()
	}
	tell()
	for i, n := range nodes {
		await(t, "begun anew", func() bool {
			n.mu.Lock()
			defer n.mu.Unlock()
			return n.running != nil && any(n.running) != before[i] && n.running.Serving()
		})
	}
	if got := pull(); got != 0 {
		t.Errorf("%v bytes from peers that are not to be asked", got)
	}
}
