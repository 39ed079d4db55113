package trust

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// DefaultHost is the name of the directory that containerd reads for every
// registry that has none of its own.
const DefaultHost = "_default"

// Capabilities of a hop, as containerd names them. "referrers" is left out on
// purpose: containerd 1.7 refuses a whole file that names it.
const (
	Pull    = "pull"
	Resolve = "resolve"
	Push    = "push"
)

// Hop is one registry that containerd asks.
type Hop struct {
	// URL is scheme and host, with a path only if the registry's API lives
	// below one, e.g. "http://127.0.0.1:5050".
	URL string
	// CA names a file of CA certificates in the same directory. Empty: the
	// system's roots alone.
	CA string
	// Capabilities are any of Pull, Resolve and Push. Empty: all that
	// containerd knows, referrers included.
	Capabilities []string
	// DialTimeout bounds connecting, in containerd 2.0.7, 2.1 and later.
	// Zero: containerd's own 30 seconds.
	DialTimeout time.Duration
}

// ServerRole says what [Hosts.Server] is to an operator's own configuration of
// the same registry, when both must live in one file.
type ServerRole int

const (
	// ServerUpstream: where the registry really is. An operator's own server
	// takes its place.
	ServerUpstream ServerRole = iota
	// ServerOwn: the connected registry itself, which must be asked; an
	// operator's own server stays after it.
	ServerOwn
	// ServerOnly: nothing else may be asked at the end; an operator's own
	// server is set aside.
	ServerOnly
)

// Hosts is what one hosts.toml says: the hops in the order in which they are
// asked, then the server.
type Hosts struct {
	// Registry is the host[:port] as image references name it, or DefaultHost.
	Registry string
	// Hops are asked first, in this order.
	Hops []Hop
	// Server is asked last. A zero URL: the registry itself as containerd
	// derives it from Registry; CA then applies to that.
	Server Hop
	// Role of Server beside an operator's own. Zero: ServerUpstream.
	Role ServerRole
}

const (
	// Marker begins every hosts.toml of ours.
	Marker = "# Written by connected-registry."
	header = Marker + ` Changes to this file are undone;
# "connected-registry agent cleanup" puts back what was here before.
`
)

// Render returns the bytes of the hosts.toml. Errors name the field that
// containerd would not take.
//
// The format is containerd's docs/hosts.md. Hops are always tables, since
// containerd 2.3 ignores the inline form, and there is always a host table,
// since containerd 1.7 ignores a file without one.
func (h Hosts) Render() ([]byte, error) {
	if err := h.validate(); err != nil {
		return nil, err
	}
	var b strings.Builder
	b.WriteString(header)
	b.WriteString(h.renderServer())
	if len(h.Hops) == 0 {
		b.WriteString("\n[host]\n")
	}
	b.WriteString(h.renderHops())
	return []byte(b.String()), nil
}

func (h Hosts) renderServer() string {
	var b strings.Builder
	if h.Server.URL != "" {
		fmt.Fprintf(&b, "\nserver = %s\n", tomlString(h.Server.URL))
	} else if h.Server.CA != "" {
		b.WriteString("\n")
	}
	h.Server.renderFields(&b, "")
	return b.String()
}

func (h Hosts) renderHops() string {
	var b strings.Builder
	for _, hop := range h.Hops {
		fmt.Fprintf(&b, "\n[host.%s]\n", tomlString(hop.URL))
		hop.renderFields(&b, "  ")
	}
	return b.String()
}

func (h Hop) renderFields(b *strings.Builder, indent string) {
	if len(h.Capabilities) > 0 {
		quoted := make([]string, len(h.Capabilities))
		for i, c := range h.Capabilities {
			quoted[i] = tomlString(c)
		}
		fmt.Fprintf(b, "%scapabilities = [%s]\n", indent, strings.Join(quoted, ", "))
	}
	if h.CA != "" {
		fmt.Fprintf(b, "%sca = %s\n", indent, tomlString(h.CA))
	}
	if h.DialTimeout > 0 {
		fmt.Fprintf(b, "%sdial_timeout = %s\n", indent, tomlString(h.DialTimeout.String()))
	}
}

// tomlString quotes what validate has let pass: printable ASCII without quotes
// or backslashes.
func tomlString(s string) string { return `"` + s + `"` }

func (h Hosts) validate() error {
	if h.Registry != DefaultHost {
		if _, _, err := ParseHost(h.Registry); err != nil {
			return err
		}
	}
	seen := make(map[string]bool)
	for i, hop := range h.Hops {
		if err := hop.validate(); err != nil {
			return fmt.Errorf("host %d: %w", i+1, err)
		}
		if seen[hop.URL] {
			return fmt.Errorf("host %q is listed twice: containerd would ignore the whole file", hop.URL)
		}
		seen[hop.URL] = true
	}
	if h.Server.URL == "" {
		if len(h.Server.Capabilities) > 0 || h.Server.DialTimeout != 0 {
			return errors.New("server: capabilities and dial timeout need a URL")
		}
		return checkCAName(h.Server.CA)
	}
	if err := h.Server.validate(); err != nil {
		return fmt.Errorf("server: %w", err)
	}
	return nil
}

