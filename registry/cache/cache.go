package cache

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"
)

// Cache is a pull-through cache. It is an http.Handler, to be served while Run
// is running; at any other time it answers 503.
type Cache struct {
	cfg        Config
	log        *slog.Logger
	metrics    *metrics
	asker      asker
	peers      *peers // nil: other nodes are not asked
	pseudonym  string // in Via
	registries atomic.Pointer[map[string]*registry]
	wanted     atomic.Pointer[wanted]
	disk       atomic.Pointer[disk] // nil while not running
	manifests  manifestCache
	faults     faults
	noRoom     recent[digest.Digest] // blobs that could not be stored
	once       singleflight.Group

	mu        sync.Mutex // guards everything below
	stopping  bool
	fills     map[digest.Digest]*fill
	sequences map[sequenceKey]*sequence
	requests  sync.WaitGroup // added to under mu
	work      sync.WaitGroup // downloads and writes that no request waits for
}

// disk is what a running Cache keeps under Config.Dir.
type disk struct {
	lock    *os.File
	key     *nodeKey
	targets targets
	repeats repeats
	store   *store
	ledger  *ledger
	notes   notes
	content *contentStore
	bearers bearers
}

// New checks cfg, registers the metrics and prepares a Cache. It touches neither
// disk nor network.
func New(cfg Config) (*Cache, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	c := &Cache{
		cfg:       cfg,
		log:       cfg.Logger,
		pseudonym: "connected-registry-" + strings.ToLower(rand.Text()),
		fills:     make(map[digest.Digest]*fill),
		sequences: make(map[sequenceKey]*sequence),
	}
	var err error
	if c.metrics, err = newMetrics(cfg.Metrics, c.usage); err != nil {
		return nil, err
	}
	c.asker = asker{timeouts: cfg.Timeouts, metrics: c.metrics, log: c.log, work: &c.work, enter: c.enter, leave: c.requests.Done}
	if cfg.Peer != nil {
		c.peers = &peers{cfg: *cfg.Peer, id: newIdentity(*cfg.Peer, c.log), ask: c.asker}
		c.peers.ask.timeouts.Retry = peerRetry
	}
	c.wanted.Store(&wanted{replaced: make(chan struct{})})
	return c, c.SetRegistries(cfg.Registries)
}

// SetRegistries replaces Config.Registries. Requests under way go on with what
// they began with; registries that have not changed keep their connections. On
// error nothing changes.
func (c *Cache) SetRegistries(registries map[string]Registry) error {
	if err := validateRegistries(registries); err != nil {
		return err
	}
	var old map[string]*registry
	if p := c.registries.Load(); p != nil {
		old = *p
	}
	all := make(map[string]*registry, len(registries))
	for host, cfg := range registries {
		if reg := old[host]; reg != nil && reflect.DeepEqual(reg.cfg, cfg) {
			all[host] = reg
			continue
		}
		reg, err := newRegistry(host, cfg, c.cfg.Timeouts, c.log)
		if err != nil {
			return err
		}
		all[host] = reg
	}
	c.registries.Store(&all)
	for host, reg := range old {
		if all[host] != reg {
			reg.closeIdle()
		}
	}
	return nil
}

// usage is what the store holds, for metrics.
func (c *Cache) usage() (bytes int64, blobs int) {
	if d := c.disk.Load(); d != nil {
		return d.store.usage()
	}
	return 0, 0
}

