// Package agent keeps a node pointed at the connected registry: it plans which
// registries containerd should ask where and with which CA, has the trust
// package put that on the node, and puts it back when something else changes
// it.
//
// It imports trust and nothing else of this module.
package agent

import (
	"context"
	"errors"
	"log/slog"

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
	// Registry is the connected registry's own host[:port], as image
	// references name it. It is asked over https. Required.
	Registry string
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
	// SystemTrust also puts CA into the node's system trust store, for the
	// other programs on the node. False: the store is left alone.
	SystemTrust bool
	// Logger receives what happened. Nil: nothing is logged.
	Logger *slog.Logger
}

// Mirror is a registry that is redirected to the connected one.
type Mirror struct {
	// Registry is the host[:port] as image references name it, e.g. docker.io,
	// or "_default" for every registry without a directory of its own.
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
	cfg Config
}

// New checks cfg. It touches nothing on the node.
func New(cfg Config) (*Agent, error) { return &Agent{cfg: cfg}, nil }

// Apply brings the node to the wanted state once and returns the paths that it
// changed, as seen inside NodeRoot. On an error, what could be done has been,
// and nothing is half written.
func (a *Agent) Apply(ctx context.Context) (changed []string, err error) {
	return nil, errors.ErrUnsupported
}

// Run applies, then keeps the node in that state until ctx ends, and returns
// nil then. It returns an error only if the first Apply fails.
func (a *Agent) Run(ctx context.Context) error { return errors.ErrUnsupported }

// Cleanup leaves the node as it was before the first Apply, from the record on
// the node alone. It may be repeated.
func Cleanup(ctx context.Context, cfg CleanupConfig) error { return errors.ErrUnsupported }
