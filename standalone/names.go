package standalone

import (
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/connected-registry/connected-registry/agent"
	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/syncer"
)

// loginServer names the registry by the address it listens on; one that listens
// everywhere goes by the machine's name.
func loginServer(addr net.Addr) string {
	host, port, err := net.SplitHostPort(addr.String())
	if err != nil {
		return addr.String()
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "localhost"
		if name, err := os.Hostname(); err == nil && name != "" {
			host = name
		}
	}
	if port == "443" {
		return bracketed(host)
	}
	return net.JoinHostPort(host, port)
}

// reachable is where this machine itself reaches what listens on addr.
func reachable(addr net.Addr) string {
	host, port, err := net.SplitHostPort(addr.String())
	if err != nil {
		return addr.String()
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

// servingNames are the names and addresses that the serving certificate has to
// hold: whatever a client of this machine or of its network may call it.
func servingNames(loginServer string, addr net.Addr) ([]string, error) {
	names := []string{hostOnly(loginServer), "localhost", "127.0.0.1", "::1"}
	host, _, err := net.SplitHostPort(addr.String())
	if err != nil {
		return nil, fmt.Errorf("listening address %s: %w", addr, err)
	}
	ip := net.ParseIP(host)
	if ip == nil || !ip.IsUnspecified() {
		return append(names, host), nil
	}
	if name, err := os.Hostname(); err == nil && name != "" {
		names = append(names, name)
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("listing this machine's addresses for the serving certificate: %w", err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			names = append(names, n.IP.String())
		}
	}
	return names, nil
}

// hostOnly drops the port and an IPv6 address's brackets.
func hostOnly(hostport string) string {
	if host, _, err := net.SplitHostPort(hostport); err == nil {
		return host
	}
	return strings.Trim(hostport, "[]")
}

func bracketed(host string) string {
	if strings.Contains(host, ":") {
		return "[" + host + "]"
	}
	return host
}

// prefetched are the images that the cache is to hold before they are needed:
// those for every node, since a node by itself has no labels. bandwidth is for
// bringing them, in bytes per second; 0: no limit.
func prefetched(spec *v1alpha1.Spec) (images []string, bandwidth int64) {
	if q := spec.NodeCache.PrefetchBandwidth; q != nil {
		bandwidth = q.Value()
	}
	for _, m := range spec.Mirrors {
		for _, p := range m.Prefetch {
			if len(p.NodeSelector) > 0 {
				continue
			}
			for _, image := range p.Images {
				images = append(images, m.Registry+"/"+image)
			}
		}
	}
	return images, bandwidth
}

// mirrors are the registries that nodes are to ask us for first.
func mirrors(spec *v1alpha1.Spec, source *syncer.Source) []agent.Mirror {
	var all []agent.Mirror
	for _, m := range syncer.NodeMirrors(spec, source) {
		mirror := agent.Mirror{
			Registry:     m.Registry,
			TagsUpstream: m.ResolveTags != nil && !*m.ResolveTags,
			NoFallback:   m.Fallback != nil && !*m.Fallback,
			Server:       m.Server,
		}
		if m.CA != "" {
			mirror.ServerCA = source.Bundle
		}
		all = append(all, mirror)
	}
	return all
}
