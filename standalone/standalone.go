// Package standalone joins the central registry, the syncer, the node agent
// and the node cache in one process: for one machine, an edge box or a trial,
// without Kubernetes.
//
// It may import every other package of this module but cmd.
package standalone

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/agent"
	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/registry"
	"github.com/connected-registry/connected-registry/registry/auth"
	"github.com/connected-registry/connected-registry/registry/cache"
	"github.com/connected-registry/connected-registry/storage"
	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/syncer"
	"github.com/connected-registry/connected-registry/trust"
)

// Config is what a Standalone is made from.
type Config struct {
	// Resource says what to keep and for whom, loaded and validated by
	// v1alpha1.Load. Required.
	Resource *v1alpha1.ConnectedRegistry
	// Data is the directory everything that is kept lies in; it is created
	// when missing. One process at a time uses it. Required.
	Data string
	// Bucket is what the registry's content lies in instead; Data holds what is
	// on its way there. Several processes may use it at a time. Nil: Data.
	Bucket bucket.Bucket
	// Secrets is where the Secrets that Resource names are found: a directory
	// for each, a file for each key, as Kubernetes mounts them. Empty:
	// Data/secrets.
	Secrets string
	// Listen is the registry's address, host:port. Empty: no registry.
	Listen string
	// CacheListen is the node cache's address, on loopback. Empty: no cache.
	CacheListen string
	// NodeRoot is the directory in which the node's file system is found, "/"
	// on the machine itself. Empty: no node is configured.
	NodeRoot string
	// Version is the program's, for a parent that is a connected registry.
	Version string
	// Progress is told what the syncer does; see syncer.Config. nil: nobody.
	Progress func(syncer.Event)
	// Logger takes the log. nil: none.
	Logger *slog.Logger
	// Metrics registers the metrics of all parts. nil: none are kept.
	Metrics prometheus.Registerer
}

// Standalone is the process's parts, ready to run. Run runs them all; each can
// be run by itself instead. A part that the Config leaves out is nil.
type Standalone struct {
	Registry *registry.Server
	Syncer   *syncer.Syncer
	Cache    *cache.Cache
	Agent    *agent.Agent

	// LoginServer is the host[:port] that names the registry in image
	// references, CacheURL the URL that nodes reach the cache by.
	LoginServer string
	CacheURL    string

	store     *storage.Store
	duties    *syncer.Duties // nil without a registry
	suspended bool
	ca        trust.Bundle
	renew     func() (changed bool, err error) // of the serving certificate
	onDemand  bool
	log       *slog.Logger
	listeners []net.Listener
	unlock    func()
}

// renewInterval is how often the serving certificate is looked at. It is renewed
// months ahead of its end.
const renewInterval = 12 * time.Hour

// Open prepares everything that c asks for: it locks and fills the data
// directory, takes the ports and reads the Secrets, so that what can be wrong
// with the configuration is reported before anything is served. Close releases
// what it took, also after Run.
func Open(ctx context.Context, c Config) (_ *Standalone, err error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Secrets == "" {
		c.Secrets = filepath.Join(c.Data, "secrets")
	}
	if err := refuse(&c.Resource.Spec); err != nil {
		return nil, err
	}
	s := &Standalone{log: c.Logger, suspended: c.Resource.Spec.Suspend}
	defer func() {
		if err != nil {
			s.Close()
		}
		if errors.Is(err, syscall.ENOSPC) {
			err = fmt.Errorf("%w: free space on the volume of %s, or give another directory with --data", err, c.Data)
		}
	}()
	if err := makeData(c.Data); err != nil {
		return nil, err
	}
	if s.unlock, err = lock(c.Data); err != nil {
		return nil, err
	}
	if s.store, err = storage.Open(ctx, storage.Config{Root: filepath.Join(c.Data, "registry"), Bucket: c.Bucket, Logger: c.Logger}); err != nil {
		return nil, err
	}
	sync, source, err := syncer.FromSpec(ctx, &c.Resource.Spec, secrets(c.Secrets))
	if err != nil {
		return nil, err
	}
	if err := s.openRegistry(ctx, c); err != nil {
		return nil, err
	}
	if err := s.openDuties(ctx, c, sync); err != nil {
		return nil, err
	}
	if source != nil || len(sync.Upstreams) > 0 {
		if err := s.openSyncer(c, sync); err != nil {
			return nil, err
		}
	}
	mirrored := mirrors(&c.Resource.Spec, source)
	if err := s.openCache(c, mirrored); err != nil {
		return nil, err
	}
	if err := s.openAgent(c, mirrored); err != nil {
		return nil, err
	}
	return s, nil
}

// refuse reports what a resource asks for and one machine by itself cannot do, so
// that nothing is silently left out.
func refuse(spec *v1alpha1.Spec) error {
	for _, ask := range []struct {
		field string
		set   bool
	}{
		{"spec.tls.source: " + string(spec.TLS.Source), spec.TLS.Source != "" && spec.TLS.Source != v1alpha1.TLSSourceBuiltIn},
		{"spec.tls.disabled", spec.TLS.Disabled},
		{"spec.trustDistribution.caSecrets", len(spec.TrustDistribution.CASecrets) > 0},
		{"spec.trustDistribution.configureRuntime", spec.TrustDistribution.ConfigureRuntime},
		{"spec.nodeCache.peers", spec.NodeCache.Peers},
		{"spec.nodeCache.prefetchWorkloads", spec.NodeCache.PrefetchWorkloads},
	} {
		if ask.set {
			return fmt.Errorf("%s works in a cluster only: leave it out", ask.field)
		}
	}
	return nil
}

