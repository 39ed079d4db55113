package cache

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/storage"
	"github.com/connected-registry/connected-registry/trust"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

// cluster is a number of nodes that know one another.
type cluster struct {
	t         *testing.T
	nodes     []*node
	peers     []Peer
	authority *trust.Authority
}

// peerFiles writes a node's certificate, signed by a.
func peerFiles(t *testing.T, a *trust.Authority) (cert, key, ca string) {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	certPEM, keyPEM, err := a.Issue([]string{"peer.test"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	caPEM, _, err := a.PEM()
	if err != nil {
		t.Fatal(err)
	}
	return write("tls.crt", certPEM), write("tls.key", keyPEM), write("ca.crt", caPEM)
}

func newAuthority(t *testing.T) *trust.Authority {
	t.Helper()
	a, err := trust.NewAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// startCluster starts count nodes with cfg.
func startCluster(t *testing.T, count int, cfg Config) *cluster {
	t.Helper()
	c := &cluster{t: t, authority: newAuthority(t)}
	for i := range count {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		peer := &PeerConfig{Node: fmt.Sprintf("node-%d", i), Listener: l}
		peer.CertFile, peer.KeyFile, peer.CAFile = peerFiles(t, c.authority)
		mine := cfg
		mine.Peer, mine.Dir = peer, ""
		c.peers = append(c.peers, Peer{peer.Node, l.Addr().String()})
		c.nodes = append(c.nodes, start(t, mine))
	}
	c.tell(c.peers)
	return c
}

func (c *cluster) tell(peers []Peer) {
	c.t.Helper()
	for _, n := range c.nodes {
		if err := n.SetPeers(peers); err != nil {
			c.t.Fatal(err)
		}
	}
}

// bookkeepers are the indexes of the nodes that keep book of d.
func (c *cluster) bookkeepers(d digest.Digest) []int {
	var all []int
	for _, name := range c.nodes[0].peers.bookkeepers(d) {
		for i, p := range c.peers {
			if p.Node == name {
				all = append(all, i)
			}
		}
	}
	return all
}

// TestWaveOfNodes has every node fetch the same blobs at the same time, small
// and large: the registry is asked for each once.
func TestWaveOfNodes(t *testing.T) {
	o := newOrigin(t)
	var bodies [][]byte
	for i, size := range []int{1000, 300 << 10, 9 << 20} {
		bodies = append(bodies, random(size, byte(150+i)))
		o.blob("app", bodies[i])
	}
	// Slow enough for everybody to come while the first one fetches.
	o.setFront(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet {
			time.Sleep(50 * time.Millisecond)
		}
		return false
	})
	c := startCluster(t, 8, Config{Registries: upstreams(o.URL)})
	for _, body := range bodies {
		d := digest.FromBytes(body)
		var wg sync.WaitGroup
		for _, n := range c.nodes {
			wg.Go(func() {
				resp, err := n.client.Do(newGet(t.Context(), n.url+blobURL("app", d)+"?ns="+testHost))
				if err != nil {
					t.Error(err)
					return
				}
				defer resp.Body.Close()
				var got bytes.Buffer
				if _, err := got.ReadFrom(resp.Body); err != nil || !bytes.Equal(got.Bytes(), body) {
					t.Errorf("%s: %d of %d bytes, %v", n.cfg.Peer.Node, got.Len(), len(body), err)
				}
			})
		}
		wg.Wait()
		if got := o.count("GET " + blobURL("app", d)); got < 1 || got > 2 {
			t.Errorf("%d bytes: the registry was asked %d times by %d nodes", len(body), got, len(c.nodes))
		}
	}
	fromPeers := 0.0
	for _, n := range c.nodes {
		reg := prometheus.NewRegistry()
		reg.MustRegister(n.metrics.fromPeers)
		fromPeers += samples(t, reg)["peer_fetched_bytes_total"]
	}
	if want := float64(6 * (1000 + 300<<10 + 9<<20)); fromPeers < want {
		t.Errorf("%.0f bytes came from peers, want at least %.0f", fromPeers, want)
	}
	for _, n := range c.nodes { // each has kept what it got
		n.settled()
		for _, body := range bodies {
			if !n.stored(digest.FromBytes(body)) {
				t.Errorf("%s has not kept %d bytes", n.cfg.Peer.Node, len(body))
			}
		}
	}
}

// TestPatientPeers has two nodes prefetch a blob at a time: that the second takes
// it from the first does not make the first exceed its bandwidth. A client on the
// second node is not held to it.
func TestPatientPeers(t *testing.T) {
	o := newOrigin(t)
	c := startCluster(t, 2, Config{Registries: upstreams(o.URL)})
	prefetch := func(n *node, body []byte, bandwidth int64) <-chan error {
		ended := make(chan error, 1)
		go func() { ended <- n.Prefetch(t.Context(), []string{imageRef}, bandwidth) }()
		n.await(func() bool { return n.stored(digest.FromBytes(body)) || n.downloads() > 0 })
		return ended
	}

	const bandwidth = 1 << 20
	body := random(2<<20, 178)
	image(o, body)
	began := time.Now()
	first := prefetch(c.nodes[0], body, bandwidth)
	second := prefetch(c.nodes[1], body, bandwidth)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if took, least := time.Since(began), time.Second*(2<<20-fillChunk)/bandwidth; took < least {
		t.Errorf("it took %s, less than the bandwidth allows", took)
	}
	if err := <-second; err != nil {
		t.Error(err)
	}
	if got := o.count("GET " + blobURL("app", digest.FromBytes(body))); got != 1 {
		t.Errorf("the registry was asked %d times", got)
	}

	// At this rate it would take minutes.
	body = random(3<<20, 179)
	image(o, body)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	first = prefetch(c.nodes[0], body, 16<<10)
	second = prefetch(c.nodes[1], body, 16<<10)
	n := c.nodes[1]
	resp, err := n.client.Do(newGet(ctx, n.url+blobURL("app", digest.FromBytes(body))+"?ns="+testHost))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d of %d bytes: %v", len(got), len(body), err)
	}
	if err := <-second; err != nil {
		t.Error(err)
	}
	c.nodes[0].stop()
	<-first
}

// downloads is how many downloads there are.
func (n *node) downloads() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.fills)
}