func (h Hop) validate() error {
	u, err := ParseURL(h.URL)
	if err != nil {
		return err
	}
	if u.Scheme == "http" && h.CA != "" {
		return errors.New("a CA with http makes containerd try https first: use https or leave the CA out")
	}
	for _, c := range h.Capabilities {
		if !slices.Contains([]string{Pull, Resolve, Push}, c) {
			return fmt.Errorf("capability %q: use pull, resolve or push", c)
		}
	}
	if h.DialTimeout < 0 {
		return fmt.Errorf("dial timeout %s: must not be negative", h.DialTimeout)
	}
	return checkCAName(h.CA)
}

var caName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]*\.(crt|pem)$`)

func checkCAName(name string) error {
	if name != "" && !caName.MatchString(name) {
		return fmt.Errorf("CA file %q: give a plain file name that ends in .crt or .pem", name)
	}
	return nil
}

// ParseURL checks the URL of a registry: http or https, a host that ParseHost
// takes, at most a clean path, nothing else. Errors never repeat a password.
func ParseURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("URL does not parse: give scheme://host[:port]")
	}
	switch {
	case u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || u.Opaque != "":
		return nil, errors.New("URL: give scheme://host[:port][/path] without user, query and fragment")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("URL %.200q: must begin with http:// or https://", s)
	case u.Path != "" && (path.Clean(u.Path) != u.Path || !urlPath.MatchString(u.Path)):
		return nil, fmt.Errorf("URL %.200q: the path must be clean and plain", s)
	}
	if _, _, err := ParseHost(u.Host); err != nil {
		return nil, err
	}
	// What was parsed must be what is written into the file.
	if u.Scheme+"://"+u.Host+u.Path != s {
		return nil, fmt.Errorf("URL %.200q: write it plainly, in lower-case scheme and without escapes", s)
	}
	return u, nil
}

var (
	urlPath   = regexp.MustCompile(`^(/[A-Za-z0-9._-]+)+$`)
	dnsLabels = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*$`)
)

// ParseHost takes a registry's host[:port] as image references spell it: a DNS
// name, an IPv4 address or an IPv6 address in brackets, and a port from 1 to
// 65535. It returns the host without brackets, and the port, empty when there
// is none. Whatever it takes is safe as the name of a directory.
//
// The grammar is that of "domain" in the distribution reference grammar.
func ParseHost(s string) (host, port string, err error) {
	bad := func(why string) (string, string, error) {
		return "", "", fmt.Errorf("registry host %.100q: %s", s, why)
	}
	if strings.ContainsAny(s, `/\`) {
		return bad("give host[:port], without scheme and path")
	}
	host = s
	bracketed := strings.HasPrefix(s, "[")
	if i := strings.LastIndexByte(s, ':'); i >= 0 && !(bracketed && strings.HasSuffix(s, "]")) {
		host, port = s[:i], s[i+1:]
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || port != strconv.FormatUint(n, 10) {
			return bad("the port must be a number from 1 to 65535")
		}
	}
	if bracketed {
		if !strings.HasSuffix(host, "]") {
			return bad("an IPv6 address is written [address]:port")
		}
		host = host[1 : len(host)-1]
		if addr, err := netip.ParseAddr(host); err != nil || !addr.Is6() || addr.Zone() != "" {
			return bad("not an IPv6 address in the brackets")
		}
		return host, port, nil
	}
	switch {
	case host == "":
		return bad("give host[:port]")
	case strings.Contains(host, ":"):
		return bad("an IPv6 address needs brackets: [address]:port")
	case len(host) > 253 || !dnsLabels.MatchString(host) || slices.ContainsFunc(strings.Split(host, "."), func(l string) bool { return len(l) > 63 }):
		return bad("give a DNS name or an IP address")
	}
	return host, port, nil
}

// DirectoryNames are the names under which containerd looks for a registry's
// directory, in its order; the first that exists is the only one it reads.
// DefaultHost, which it reads when none exists, is not among them.
//
// The rule is hostPaths in containerd's core/remotes/docker/config, which cuts
// at the last colon, also when that belongs to an IPv6 address.
func DirectoryNames(registry string) []string {
	if i := strings.LastIndexByte(registry, ':'); i > 0 {
		return []string{registry[:i] + "_" + registry[i+1:] + "_", registry}
	}
	return []string{registry}
}

// HTTPS returns the https URL of a registry host.
func HTTPS(host string) string { return "https://" + host }
