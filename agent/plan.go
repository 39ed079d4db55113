package agent

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/connected-registry/connected-registry/trust"
)

const (
	// dialTimeout bounds connecting to hosts of ours, so that an absent one
	// costs a pull a second and not thirty.
	dialTimeout = time.Second

	caFile       = "ca.crt"        // roots of the connected registry
	serverCAFile = "server-ca.crt" // roots of a mirror's upstream
)

// plan is what the node should hold, by cfg alone.
func plan(cfg Config) (trust.State, error) {
	if err := checkConfig(cfg); err != nil {
		return trust.State{}, err
	}
	state := trust.State{SystemTrust: cfg.SystemTrust, SystemCAs: cfg.CA}
	for _, name := range ownNames(cfg) {
		state.Registries = append(state.Registries, planOwn(cfg, name))
	}
	for _, m := range cfg.Mirrors {
		state.Registries = append(state.Registries, planMirror(cfg, m))
	}
	for _, t := range cfg.Trusted {
		state.Registries = append(state.Registries, trust.Registry{
			Hosts: trust.Hosts{Registry: t.Registry, Server: trust.Hop{CA: serverCAFile}},
			CAs:   map[string]trust.Bundle{serverCAFile: t.CA},
		})
	}
	return state, trust.CheckState(state)
}

func checkConfig(cfg Config) error {
	if _, _, err := trust.ParseHost(cfg.Registry); err != nil {
		return err
	}
	if cfg.CacheURL != "" {
		if _, err := trust.ParseURL(cfg.CacheURL); err != nil {
			return fmt.Errorf("cache: %w", err)
		}
	}
	if cfg.SystemTrust && cfg.CA.Empty() {
		return errors.New("system trust: there is no CA to put into the system trust store: give one, or turn system trust off")
	}
	for _, m := range cfg.Mirrors {
		if err := checkMirror(cfg, m); err != nil {
			return fmt.Errorf("mirror %q: %w", m.Registry, err)
		}
	}
	return nil
}

func checkMirror(cfg Config, m Mirror) error {
	var upstream *url.URL
	if m.Server != "" {
		var err error
		if upstream, err = trust.ParseURL(m.Server); err != nil {
			return err
		}
	}
	switch {
	case slices.Contains(ownNames(cfg), m.Registry):
		return errors.New("is the connected registry itself: remove it from the mirrors")
	case m.NoFallback && (m.Server != "" || !m.ServerCA.Empty()):
		return errors.New("names an upstream and forbids to ask it: remove one of the two")
	case m.NoFallback && m.TagsUpstream:
		return errors.New("leaves tags to the upstream and forbids to ask it: remove one of the two")
	case upstream != nil && upstream.Scheme == "http" && !m.ServerCA.Empty():
		return errors.New("has a CA for an upstream over http: use https, or leave the CA out")
	}
	return nil
}

func ownNames(cfg Config) []string {
	if len(cfg.Names) == 0 {
		return []string{cfg.Registry}
	}
	return cfg.Names
}

// planOwn: the cache, then the registry itself.
func planOwn(cfg Config, name string) trust.Registry {
	r := newRegistry(cfg, name)
	if cfg.CacheURL != "" {
		r.Hosts.Hops = append(r.Hosts.Hops, cacheHop(cfg, trust.Pull, trust.Resolve))
	}
	r.Hosts.Server, r.Hosts.Role = ownHop(cfg), trust.ServerOwn
	return r
}

// planMirror: the cache, the registry, then the upstream unless that is
// forbidden.
func planMirror(cfg Config, m Mirror) trust.Registry {
	r := newRegistry(cfg, m.Registry)
	can := []string{trust.Pull, trust.Resolve}
	if m.TagsUpstream {
		can = []string{trust.Pull}
	}
	if cfg.CacheURL != "" {
		r.Hosts.Hops = append(r.Hosts.Hops, cacheHop(cfg, can...))
	}
	registry := ownHop(cfg)
	// Pushing to a mirrored name means its own registry, never us.
	registry.Capabilities = can
	if m.NoFallback {
		r.Hosts.Server, r.Hosts.Role = registry, trust.ServerOnly
		return r
	}
	if !cfg.SkipRegistry {
		r.Hosts.Hops = append(r.Hosts.Hops, registry)
	}
	r.Hosts.Server.URL = m.Server
	if !m.ServerCA.Empty() {
		r.Hosts.Server.CA = serverCAFile
		r.CAs[serverCAFile] = m.ServerCA
	}
	return r
}

func newRegistry(cfg Config, name string) trust.Registry {
	r := trust.Registry{Hosts: trust.Hosts{Registry: name}, CAs: map[string]trust.Bundle{}}
	if asksWithCA(cfg) {
		r.CAs[caFile] = cfg.CA
	}
	return r
}

func cacheHop(cfg Config, capabilities ...string) trust.Hop {
	hop := trust.Hop{URL: cfg.CacheURL, Capabilities: capabilities, DialTimeout: dialTimeout}
	return hop
}

func ownHop(cfg Config) trust.Hop {
	hop := trust.Hop{URL: trust.HTTPS(cfg.Registry), DialTimeout: dialTimeout}
	if cfg.PlainHTTP {
		hop.URL = "http://" + cfg.Registry
	}
	if !cfg.Push {
		hop.Capabilities = []string{trust.Pull, trust.Resolve}
	}
	if asksWithCA(cfg) {
		hop.CA = caFile
	}
	return hop
}

// asksWithCA: a CA beside http would make containerd try https first.
func asksWithCA(cfg Config) bool { return !cfg.CA.Empty() && !cfg.PlainHTTP }
