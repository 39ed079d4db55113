package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"

	"github.com/connected-registry/connected-registry/agent"
	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

const (
	// defaultGrace is long enough for a Secret that is deleted to be made anew.
	defaultGrace = 10 * time.Minute
	// stepInterval is for what comes with time alone.
	stepInterval = time.Minute
	// cleanupRetry is after a cleanup that could not be finished.
	cleanupRetry = 10 * time.Second
)

// Config says which node a Daemon looks after, and by what.
type Config struct {
	// File is the mounted NodeConfiguration. It may be missing for a while.
	// Required.
	File string
	// API is how the API server is reached, which may be away at any time.
	// Required.
	API *rest.Config
	// Namespace is the agent's, with the Secrets and the Lease. Required.
	Namespace string
	// Node is the node's name in the cluster, Pod the agent's own. Required.
	Node, Pod string
	// NodeRoot is the directory in which the node's file system is found.
	// Empty: "/".
	NodeRoot string
	// CertsDir is containerd's hosts directory, as a path inside NodeRoot.
	// Empty: the one that Runtime reads, or else /etc/containerd/certs.d.
	CertsDir string
	// Runtime is the node's container runtime. nil: nobody looks at it.
	Runtime Runtime
	// Cache is the node's cache, CacheURL where containerd reaches it. nil and
	// empty: there is none.
	Cache    Cache
	CacheURL string
	// PeerAddress is where other nodes reach the cache, IP:port, while the
	// configuration lets nodes ask one another. Empty: they do not.
	PeerAddress string
	// RemoveStartupTaint takes StartupTaint from the node once that is
	// configured, which needs get and patch on it. False: nothing of the node's
	// object is touched.
	RemoveStartupTaint bool
	// SecretGrace is how long the certificates of a deleted Secret stay trusted.
	// 0: 10 minutes.
	SecretGrace time.Duration
	// Version is the program's.
	Version string
	// Level follows the configuration's logLevel. nil: nobody wants to know.
	Level *slog.LevelVar
	// Metrics is where the collectors are registered. nil: nowhere.
	Metrics prometheus.Registerer
	// Logger receives what happened. nil: nothing is logged.
	Logger *slog.Logger
}

// Cache is the node's cache as the agent sees it.
type Cache interface {
	// Configure makes it answer for what c names. caFile holds the certificates
	// that the registry is trusted by, changes while the cache runs, and may be
	// missing at first; empty: the system's. It does not block.
	Configure(c *v1alpha1.NodeConfiguration, caFile string) error
	// Serving reports whether it answers requests.
	Serving() bool
	// Fault says why it cannot. nil: it does, or is about to.
	Fault() error
	// Doubts reports whether the registry has left it waiting lately.
	Doubts() bool
}

// Daemon is the agent of one node. See the package's documentation.
type Daemon struct {
	cfg      Config
	log      *slog.Logger
	client   *client
	in       *inputs
	lease    *leaser
	recorder *recorder
	prober   *prober
	metrics  *metrics
	health   health
	runtime  *runtimeWatch
	// configured is closed once the node can be counted on.
	configured chan struct{}

	// What follows belongs to the goroutine of loop.
	keep     *keep
	watches  *watches
	config   *configuration // the last good one; nil: there was none yet
	badFile  error          // what is wrong with the file as it is now
	sources  map[string]*source
	restored bool // what is known comes from an earlier life
	applied  string
	keepErr  error
	cacheErr error
	setErr   error
	found    runtimeNews // about the runtime
	node     *keeper
	report   *agent.Report
	acked    acknowledgement
	leave    leaving
	faults   map[string]fault
}

