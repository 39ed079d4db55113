package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/connected-registry/connected-registry/agent"
	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/trust"
)

// configuration is a NodeConfiguration that makes sense.
type configuration struct {
	*v1alpha1.NodeConfiguration
	raw    []byte
	digest string // "sha256:" and hex, of raw
	// mirrorCAs are NodeMirror.CA, by registry.
	mirrorCAs map[string]trust.Bundle
}

// loadConfiguration reads a node.yaml. The error is one line.
func loadConfiguration(file string, raw []byte) (*configuration, error) {
	c, err := v1alpha1.LoadNodeConfiguration(file, raw)
	if err != nil {
		return nil, fmt.Errorf("%s", oneLine(err.Error()))
	}
	sum := sha256.Sum256(raw)
	out := &configuration{
		NodeConfiguration: c,
		raw:               raw,
		digest:            "sha256:" + hex.EncodeToString(sum[:]),
		mirrorCAs:         make(map[string]trust.Bundle),
	}
	for _, m := range c.Mirrors {
		if m.CA == "" {
			continue
		}
		b, _, err := trust.ParseBundle([]byte(m.CA), time.Now())
		if err != nil {
			return nil, fmt.Errorf("%s: mirrors: CA of %s: %w", file, m.Registry, err)
		}
		out.mirrorCAs[m.Registry] = b
	}
	return out, nil
}

// oneLine joins the lines of a message.
func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

// isOwn reports whether host is the registry itself.
func (c *configuration) isOwn(host string) bool {
	return host == c.Registry || slices.Contains(c.Names, host)
}

// servesOwn reports whether a Secret's certificates are for the registry itself.
func (c *configuration) servesOwn(s v1alpha1.CASecret) bool {
	return len(s.Hosts) == 0 || slices.ContainsFunc(s.Hosts, c.isOwn)
}

// wantsCA reports whether the registry has a CA that some Secret is to bring.
func (c *configuration) wantsCA() bool {
	return !c.PlainHTTP && slices.ContainsFunc(c.CASecrets, c.servesOwn)
}

// authorities are the certificates of a configuration's Secrets, by what they
// are for.
type authorities struct {
	own    trust.Bundle
	byHost map[string]trust.Bundle // of other registries
	notes  []string
}

// gather sorts bundles, by the names of their Secrets, by the registries that
// they are for. Several for one registry are all trusted, which notes tell.
func (c *configuration) gather(bundles map[string]trust.Bundle) authorities {
	out := authorities{byHost: make(map[string]trust.Bundle)}
	first := make(map[string]string) // the Secret that came first, by host
	add := func(host, secret string, have, b trust.Bundle) trust.Bundle {
		if other, ok := first[host]; ok && !have.Equal(b) {
			out.notes = append(out.notes, fmt.Sprintf("Secrets %s and %s name different certificates for %s: all of them are trusted", other, secret, host))
		} else if !ok {
			first[host] = secret
		}
		return have.Union(b)
	}
	for _, s := range c.CASecrets {
		b, ok := bundles[s.Name]
		if !ok || b.Empty() {
			continue
		}
		if c.servesOwn(s) {
			out.own = add(c.Names[0], s.Name, out.own, b)
		}
		for _, host := range s.Hosts {
			if !c.isOwn(host) {
				out.byHost[host] = add(host, s.Name, out.byHost[host], b)
			}
		}
	}
	return out
}

// nodeConfig is what the node should hold.
func (c *configuration) nodeConfig(a authorities, cacheURL string) agent.Config {
	out := agent.Config{
		Tag:         c.digest,
		Registry:    c.Registry,
		PlainHTTP:   c.PlainHTTP,
		Names:       c.Names,
		CA:          a.own,
		Push:        c.Push,
		CacheURL:    cacheURL,
		SystemTrust: c.SystemTrust && !a.own.Empty(),
	}
	rest := maps.Clone(a.byHost)
	for _, m := range c.Mirrors {
		mirror := agent.Mirror{
			Registry:     m.Registry,
			Server:       m.Server,
			TagsUpstream: m.ResolveTags != nil && !*m.ResolveTags,
			NoFallback:   m.Fallback != nil && !*m.Fallback,
		}
		if !mirror.NoFallback {
			mirror.ServerCA = c.mirrorCAs[m.Registry].Union(a.byHost[m.Registry])
		} else {
			mirror.Server = ""
		}
		delete(rest, m.Registry)
		out.Mirrors = append(out.Mirrors, mirror)
	}
	for _, host := range slices.Sorted(maps.Keys(rest)) {
		out.Trusted = append(out.Trusted, agent.Trusted{Registry: host, CA: rest[host]})
	}
	return out
}

// fingerprints are those of the certificates one by one: SHA-256 of the DER
// encoding, in hex, sorted and separated by commas.
func fingerprints(b trust.Bundle) string {
	var all []string
	for _, c := range b.Certificates() {
		sum := sha256.Sum256(c.Raw)
		all = append(all, hex.EncodeToString(sum[:]))
	}
	slices.Sort(all)
	return strings.Join(all, ",")
}

// withoutReserved leaves out the mirrors of registries that are somebody else's.
func withoutReserved(mirrors []agent.Mirror, reserved []string) []agent.Mirror {
	return slices.DeleteFunc(mirrors, func(m agent.Mirror) bool { return slices.Contains(reserved, m.Registry) })
}