// TestLostPeers stops the nodes that keep book of a blob.
func TestLostPeers(t *testing.T) {
	for _, how := range []string{"stopped", "silent"} {
		t.Run(how, func(t *testing.T) {
			o := newOrigin(t)
			body := random(100<<10, 160)
			d := o.blob("app", body)
			hasty := patient
			hasty.Peer = 300 * time.Millisecond
			c := startCluster(t, 5, Config{Registries: upstreams(o.URL), Timeouts: hasty})
			keepers := c.bookkeepers(d)
			if how == "stopped" {
				c.nodes[keepers[0]].stop()
			} else {
				lost := append([]Peer(nil), c.peers...)
				lost[keepers[0]].Address = silent(t)
				c.tell(lost)
			}
			asked := 0
			for i, n := range c.nodes {
				if i == keepers[0] {
					continue
				}
				r := n.get(blobURL("app", d))
				n.wantBlob(r, body, "fwd=miss; stored")
				asked++
			}
			if got := o.count("GET " + blobURL("app", d)); got != 1 {
				t.Errorf("the registry was asked %d times by %d nodes", got, asked)
			}
			both := append([]Peer(nil), c.peers...)
			both[keepers[0]].Address, both[keepers[1]].Address = silent(t), silent(t)
			c.tell(both)
			other := random(1000, 161)
			n := c.nodes[(keepers[0]+1)%5]
			n.wantBlob(n.get(blobURL("app", o.blob("app", other))), other, "fwd=miss; stored")
		})
	}
}

// TestPeersAndPermission checks that a node asks its peers only for clients
// that the registry has allowed, and carries no credential to them.
func TestPeersAndPermission(t *testing.T) {
	o := newOrigin(t)
	body := random(5<<20, 162)
	d := o.blob("team/a", body)
	guard(o, basic, map[string][]string{"Basic alice": {"team/a"}})
	c := startCluster(t, 3, Config{Registries: upstreams(o.URL)})
	path := blobURL("team/a", d)
	for _, n := range c.nodes {
		n.wantRefused(n.get(path), 401, "fwd=miss; fwd-status=401")
		n.wantRefused(n.get(path, "Authorization", "Basic mallory"), 401, "fwd=miss; fwd-status=401")
		n.wantBlob(n.get(path, "Authorization", "Basic alice"), body, "fwd=miss; stored")
		n.wantRefused(n.get(path), 401, "fwd=miss; fwd-status=401")
	}
	served := 0
	o.mu.Lock()
	for i, what := range o.asked {
		if what == "GET "+path && o.auth[i] == "Basic alice" {
			served++
		}
	}
	o.mu.Unlock()
	if served != 1 {
		t.Errorf("the registry served the blob %d times", served)
	}
	// With the registry gone, what a client was allowed is had from a peer.
	n := c.nodes[0]
	n.settled()
	if err := os.Remove(n.disk.Load().store.blobPath(d)); err != nil {
		t.Fatal(err)
	}
	o.Close()
	n.wantBlob(n.get(path, "Authorization", "Basic alice"), body, "fwd=miss; stored")
	if r := n.get(path, "Authorization", "Basic mallory"); r.status == 200 {
		t.Error("a client that was never allowed has been served")
	}
}

