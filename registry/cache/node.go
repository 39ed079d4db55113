package cache

import (
	"strings"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// NodeRegistries are the registries that a node is to answer for: the connected
// registry under each of its names, and what it mirrors. caFile is its CAFile.
func NodeRegistries(c *v1alpha1.NodeConfiguration, caFile string) map[string]Registry {
	central := Upstream{
		URL:       "https://" + c.Registry,
		Endpoints: c.Endpoints,
		CAFile:    caFile,
		// Whatever it is called, it need not be told that it is itself.
		Namespace: strings.ToLower(c.Registry),
	}
	if c.PlainHTTP {
		central.URL, central.CAFile = "http://"+c.Registry, ""
	}
	all := make(map[string]Registry)
	for _, name := range c.Names {
		all[strings.ToLower(name)] = Registry{Upstreams: []Upstream{central}}
	}
	// Credentials that a client has for another registry are not the connected
	// registry's to see.
	mirror := central
	mirror.Namespace, mirror.WithoutCredentials = "", true
	for _, m := range c.Mirrors {
		all[strings.ToLower(m.Registry)] = Registry{
			Upstreams:    []Upstream{mirror},
			TagsUpstream: m.ResolveTags != nil && !*m.ResolveTags,
		}
	}
	return all
}

// Doubts reports whether an upstream has let requests wait in vain, and has not
// answered since.
func (c *Cache) Doubts() bool {
	for _, reg := range *c.registries.Load() {
		for _, group := range reg.upstreams {
			for _, up := range group {
				if up.silences.doubted.Load() {
					return true
				}
			}
		}
	}
	return false
}

// Serving reports whether Run has come so far that requests are answered.
func (c *Cache) Serving() bool { return c.disk.Load() != nil }