// Run runs every part until ctx ends or one of them fails, and returns when all
// have stopped: within five seconds of the end of ctx.
func (s *Standalone) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	if s.Registry != nil {
		g.Go(func() error { return s.Registry.Run(ctx) })
		g.Go(func() error {
			s.keepServing(ctx)
			return nil
		})
		g.Go(func() error { return s.duties.Run(plain(ctx)) })
	}
	if s.Cache != nil {
		g.Go(func() error { return s.Cache.Run(ctx) })
	}
	if s.Agent != nil {
		g.Go(func() error { return s.Agent.Run(ctx) })
	}
	if s.Syncer != nil && !s.suspended {
		g.Go(func() error { return s.Syncer.Run(plain(ctx)) })
	}
	return g.Wait()
}

// plain ends with ctx but without its cause, which is the fault of another part
// and would be reported as one of the content.
func plain(ctx context.Context) context.Context {
	bare, cancel := context.WithCancel(context.WithoutCancel(ctx))
	context.AfterFunc(ctx, cancel)
	return bare
}

// Close releases the ports and the data directory. It is called once, after
// Run or instead of it.
func (s *Standalone) Close() {
	for _, l := range s.listeners {
		l.Close() // closed already by the part that served on it, if that ran
	}
	if s.store != nil {
		_ = s.store.Close() // never fails
	}
	if s.unlock != nil {
		s.unlock()
	}
}

func (s *Standalone) openRegistry(ctx context.Context, c Config) error {
	if c.Listen == "" {
		return nil
	}
	if spec := c.Resource.Spec; !spec.AnonymousPull && len(spec.ClientTokens) == 0 {
		return errors.New("nobody could pull: name clients in spec.clientTokens, or let everybody pull with spec.anonymousPull or --anonymous")
	}
	l, err := s.listen(c.Listen, "--listen")
	if err != nil {
		return err
	}
	s.LoginServer = c.Resource.Spec.LoginServer
	if s.LoginServer == "" {
		s.LoginServer = loginServer(l.Addr())
	}
	certs := filepath.Join(c.Data, "tls")
	if err := s.openTLS(filepath.Join(c.Data, "ca"), certs, l.Addr()); err != nil {
		return err
	}
	authority, err := s.openAuth(ctx, c)
	if err != nil {
		return err
	}
	rules, err := registry.NewRules(&c.Resource.Spec)
	if err != nil {
		return err
	}
	readOnly := c.Resource.Spec.Mode != v1alpha1.ModeReadWrite
	s.Registry, err = registry.New(registry.Config{
		Store:    s.store,
		Listener: l,
		CertFile: filepath.Join(certs, "tls.crt"),
		KeyFile:  filepath.Join(certs, "tls.key"),
		ReadOnly: func() bool { return readOnly },
		Rules:    func() *registry.Rules { return rules },
		Auth:     authority,
		Missing:  s.want,
		Logger:   c.Logger,
		Metrics:  c.Metrics,
	})
	return err
}

// want has the syncer bring what a client asked for.
func (s *Standalone) want(_ context.Context, repository, reference string) {
	if s.Syncer != nil && s.onDemand {
		s.Syncer.Want(repository, reference)
	}
}

func (s *Standalone) openAuth(ctx context.Context, c Config) (*auth.Authority, error) {
	dir := filepath.Join(c.Data, "tokens")
	if err := renderTokens(ctx, c.Resource, secrets(c.Secrets), dir); err != nil {
		return nil, err
	}
	secret, err := tokenSecret(c.Data)
	if err != nil {
		return nil, err
	}
	rules, err := registry.NewRules(&c.Resource.Spec)
	if err != nil {
		return nil, err
	}
	anonymous := c.Resource.Spec.AnonymousPull
	return auth.New(auth.Config{
		Dir:              dir,
		Secret:           secret,
		AnonymousPull:    func() bool { return anonymous },
		AnonymousPullFor: rules.AnonymousPullFor,
		Hosts:            func() []string { return []string{s.LoginServer} },
		Logger:           c.Logger,
	})
}

// openTLS loads the built-in CA, made on the first start and kept, and sees to a
// serving certificate that fits the registry's names.
func (s *Standalone) openTLS(ca, certs string, addr net.Addr) error {
	for _, dir := range []string{ca, certs} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("making room for certificates: %w: make --data writable, and move away what is no directory there", err)
		}
	}
	authority, err := trust.LoadOrCreateAuthority(ca, time.Now())
	if err != nil {
		return err
	}
	s.ca = authority.Bundle()
	names, err := servingNames(s.LoginServer, addr)
	if err != nil {
		return err
	}
	s.renew = func() (bool, error) { return authority.EnsureServing(certs, names, time.Now()) }
	_, err = s.renew()
	return err
}

