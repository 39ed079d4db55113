package cache

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// PeerConfig lets the caches of a cluster's nodes take blobs from one another
// before they ask the registry.
//
// For each blob, rendezvous hashing over the nodes' names chooses a node that
// keeps book of it, and a second one for when that is away. The first node to
// ask there is told to fetch the blob from the registry; the next ones are told
// who has it, and take it from those while these still receive it. So a blob is
// read from the registry once, and a second time when the bookkeeper is lost.
//
// A node is known by its certificate alone. It asks its peers for a blob only
// when the registry has allowed its own client to read it, and carries no
// credential to them; a peer believes it. Whoever holds a node's key can thus
// read all blobs in the caches of which it knows the digest, but no credential
// and no manifest. Peers serve only what they have or are receiving, and ask
// nobody in turn, so that no request goes round in circles.
type PeerConfig struct {
	// Node is this node's name among the peers; see [Cache.SetPeers]. Required.
	Node string

	// Listener takes the peers' connections: plain TCP, TLS is put over it. Run
	// serves and closes it. Required.
	Listener net.Listener

	// CertFile and KeyFile hold this node's certificate and its key, for either
	// end of a connection, in PEM; CAFile the authorities that sign peers'
	// certificates, and nothing else's. They are read again when they change.
	// Required.
	CertFile, KeyFile, CAFile string
}

func (p *PeerConfig) validate() error {
	if p != nil && (p.Node == "" || p.Listener == nil || p.CertFile == "" || p.KeyFile == "" || p.CAFile == "") {
		return errors.New("cache: Peer lacks one of Node, Listener, CertFile, KeyFile and CAFile: all are needed")
	}
	return nil
}

// Peer is the cache of another node.
type Peer struct {
	Node    string // its name, unlike any other's
	Address string // of its PeerConfig.Listener, host:port
}

// peerHeader names the asking node in a request between peers, and in a
// refusal the node to ask instead.
const peerHeader = "Connected-Registry-Peer"

// patientHeader is in a request between peers while nobody waits for the answer:
// what the node that is asked is fetching for the same reason need not come
// quicker for it.
const patientHeader = "Connected-Registry-Patient"

// peerRetry is for how long a peer that did not answer is not asked again.
const peerRetry = 30 * time.Second

// SetPeers replaces the nodes that are asked, this one among them or not. Those
// that stay the same keep their connections. It does nothing without
// Config.Peer.
func (c *Cache) SetPeers(peers []Peer) error {
	if c.peers == nil {
		return nil
	}
	return c.peers.set(peers)
}

// peers are the caches of other nodes.
type peers struct {
	cfg  PeerConfig
	id   *identity
	ask  asker
	book book

	mu    sync.Mutex // guards everything below
	nodes map[string]*upstream
	names []string // of nodes and of this one, if it is among them
}

func (p *peers) set(all []Peer) error {
	nodes := make(map[string]*upstream, len(all))
	var names []string
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, peer := range all {
		if _, _, err := net.SplitHostPort(peer.Address); err != nil || peer.Node == "" {
			return fmt.Errorf("cache: peer %q at %q: want a name and host:port", peer.Node, peer.Address)
		}
		if slices.Contains(names, peer.Node) {
			return fmt.Errorf("cache: two peers have the name %q", peer.Node)
		}
		names = append(names, peer.Node)
		if peer.Node == p.cfg.Node {
			continue
		}
		if old := p.nodes[peer.Node]; old != nil && old.base.Host == peer.Address {
			nodes[peer.Node] = old
			continue
		}
		nodes[peer.Node] = p.connect(peer)
	}
	old := p.nodes
	p.nodes, p.names = nodes, names
	for name, up := range old {
		if nodes[name] != up {
			up.transport.CloseIdleConnections()
		}
	}
	return nil
}