// New checks cfg and touches neither node nor network.
func New(cfg Config) (*Daemon, error) {
	switch {
	case cfg.File == "" || cfg.Namespace == "" || cfg.Node == "" || cfg.Pod == "":
		return nil, errors.New("the agent needs the configuration file, its namespace, and the names of its node and pod: give them with --config, --namespace, --node and --pod")
	case cfg.API == nil:
		return nil, errors.New("the agent needs an API server")
	}
	if cfg.NodeRoot == "" {
		cfg.NodeRoot = "/"
	}
	if cfg.SecretGrace == 0 {
		cfg.SecretGrace = defaultGrace
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	d := &Daemon{cfg: cfg, log: cfg.Logger, in: newInputs(), sources: make(map[string]*source), faults: make(map[string]fault), configured: make(chan struct{})}
	var err error
	if d.client, err = newClient(cfg.API, cfg.Namespace); err != nil {
		return nil, err
	}
	if d.metrics, err = newMetrics(cfg.Metrics); err != nil {
		return nil, err
	}
	d.lease = newLeaser(lease{client: d.client, node: cfg.Node, holder: cfg.Pod}, d.metrics.leaseWritten, d.log)
	d.runtime = &runtimeWatch{
		runtime: cfg.Runtime, tell: d.in.runtimeIs, woken: make(chan struct{}, 1),
		turn: func(ctx context.Context) (func(), error) { return d.client.takeTurn(ctx, cfg.Node) },
	}
	d.recorder = newRecorder(d.client, cfg.Node, cfg.Pod, d.log)
	d.watches = &watches{client: d.client, tell: d.in.secretIs, failed: d.in.secretFails, running: make(map[string]context.CancelFunc)}
	d.prober = &prober{every: probeInterval, tell: d.in.registryHangs, suspect: func() bool {
		// Without the cache's hop, leaving the registry out would leave nothing.
		return cfg.Cache != nil && (cfg.Cache.Doubts() || !cfg.Cache.Serving())
	}}
	return d, nil
}

// Run looks after the node until ctx ends, and returns nil then. It returns an
// error only if the node's file system cannot be found at all.
func (d *Daemon) Run(ctx context.Context) (err error) {
	if d.keep, err = openKeep(d.cfg.NodeRoot); err != nil {
		return err
	}
	defer d.keep.close()
	d.found = d.runtime.first(ctx)
	d.restore(time.Now())
	g, ctx := errgroup.WithContext(ctx)
	run := func(f func(context.Context)) {
		g.Go(func() error {
			f(ctx)
			return nil
		})
	}
	run(func(ctx context.Context) { followFile(ctx, d.cfg.File, d.in.fileIs) })
	run(d.lease.run)
	run(d.recorder.run)
	run(d.prober.run)
	run(d.runtime.run)
	run(d.untaint)
	run(d.loop)
	return g.Wait()
}

// restore begins with what was good last.
func (d *Daemon) restore(now time.Time) {
	config, bundles, err := d.keep.load(now)
	if err != nil {
		d.log.Warn("part of the last good configuration cannot be used", "error", err)
	}
	if config == nil {
		return
	}
	d.config, d.restored = config, true
	for name, b := range bundles {
		d.sources[name] = &source{bundle: b}
	}
	d.log.Info("working by the last good configuration until there is news", "configuration", config.digest)
}

func (d *Daemon) loop(ctx context.Context) {
	timer := time.NewTimer(stepInterval)
	defer timer.Stop()
	for ctx.Err() == nil {
		timer.Reset(d.step(ctx, time.Now()))
		select {
		case <-ctx.Done():
		case <-d.in.woken:
		case <-timer.C:
		}
	}
	d.stopNode()
	d.watches.stop()
}

// step brings everything in line with what is known now, and returns when to
// look again though nothing happens.
func (d *Daemon) step(ctx context.Context, now time.Time) time.Duration {
	n := d.in.take()
	d.report = n.report
	if n.runtime != nil {
		d.found = *n.runtime
	}
	if n.file != nil {
		d.takeFile(n.file)
	}
	d.takeSecrets(ctx, n, now)
	if d.leave.wanted {
		d.runtime.leave()
		d.cleanUp(ctx)
	} else {
		d.configure(ctx, n.hangs)
		d.runtime.allow(d.config != nil && d.config.ConfigureRuntime)
	}
	d.publish(n)
	return d.nextStep(now)
}

func (d *Daemon) takeFile(f *fileNews) {
	if f.err != nil {
		d.badFile = f.err
		return
	}
	if d.config != nil && string(d.config.raw) == string(f.raw) {
		d.badFile = nil
		return
	}
	c, err := loadConfiguration(d.cfg.File, f.raw)
	if err == nil {
		_, err = agent.New(c.nodeConfig(authorities{}, d.cfg.CacheURL))
	}
	if d.badFile = err; err != nil {
		return
	}
	d.config = c
	d.log.Info("read the configuration", "file", d.cfg.File, "configuration", c.digest)
}

// takeSecrets follows the Secrets that are named now and takes what they hold.
func (d *Daemon) takeSecrets(ctx context.Context, n news, now time.Time) {
	names := map[string]bool{ControlSecret: true}
	if d.config != nil {
		for _, s := range d.config.CASecrets {
			names[s.Name] = true
		}
	}
	d.watches.follow(ctx, names)
	for name := range d.sources {
		if !names[name] {
			delete(d.sources, name)
		}
	}
	for name := range names {
		s := d.sources[name]
		if s == nil {
			s = &source{}
			d.sources[name] = s
		}
		if fresh, ok := n.secrets[name]; ok {
			s.take(fresh, now, d.cfg.SecretGrace)
			d.metrics.secretSeen(s)
		}
		s.age(now)
	}
	// A Secret that is gone says nothing: at an uninstallation it goes as well.
	if control, ok := n.secrets[ControlSecret]; ok && control.present {
		d.leave.want(control.uninstall, d.log)
	}
}

func (d *Daemon) bundles() map[string]trust.Bundle {
	out := make(map[string]trust.Bundle)
	for name, s := range d.sources {
		out[name] = s.bundle
	}
	return out
}

// waitsFor says what is missing before the node may be touched. Empty: nothing.
func (d *Daemon) waitsFor(a authorities) string {
	switch control := d.sources[ControlSecret]; {
	case d.config == nil:
		return "the configuration"
	case !d.restored && !control.looked:
		return "the API server, about Secret " + ControlSecret
	case !d.config.wantsCA() || !a.own.Empty():
		return ""
	}
	for _, s := range d.config.CASecrets {
		if d.config.servesOwn(s) && !d.sources[s.Name].lapsed {
			return "the registry's CA certificates in Secret " + s.Name
		}
	}
	return ""
}

// configure hands what is known on to cache and node. The certificates are in
// place before anything that counts on them.
func (d *Daemon) configure(ctx context.Context, hangs bool) {
	if d.config == nil {
		return
	}
	a := d.config.gather(d.bundles())
	waits := d.waitsFor(a)
	key := fmt.Sprint(d.config.digest, " ", waits, " ", a.own.Fingerprint(), " ", d.certsDir(), d.found.Reserved, hangs)
	for _, s := range d.config.CASecrets {
		key += " " + d.sources[s.Name].bundle.Fingerprint()
	}
	if key == d.applied && d.keepErr == nil && d.setErr == nil && d.cacheErr == nil {
		return
	}
	d.applied = key
	if waits == "" {
		d.keepErr = d.keep.save(d.config, d.bundles(), a.own)
	}
	d.configureCache(a)
	d.prober.target(d.config.Registry, d.config.PlainHTTP)
	if waits != "" {
		return
	}
	cfg := d.config.nodeConfig(a, d.cfg.CacheURL)
	cfg.Mirrors = withoutReserved(cfg.Mirrors, d.found.Reserved)
	cfg.SkipRegistry = hangs
	cfg.NodeRoot, cfg.CertsDir, cfg.Logger, cfg.Report = d.cfg.NodeRoot, d.certsDir(), d.log, d.in.nodeIs
	if d.cfg.Level != nil {
		d.cfg.Level.Set(slogLevel(d.config.LogLevel))
	}
	if d.node != nil {
		d.setErr = d.node.agent.Set(cfg)
		return
	}
	d.node, d.setErr = startNode(ctx, cfg)
}

func (d *Daemon) configureCache(a authorities) {
	if d.cfg.Cache == nil {
		return
	}
	caFile := ""
	if d.config.wantsCA() && (!a.own.Empty() || d.waitsFor(a) != "") {
		caFile = d.keep.caFile()
	}
	d.cacheErr = d.cfg.Cache.Configure(d.config.NodeConfiguration, caFile)
}

func (d *Daemon) stopNode() {
	if d.node != nil {
		d.node.stop()
		d.node = nil
	}
}

// nextStep is when something is due by itself.
func (d *Daemon) nextStep(now time.Time) time.Duration {
	wait := stepInterval
	for _, s := range d.sources {
		if !s.lapses.IsZero() {
			wait = min(wait, max(s.lapses.Sub(now), 0))
		}
	}
	if d.leave.err != nil || d.keepErr != nil || d.setErr != nil || d.cacheErr != nil {
		wait = min(wait, cleanupRetry)
	}
	return wait
}

func slogLevel(l v1alpha1.LogLevel) slog.Level {
	switch l {
	case v1alpha1.LogLevelDebug:
		return slog.LevelDebug
	case v1alpha1.LogLevelWarning:
		return slog.LevelWarn
	case v1alpha1.LogLevelError:
		return slog.LevelError
	case v1alpha1.LogLevelNone:
		return slog.LevelError + 100
	default:
		return slog.LevelInfo
	}
}