// Run opens the store, serves Config.Listener and keeps the store within its
// bounds until ctx ends. Transfers under way then get a moment to finish; what
// is left of them on disk is continued from later. It returns when every
// goroutine has ended: nil after ctx ended, else what made it stop.
func (c *Cache) Run(ctx context.Context) error {
	for _, l := range c.listeners() {
		defer l.Close()
	}
	d, err := c.openDisk(ctx)
	if err != nil {
		return fmt.Errorf("opening the cache directory %s: %w", c.cfg.Dir, err)
	}
	defer d.close()
	c.disk.Store(d)
	defer c.disk.Store(nil)

	g, running := errgroup.WithContext(ctx)
	g.Go(func() error {
		c.keepHouse(running, d)
		return nil
	})
	g.Go(func() error {
		d.store.settle(running)
		return nil
	})
	g.Go(func() error {
		d.store.scrub(running)
		return nil
	})
	g.Go(func() error {
		c.keepPrefetched(running)
		return nil
	})
	if c.cfg.Listener != nil {
		c.serveListener(running, g, repeatListener{c.cfg.Listener, c}, c)
	}
	if c.peers != nil {
		defer c.peers.closeIdle()
		l := tls.NewListener(c.peers.cfg.Listener, c.peers.id.serverConfig())
		c.serveListener(running, g, l, http.HandlerFunc(c.servePeer))
	}
	g.Go(func() error {
		<-running.Done()
		c.stop()
		return nil
	})
	err = g.Wait()
	c.requests.Wait()
	c.work.Wait()
	d.store.settleLast()
	for _, reg := range *c.registries.Load() {
		reg.closeIdle()
	}
	c.mu.Lock()
	c.stopping = false
	c.mu.Unlock()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// listeners are those that Run closes.
func (c *Cache) listeners() (all []net.Listener) {
	if c.cfg.Listener != nil {
		all = append(all, c.cfg.Listener)
	}
	if c.peers != nil {
		all = append(all, c.peers.cfg.Listener)
	}
	return all
}

// serveListener adds an HTTP server to g.
func (c *Cache) serveListener(running context.Context, g *errgroup.Group, l net.Listener, h http.Handler) {
	base, cancel := context.WithCancel(context.WithoutCancel(running))
	srv := &http.Server{
		Handler:           h,
		BaseContext:       func(net.Listener) context.Context { return base },
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		ErrorLog:          slog.NewLogLogger(c.log.Handler(), slog.LevelDebug),
	}
	serveRepeats(srv)
	g.Go(func() error {
		err := srv.Serve(l)
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return fmt.Errorf("serving %s: %w", l.Addr(), err)
	})
	g.Go(func() error {
		defer cancel()
		<-running.Done()
		grace, stop := context.WithTimeout(context.WithoutCancel(running), shutdownGrace)
		defer stop()
		if srv.Shutdown(grace) != nil {
			cancel()
			_ = srv.Close() // the listener is closed already
		}
		return nil
	})
}

// stop refuses new requests, and ends the downloads after a moment or when
// nobody reads them.
func (c *Cache) stop() {
	c.mu.Lock()
	c.stopping = true
	c.mu.Unlock()
	idle := make(chan struct{})
	go func() {
		c.requests.Wait()
		close(idle)
	}()
	timer := time.NewTimer(shutdownGrace)
	defer timer.Stop()
	select {
	case <-idle:
	case <-timer.C:
	}
	c.mu.Lock()
	for _, f := range c.fills {
		f.cancel(errShutdown)
	}
	c.mu.Unlock()
	<-idle
}

// keepHouse builds the index and keeps the store within its bounds.
func (c *Cache) keepHouse(ctx context.Context, d *disk) {
	if err := d.store.scan(ctx); err != nil && ctx.Err() == nil {
		c.log.Error("the store cannot be listed; what is in it is served but not counted", "error", err)
	}
	trim := time.NewTicker(trimEvery)
	defer trim.Stop()
	prune := time.NewTicker(pruneEvery)
	defer prune.Stop()
	d.notes.prune(c.cfg.Now().Add(-c.cfg.OfflineTTL))
	for {
		d.store.trim()
		select {
		case <-ctx.Done():
			return
		case <-trim.C:
		case <-prune.C:
			d.notes.prune(c.cfg.Now().Add(-c.cfg.OfflineTTL))
		}
	}
}

// openDisk takes possession of the directory and opens what is in it.
func (c *Cache) openDisk(ctx context.Context) (*disk, error) {
	dir := c.cfg.Dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	d := &disk{lock: lock}
	if err := c.openDiskIn(ctx, d, dir); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

func (c *Cache) openDiskIn(ctx context.Context, d *disk, dir string) error {
	if err := lockFile(d.lock); err != nil {
		return fmt.Errorf("another process is using it: stop that or use another directory: %w", err)
	}
	removeTemporary(dir)
	var err error
	if d.key, err = loadNodeKey(filepath.Join(dir, "key"), c.log); err != nil {
		return err
	}
	if d.ledger, err = openLedger(filepath.Join(dir, "permissions"), c.cfg.OfflineTTL, c.cfg.Now, c.log); err != nil {
		return err
	}
	if d.content, err = openContentStore(c.cfg.ContentStore, c.cfg.Timeouts.Retry); err != nil {
		return err
	}
	d.notes = notes{dir: filepath.Join(dir, "notes")}
	if d.store, err = newStore(dir, c.cfg.MaxSize, c.cfg.MinFreeDisk, c.log, c.metrics); err != nil {
		return err
	}
	return d.store.recover(ctx)
}

func (d *disk) close() {
	if d.store != nil {
		d.store.close()
	}
	if d.ledger != nil {
		d.ledger.close()
	}
	d.content.close()
	d.lock.Close()
}