func (p *peers) connect(peer Peer) *upstream {
	up := &upstream{
		base: &url.URL{Scheme: "https", Host: peer.Address}, name: peer.Node, anonymous: true, peer: p.cfg.Node,
	}
	dialer := &net.Dialer{Timeout: p.ask.timeouts.Peer, KeepAlive: 15 * time.Second}
	up.transport = &http.Transport{
		DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return p.id.dial(ctx, dialer, network, addr)
		},
		DisableCompression:  true,
		MaxIdleConnsPerHost: 4,
		IdleConnTimeout:     90 * time.Second,
		ReadBufferSize:      64 << 10,
	}
	up.client = &http.Client{Transport: up.transport, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // peers do not redirect
	}}
	return up
}

func (p *peers) closeIdle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, up := range p.nodes {
		up.transport.CloseIdleConnections()
	}
}

// node returns nil for a name that is not a peer's.
func (p *peers) node(name string) *upstream {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.nodes[name]
}

// bookkeepers returns the nodes, two at most, that know who has d (D. G. Thaler
// and C. V. Ravishankar, "Using Name-Based Mappings to Increase Hit Rates").
// None: there are no others to ask.
func (p *peers) bookkeepers(d digest.Digest) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.nodes) == 0 {
		return nil
	}
	type weighted struct{ name, weight string }
	all := make([]weighted, len(p.names))
	for i, name := range p.names {
		sum := sha256.Sum256([]byte(name + "\x00" + string(d)))
		all[i] = weighted{name, string(sum[:])}
	}
	slices.SortFunc(all, func(a, b weighted) int { return strings.Compare(b.weight, a.weight) })
	var names []string
	for _, w := range all[:min(2, len(all))] {
		names = append(names, w.name)
	}
	return names
}

// fetch asks for a blob whom the bookkeepers name, and returns nil where the
// registry is to be asked.
func (p *peers) fetch(ctx context.Context, q question, d digest.Digest) *answer {
	for _, name := range p.bookkeepers(d) {
		var holder string
		if name == p.cfg.Node {
			holder = p.book.enter(d, name)
		} else {
			ans, referral, err := p.askPeer(ctx, name, q, p.ask.timeouts.Peer)
			if ans != nil {
				return ans
			}
			if err != nil {
				continue // it is away, and the second one has the book
			}
			holder = referral
		}
		ans, _, _ := p.askPeer(ctx, holder, q, 3*p.ask.timeouts.Peer) // it may itself wait for the blob to begin
		return ans
	}
	return nil
}

// askPeer returns the peer's answer or, if it has none, whom it names instead.
// The error says that it cannot be reached.
func (p *peers) askPeer(ctx context.Context, name string, q question, budget time.Duration) (ans *answer, referral string, err error) {
	up := p.node(name)
	if up == nil {
		return nil, "", nil
	}
	if why := q.avoid(up); why != nil {
		return nil, "", why
	}
	ans, err = p.ask.askOne(ctx, up, q, budget)
	var no *refusal
	if errors.As(err, &no) {
		return nil, no.referral, nil
	}
	return ans, "", err
}

// book says which nodes have a blob or are receiving it.
type book struct {
	mu      sync.Mutex // guards holders
	holders map[digest.Digest][]holding
}

type holding struct {
	node  string
	until time.Time
}

const (
	// bookTime is how long a node is named: caches keep blobs for longer, and
	// asking one that does not costs a round trip.
	bookTime = 10 * time.Minute

	// bookHolders and bookBlobs bound the book to about 10 MiB.
	bookHolders = 8
	bookBlobs   = 16384
)

// enter writes down that a node is about to have d, and returns one that
// has it already or is receiving it: "" if none is known, and the node itself
// should ask the registry.
func (b *book) enter(d digest.Digest, node string) (holder string) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.holders == nil || len(b.holders) >= bookBlobs && b.holders[d] == nil {
		b.holders = make(map[digest.Digest][]holding) // the worst is that some are fetched once more
	}
	known := slices.DeleteFunc(b.holders[d], func(h holding) bool { return now.After(h.until) || h.node == node })
	if len(known) > 0 {
		holder = known[rand.IntN(len(known))].node
	}
	known = append(known, holding{node, now.Add(bookTime)})
	b.holders[d] = known[max(0, len(known)-bookHolders):]
	return holder
}