// TestOnlyPeersAreAnswered tries the peers' listener with other certificates.
func TestOnlyPeersAreAnswered(t *testing.T) {
	o := newOrigin(t)
	body := random(1000, 163)
	d := o.blob("app", body)
	c := startCluster(t, 2, Config{Registries: upstreams(o.URL)})
	c.nodes[0].get(blobURL("app", d))
	c.nodes[0].settled()
	certificate := func(a *trust.Authority) []tls.Certificate {
		cert, key, _ := peerFiles(t, a)
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return []tls.Certificate{pair}
	}
	for _, tt := range []struct {
		name   string
		certs  []tls.Certificate
		node   string
		method string
		path   string
		want   int // 0: the handshake fails
	}{
		{"none", nil, "node-1", "GET", blobURL("app", d), 0},
		{"another authority's", certificate(newAuthority(t)), "node-1", "GET", blobURL("app", d), 0},
		{"no name", certificate(c.authority), "", "GET", blobURL("app", d), 403},
		{"unknown node", certificate(c.authority), "node-9", "GET", blobURL("app", d), 403},
		{"manifest", certificate(c.authority), "node-1", "GET", manifestURL("app", "v1"), 403},
		{"write", certificate(c.authority), "node-1", "PUT", blobURL("app", d), 403},
		{"peer", certificate(c.authority), "node-1", "GET", blobURL("app", d), 200},
		{"not there", certificate(c.authority), "node-1", "GET", blobURL("app", digest.FromString("x")), 404},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{
				InsecureSkipVerify: true, Certificates: tt.certs,
			}}}
			defer client.CloseIdleConnections()
			req, err := http.NewRequestWithContext(t.Context(), tt.method, "https://"+c.peers[0].Address+tt.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set(peerHeader, tt.node)
			got := 0
			resp, err := client.Do(req)
			if err == nil {
				got = resp.StatusCode
				resp.Body.Close()
			}
			if got != tt.want {
				t.Errorf("%d %v, want %d", got, err, tt.want)
			}
		})
	}
	if got := o.count("GET"); got != 1 {
		t.Errorf("requests of peers reached the registry: %q", o.asked)
	}
}

// TestPeerServesWrongBytes has a node whose disk lies.
func TestPeerServesWrongBytes(t *testing.T) {
	o := newOrigin(t)
	body := random(9<<20, 164)
	d := o.blob("app", body)
	c := startCluster(t, 2, Config{Registries: upstreams(o.URL)})
	first, second := c.nodes[0], c.nodes[1]
	first.get(blobURL("app", d))
	first.settled()
	flip(t, first.disk.Load().store.blobPath(d), 100)
	if err := os.Chtimes(first.disk.Load().store.blobPath(d), time.Time{}, storage.SealTime(d)); err != nil {
		t.Fatal(err)
	}
	if r := second.get(blobURL("app", d)); r.err == nil && !bytes.Equal(r.body, body) {
		t.Fatal("wrong bytes were handed over as a success")
	}
	second.wantBlob(second.get(blobURL("app", d)), body, "fwd=miss; stored")
}

// TestPeerAuthorityRotates exchanges the certificates of a running cluster.
func TestPeerAuthorityRotates(t *testing.T) {
	o := newOrigin(t)
	c := startCluster(t, 2, Config{Registries: upstreams(o.URL)})
	next := newAuthority(t)
	for _, n := range c.nodes {
		cert, key, ca := peerFiles(t, next)
		for from, to := range map[string]string{ca: n.cfg.Peer.CAFile, key: n.cfg.Peer.KeyFile, cert: n.cfg.Peer.CertFile} {
			if err := os.Rename(from, to); err != nil {
				t.Fatal(err)
			}
		}
	}
	body := random(1000, 165)
	d := o.blob("app", body)
	for _, n := range c.nodes {
		n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
	}
	if got := o.count("GET"); got != 1 {
		t.Errorf("the registry was asked %d times", got)
	}
}

// TestSetPeersErrors checks what is refused.
func TestSetPeersErrors(t *testing.T) {
	c := startCluster(t, 2, Config{Registries: upstreams("http://127.0.0.1:1")})
	for _, peers := range [][]Peer{
		{{"a", "nonsense"}},
		{{"", "127.0.0.1:1"}},
		{{"a", "127.0.0.1:1"}, {"a", "127.0.0.1:2"}},
	} {
		if err := c.nodes[0].SetPeers(peers); err == nil {
			t.Errorf("%v was taken", peers)
		}
	}
	if got := c.nodes[0].peers.node("node-1"); got == nil {
		t.Error("what was refused has changed something")
	}
}

// TestBook checks whom the book names.
func TestBook(t *testing.T) {
	var b book
	d := digest.FromString("x")
	if got := b.enter(d, "a"); got != "" {
		t.Errorf("the first is told to ask %q", got)
	}
	if got := b.enter(d, "a"); got != "" {
		t.Errorf("it is told to ask itself: %q", got)
	}
	if got := b.enter(d, "b"); got != "a" {
		t.Errorf("the second is told to ask %q", got)
	}
	for i := range 100 {
		b.enter(d, fmt.Sprint(i))
	}
	if got := len(b.holders[d]); got != bookHolders {
		t.Errorf("%d are known", got)
	}
	for i := range bookBlobs + 10 {
		b.enter(digest.FromString(fmt.Sprint(i)), "a")
	}
	if got := len(b.holders); got > bookBlobs {
		t.Errorf("the book is of %d blobs", got)
	}
}
