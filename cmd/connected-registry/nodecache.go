package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/registry/cache"
	"github.com/connected-registry/connected-registry/standalone"
)

const (
	// A cache that ends, or cannot begin, is begun anew after a wait that
	// doubles between these.
	firstCacheRetry = time.Second
	longCacheRetry  = time.Minute
)

// nodeCacheConfig says where the cache of a node is.
type nodeCacheConfig struct {
	dir, listen string
	containerd  string // its socket; empty: it is not asked
	node        string // its name in the cluster; empty: it has none
	peer        string // IP:port at which other nodes are served; empty: they are not
	peerTLS     string // directory with tls.crt, tls.key and ca.crt for that
	credentials string // directory with username and password, to prefetch with; empty: none
	log         *slog.Logger
}

// nodeCache runs the cache of a node as it was told last. Registries and images
// to prefetch change while it runs; other bounds make it end and begin anew,
// with all that it holds.
type nodeCache struct {
	nodeCacheConfig
	news chan struct{} // holds one element when want has changed

	mu      sync.Mutex // guards everything below
	want    *cacheOrder
	running *cache.Cache
	failure error
	metrics *prometheus.Registry // of the running cache
}

// cacheOrder is what a cache is told.
type cacheOrder struct {
	cache.Config

	images    []string // to prefetch
	bandwidth int64    // for it
	own       []string // the registry's own names
	peering   bool     // nodes ask one another
	peers     []cache.Peer
}

// apart reports whether the cache has to begin anew to follow b.
func (a cacheOrder) apart(b cacheOrder) bool {
	return a.MaxSize != b.MaxSize || a.MinFreeDisk != b.MinFreeDisk || a.OfflineTTL != b.OfflineTTL || a.peering != b.peering
}

func newNodeCache(c nodeCacheConfig) (*nodeCache, error) {
	if err := onLoopback(c.listen); err != nil {
		return nil, err
	}
	if c.dir == "" {
		return nil, errors.New("no directory for the cache: give one with --data")
	}
	if err := c.validPeering(); err != nil {
		return nil, err
	}
	return &nodeCache{nodeCacheConfig: c, news: make(chan struct{}, 1)}, nil
}

// onLoopback says what is wrong with an address of the cache.
func onLoopback(addr string) error {
	host, _, _ := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); standalone.CheckAddress(addr, "--cache-listen") != nil || ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("--cache-listen %s: the cache speaks plain HTTP and stays on loopback: use 127.0.0.1:PORT", addr)
	}
	return nil
}

// Configure implements daemon.Cache.
func (n *nodeCache) Configure(c *v1alpha1.NodeConfiguration, caFile string) error {
	want := cacheOrder{
		Config:  cache.Config{Dir: n.dir, ContentStore: n.containerd, Registries: cache.NodeRegistries(c, caFile), Logger: n.log},
		images:  c.PrefetchFor(n.node),
		own:     c.Names,
		peering: c.NodeCache.Peers && n.peer != "",
		peers:   peersOf(c),
	}
	if n.credentials != "" {
		want.NodeCredential = n.credential
	}
	if q := c.NodeCache.PrefetchBandwidth; q != nil {
		want.bandwidth = q.Value()
	}
	if q := c.NodeCache.MaxSize; q != nil {
		want.MaxSize = q.Value()
	}
	if q := c.NodeCache.MinFreeDisk; q != nil {
		want.MinFreeDisk = q.Value()
	}
	if d := c.NodeCache.OfflineAccess; d != "" {
		var err error
		if want.OfflineTTL, err = v1alpha1.ParseDuration(d); err != nil {
			return fmt.Errorf("nodeCache.offlineAccess: %w", err)
		}
	}
	if _, err := cache.New(want.Config); err != nil {
		return err
	}
	n.mu.Lock()
	n.want = &want
	n.mu.Unlock()
	select {
	case n.news <- struct{}{}:
	default:
	}
	return nil
}