// keepServing renews the serving certificate when its time has come; the
// registry notices. A machine may run for years.
func (s *Standalone) keepServing(ctx context.Context) {
	tick := time.NewTicker(renewInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		switch changed, err := s.renew(); {
		case err != nil:
			s.log.Error("the serving certificate cannot be renewed", "error", err)
		case changed:
			s.log.Info("renewed the serving certificate")
		}
	}
}

// openDuties prepares what goes with a registry that serves.
func (s *Standalone) openDuties(ctx context.Context, c Config, sync syncer.Config) (err error) {
	if s.Registry == nil {
		return nil
	}
	s.duties, err = syncer.NewDuties(ctx, syncer.DutiesConfig{
		Name:    c.Resource.Name,
		Spec:    &c.Resource.Spec,
		Sync:    sync,
		Store:   s.store,
		Secrets: secrets(c.Secrets),
		Logger:  c.Logger,
		Metrics: c.Metrics,
	})
	return err
}

func (s *Standalone) openSyncer(c Config, config syncer.Config) (err error) {
	config.Store, config.Driver = s.store.Namespace(), s.store.Driver()
	config.Name, config.LoginServer, config.Version = c.Resource.Name, s.LoginServer, c.Version
	config.Progress, config.Logger, config.Metrics = c.Progress, c.Logger, c.Metrics
	if s.duties != nil {
		config.Progress = func(e syncer.Event) {
			s.duties.Progress(e)
			if c.Progress != nil {
				c.Progress(e)
			}
		}
	}
	s.onDemand, config.OnDemand = config.OnDemand, false // within one process there is a shorter way
	s.Syncer, err = syncer.New(config)
	return err
}

func (s *Standalone) openCache(c Config, mirrored []agent.Mirror) error {
	if c.CacheListen == "" || s.Registry == nil {
		return nil
	}
	l, err := s.listen(c.CacheListen, "--cache-listen")
	if err != nil {
		return err
	}
	if a, ok := l.Addr().(*net.TCPAddr); !ok || !a.IP.IsLoopback() {
		return fmt.Errorf("--cache-listen %s: the cache speaks plain HTTP and stays on loopback: use 127.0.0.1:PORT", c.CacheListen)
	}
	dir := filepath.Join(c.Data, "cache")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making room for the cache: %w: make --data writable, and move away what is no directory there", err)
	}
	s.CacheURL = "http://" + l.Addr().String()
	central := cache.Upstream{URL: "https://" + reachable(s.listeners[0].Addr()), CAFile: filepath.Join(c.Data, "ca", "ca.crt")}
	registries := map[string]cache.Registry{
		s.LoginServer: {Upstreams: []cache.Upstream{central}},
	}
	// Credentials that a client has for another registry are not ours to see.
	central.WithoutCredentials = true
	for _, m := range mirrored {
		registries[m.Registry] = cache.Registry{Upstreams: []cache.Upstream{central}, TagsUpstream: m.TagsUpstream}
	}
	limits := c.Resource.Spec.NodeCache
	config := cache.Config{
		Dir:        dir,
		Registries: registries,
		Listener:   l,
		Logger:     c.Logger,
		Metrics:    c.Metrics,
	}
	if limits.MaxSize != nil {
		config.MaxSize = limits.MaxSize.Value()
	}
	if limits.MinFreeDisk != nil {
		config.MinFreeDisk = limits.MinFreeDisk.Value()
	}
	if limits.OfflineAccess != "" {
		if config.OfflineTTL, err = v1alpha1.ParseDuration(limits.OfflineAccess); err != nil {
			return fmt.Errorf("spec.nodeCache.offlineAccess: %w", err)
		}
	}
	if s.Cache, err = cache.New(config); err == nil {
		s.Cache.SetPrefetch(prefetched(&c.Resource.Spec))
	}
	return err
}

func (s *Standalone) openAgent(c Config, mirrored []agent.Mirror) (err error) {
	if c.NodeRoot == "" || s.Registry == nil || c.Resource.Spec.TrustDistribution.Disabled {
		return nil
	}
	s.Agent, err = agent.New(agent.Config{
		NodeRoot: c.NodeRoot,
		Registry: s.LoginServer,
		CA:       s.ca,
		Push:     c.Resource.Spec.Mode == v1alpha1.ModeReadWrite,
		CacheURL: s.CacheURL,
		Mirrors:  mirrored,
		Logger:   c.Logger,
	})
	return err
}

func (s *Standalone) listen(addr, flag string) (net.Listener, error) {
	l, err := Listen(context.Background(), addr, flag)
	if err != nil {
		return nil, err
	}
	s.listeners = append(s.listeners, l)
	return l, nil
}

func makeData(dir string) error {
	if dir == "" {
		return errors.New("no data directory: give one with --data")
	}
	err := os.MkdirAll(dir, 0o755)
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("creating the data directory: %w: run as root or give another with --data", err)
	}
	if err != nil {
		return fmt.Errorf("creating the data directory: %w: give another with --data", err)
	}
	return nil
}
