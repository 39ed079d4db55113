// Package agent keeps a node pointed at the connected registry: it plans which
// registries containerd should ask where and with which CA, has the trust
// package put that on the node, and puts it right when something else changes
// it.
//
// It imports trust and nothing else of this module.
package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/connected-registry/connected-registry/trust"
)

// Config says what one node should hold.
type Config struct {
	// NodeRoot is the directory in which the node's file system is found.
	// Empty: "/".
	NodeRoot string
	// CertsDir is containerd's hosts directory, as a path inside NodeRoot.
	// Empty: /etc/containerd/certs.d.
	CertsDir string
	// Registry is the host[:port] at which the connected registry is reached.
	// Required.
	Registry string
	// PlainHTTP asks Registry over http. False: over https.
	PlainHTTP bool
	// Names are the hosts[:port] by which image references name the connected
	// registry. Empty: Registry.
	Names []string
	// CA are the roots of the registry's serving certificate. Empty: the
	// system's roots alone.
	CA trust.Bundle
	// Push says that the registry accepts pushes (ReadWrite). False: nodes are
	// told to pull only.
	Push bool
	// CacheURL is the node's pull-through cache, e.g. http://127.0.0.1:5050.
	// Empty: no cache hop.
	CacheURL string
	// Mirrors are further registries whose images come from the connected
	// registry first. Empty: none.
	Mirrors []Mirror
	// Trusted are registries that are asked themselves and nobody else, with
	// roots besides the system's. Empty: none.
	Trusted []Trusted
	// SkipRegistry leaves the connected registry out where another host can be
	// asked instead, since it is known not to answer. False: it is asked.
	SkipRegistry bool
	// SystemTrust also puts CA into the node's system trust store, for the
	// other programs on the node. False: the store is left alone.
	SystemTrust bool
	// Tag is handed back in every Report, and means nothing here.
	Tag string
	// Logger receives what happened. Nil: nothing is logged.
	Logger *slog.Logger
	// Report, if set, is told of every attempt that Run makes, from one
	// goroutine. It must not block.
	Report func(Report)
}

// Trusted is a registry whose own roots are not the system's.
type Trusted struct {
	// Registry is the host[:port] as image references name it. Required.
	Registry string
	// CA are its roots. Required.
	CA trust.Bundle
}

// Report says how an attempt to bring the node to what it should hold went.
type Report struct {
	// Config is what was applied.
	Config Config
	// Err is what went wrong, as [Agent.Apply] returns it.
	Err error
	// Held are the registries that were left as they were found, since another
	// program keeps changing their files.
	Held []string
	// Changed is the number of files that were written or removed.
	Changed int
}

// Mirror is a registry that is redirected to the connected one.
type Mirror struct {
	// Registry is the host[:port] as image references name it, e.g. docker.io,
	// or "_default" for every registry without a directory of its own.
	// Required.
	Registry string
	// Server is the URL of the upstream to fall back to. Empty: containerd's
	// own default for Registry.
	Server string
	// ServerCA are roots for the upstream besides the system's. Empty: none.
	ServerCA trust.Bundle
	// TagsUpstream leaves the resolving of tags to the upstream; only content
	// named by digest comes from the connected registry. False: tags too are
	// asked of the connected registry first.
	TagsUpstream bool
	// NoFallback never asks the upstream. False: it is asked last.
	NoFallback bool
}

// CleanupConfig says which node to clean.
type CleanupConfig struct {
	// NodeRoot is the directory in which the node's file system is found.
	// Empty: "/".
	NodeRoot string
	// Logger receives what happened. Nil: nothing is logged.
	Logger *slog.Logger
}

// Agent keeps one node as its Config says.
type Agent struct {
	desired  atomic.Pointer[desired]
	news     chan struct{} // holds one element when desired may have changed
	tuning   trust.StoreConfig
	nodeRoot string
	log      *slog.Logger
	report   func(Report)
}

// desired is what New or Set was given, and what follows from it.
type desired struct {
	cfg   Config
	want  trust.State
	store *trust.Store
}

// New checks cfg. It touches nothing on the node.
func New(cfg Config) (*Agent, error) { return newAgent(cfg, trust.StoreConfig{}) }

// newAgent takes what else a store can be told.
func newAgent(cfg Config, tuning trust.StoreConfig) (*Agent, error) {
	a := &Agent{
		news:     make(chan struct{}, 1),
		tuning:   tuning,
		nodeRoot: rootOf(cfg.NodeRoot),
		log:      logger(cfg.Logger),
		report:   cfg.Report,
	}
	if a.report == nil {
		a.report = func(Report) {}
	}
	return a, a.Set(cfg)
}

// Set replaces what the node should hold. A Run under way brings the node to it
// at once; of several in a row, the last one counts. NodeRoot, Logger and Report
// stay those that New was given. On an error nothing changes.
func (a *Agent) Set(cfg Config) error {
	want, err := plan(cfg)
	if err != nil {
		return fmt.Errorf("node configuration: %w", err)
	}
	next := &desired{cfg: cfg, want: want}
	if now := a.desired.Load(); now != nil && now.cfg.CertsDir == cfg.CertsDir {
		next.store = now.store
	} else {
		tuning := a.tuning
		tuning.NodeRoot, tuning.CertsDir = a.nodeRoot, cfg.CertsDir
		if next.store, err = trust.NewStore(tuning); err != nil {
			return fmt.Errorf("node configuration: %w", err)
		}
	}
	a.desired.Store(next)
	select {
	case a.news <- struct{}{}:
	default: // the last news were not looked at yet
	}
	return nil
}

func rootOf(nodeRoot string) string {
	if nodeRoot == "" {
		return "/"
	}
	return nodeRoot
}

func logger(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}

// Apply brings the node to the wanted state once and returns the paths that it
// changed, as seen inside NodeRoot. On an error, what could be done has been,
// and nothing is half written; [trust.OwnerErrors] tells whether the rest of
// the work is done.
func (a *Agent) Apply(ctx context.Context) (changed []string, err error) {
	d := a.desired.Load()
	result, err := d.store.Apply(ctx, d.want)
	logResult(a.log, result)
	return paths(result), err
}

func paths(result trust.Result) []string {
	var out []string
	for _, c := range result.Changed {
		out = append(out, c.Path)
	}
	return out
}

func logResult(log *slog.Logger, result trust.Result) {
	if len(result.Changed) > 0 {
		log.Info("changed files of the node", "paths", paths(result))
	}
	for _, n := range result.Notes {
		log.Warn(n)
	}
}

// Cleanup leaves the node as it was before the first Apply, from the record on
// the node alone. It may be repeated, and finishes what a killed one began.
func Cleanup(ctx context.Context, cfg CleanupConfig) error {
	return cleanup(ctx, cfg, trust.StoreConfig{})
}

func cleanup(ctx context.Context, cfg CleanupConfig, tuning trust.StoreConfig) error {
	tuning.NodeRoot = cfg.NodeRoot
	store, err := trust.NewStore(tuning)
	if err != nil {
		return err
	}
	result, err := store.Cleanup(ctx)
	logResult(logger(cfg.Logger), result)
	return err
}