// credential is what the node shows to the registry itself, and to no other. It
// is read again each time: until it is there, nothing is shown.
func (n *nodeCache) credential(host string) (user, password string) {
	n.mu.Lock()
	own := n.want.own
	n.mu.Unlock()
	if !slices.ContainsFunc(own, func(name string) bool { return strings.EqualFold(name, host) }) {
		return "", ""
	}
	for file, value := range map[string]*string{"username": &user, "password": &password} {
		text, err := os.ReadFile(filepath.Join(n.credentials, file))
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				n.log.Warn("images that not everybody may read are not prefetched", "error", err)
			}
			return "", ""
		}
		*value = strings.TrimSpace(string(text))
	}
	return user, password
}

// Serving implements daemon.Cache.
func (n *nodeCache) Serving() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.running != nil && n.running.Serving()
}

// Fault implements daemon.Cache.
func (n *nodeCache) Fault() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.failure
}

// Doubts implements daemon.Cache.
func (n *nodeCache) Doubts() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.running != nil && n.running.Doubts()
}

// Gather implements prometheus.Gatherer.
func (n *nodeCache) Gather() ([]*dto.MetricFamily, error) {
	n.mu.Lock()
	metrics := n.metrics
	n.mu.Unlock()
	if metrics == nil {
		return nil, nil
	}
	return metrics.Gather()
}

// run serves until ctx ends.
func (n *nodeCache) run(ctx context.Context) {
	retry := firstCacheRetry
	for {
		n.mu.Lock()
		want := n.want
		n.mu.Unlock()
		var again <-chan time.Time
		if want != nil {
			began := time.Now()
			err := n.serve(ctx, *want)
			n.mu.Lock()
			n.running, n.failure = nil, err
			n.mu.Unlock()
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				continue // other bounds
			}
			if time.Since(began) > longCacheRetry {
				retry = firstCacheRetry
			}
			n.log.Error("the cache ended, and is begun anew", "error", err, "in", retry)
			again = time.After(retry)
			retry = min(2*retry, longCacheRetry)
		}
		select {
		case <-ctx.Done():
			return
		case <-n.news:
		case <-again:
		}
	}
}

// serve runs one cache. It returns nil when ctx ends or the cache has to be made
// anew.
func (n *nodeCache) serve(ctx context.Context, order cacheOrder) error {
	listener, err := standalone.Listen(ctx, n.listen, "--cache-listen")
	if err != nil {
		return err
	}
	config := order.Config
	config.Listener = listener
	metrics := prometheus.NewRegistry()
	config.Metrics = metrics
	var noPeers error
	if order.peering {
		config.Peer, noPeers = n.listenPeers(ctx)
	}
	c, err := cache.New(config)
	if err != nil {
		listener.Close()
		if config.Peer != nil {
			config.Peer.Listener.Close()
		}
		return err
	}
	n.mu.Lock()
	n.running, n.failure, n.metrics = c, noPeers, metrics
	n.mu.Unlock()
	c.SetPrefetch(order.images, order.bandwidth)
	n.tellPeers(c, order.peers)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	peersCome := make(chan struct{})
	if noPeers != nil {
		var waiting sync.WaitGroup
		waiting.Go(func() {
			if n.awaitPeers(ctx) {
				close(peersCome)
			}
		})
		defer func() {
			cancel()
			waiting.Wait()
		}()
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	for {
		select {
		case err := <-ended:
			return err
		case <-peersCome:
			cancel()
			return <-ended
		case <-n.news:
		}
		n.mu.Lock()
		want := *n.want
		n.mu.Unlock()
		if want.apart(order) {
			cancel()
			return <-ended
		}
		if err := c.SetRegistries(want.Registries); err != nil {
			n.log.Error("the cache keeps what it was told before", "error", err)
		}
		if !slices.Equal(want.images, order.images) || want.bandwidth != order.bandwidth {
			c.SetPrefetch(want.images, want.bandwidth)
		}
		n.tellPeers(c, want.peers)
		order = want
	}
}
