package cache

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Config is what a Cache needs to know. Dir and Registries are required.
type Config struct {
	// Dir holds everything that is kept. It is created if missing and belongs to
	// one running Cache at a time; files in it that are not the cache's are
	// left alone.
	Dir string

	// MaxSize bounds the stored bytes; the least recently used blobs go first.
	// 0: bounded by MinFreeDisk only.
	MaxSize int64

	// MinFreeDisk is the number of bytes that are kept free on Dir's file
	// system. 0: none are, and the store may fill it.
	MinFreeDisk int64

	// ContentStore is the path of containerd's socket. Whole blobs and manifests
	// that containerd has in its namespace k8s.io are served from there, to those
	// who may read them, and not kept a second time. "": it is not asked.
	ContentStore string

	// Registries are the registries answered for, by the host (with port, if
	// any) that image references name: the value of "?ns=". Any other is
	// refused at once with 404. A request without ns is taken for the only
	// registry if there is exactly one.
	Registries map[string]Registry

	// Timeouts bound every wait for an upstream. The zero value means the
	// defaults that its fields document.
	Timeouts Timeouts

	// AllowedTTL is how long an upstream's permission for one credential to
	// read one repository spares asking again. 0: 5 minutes.
	AllowedTTL time.Duration

	// MemberTTL is how long an upstream's word that a blob belongs to a
	// repository spares asking again. 0: 1 hour.
	MemberTTL time.Duration

	// OfflineTTL bounds the age of both while no upstream can be reached. An
	// age is counted from the upstream's last word. 0: 30 days.
	OfflineTTL time.Duration

	// Listener is served by Run, which closes it. It should be a TCP listener
	// on loopback: anything wrapped around its connections costs sendfile, and
	// the short way for requests that are repeated.
	// nil: Run does the background work only, and the Cache is served as an
	// http.Handler by whoever made it.
	Listener net.Listener

	// NodeCredential returns the node's own credentials at a registry, for
	// Prefetch; an empty user means none. nil: there are none.
	NodeCredential func(host string) (user, password string)

	// Peer lets nodes take blobs from one another. nil: they do not.
	Peer *PeerConfig

	// Logger receives what an operator should know; no credential is ever
	// logged. nil: slog.Default().
	Logger *slog.Logger

	// Metrics is where the collectors are registered. nil: nowhere.
	Metrics prometheus.Registerer

	// Now is the clock by which the ages above are counted. nil: time.Now.
	Now func() time.Time
}

// Registry says how one registry is reached.
type Registry struct {
	// Upstreams are asked in order, each next one when those before it are
	// unreachable, fail, or do not have the content; a transfer that breaks
	// continues with the next. At least one is required.
	Upstreams []Upstream

	// TagsUpstream refuses requests by tag with 404, so that containerd
	// resolves tags with the registry itself and only content comes from here.
	TagsUpstream bool
}

// Upstream is one server to fetch from.
type Upstream struct {
	// URL is "https://host[:port]", or "http://…" where the network is trusted.
	URL string

	// Endpoints are addresses, host:port, of servers that each have all of the
	// upstream's content, such as the replicas behind a Service. They are asked
	// in place of the address in URL, the healthier and quicker ones first, and
	// that address when they fail; name and certificate stay those of URL.
	// None: the address in URL alone.
	Endpoints []string

	// CAFile names a PEM bundle of the authorities that may sign the
	// upstream's certificate. It is read again whenever it changes; while it
	// cannot be read or is not a bundle, the last good one stays. "": the
	// system's authorities.
	CAFile string

	// Namespace is sent as "?ns=", so that an upstream which stands for
	// several registries knows which one is meant. "": the registry host that
	// the client named.
	Namespace string

	// WithoutCredentials keeps the client's Authorization from this upstream:
	// for an upstream whose credentials are not those of the registry.
	WithoutCredentials bool
}

// Timeouts bound the waits for upstreams. A zero field means its default.
type Timeouts struct {
	// Dial bounds connecting, TLS included. 0: 1 second.
	Dial time.Duration

	// Headers bounds a request until the headers of the answer that is used,
	// over all upstreams together, and so the wait that the cache can add
	// to a pull: with what else takes time, no more than 2 seconds. Whatever
	// let somebody wait for so long is not waited for again until it answers.
	// 0: 1.8 seconds.
	Headers time.Duration

	// Tag bounds the same for a tag whose last known manifest could be served
	// instead. 0: 1 second.
	Tag time.Duration

	// Stall is the time in which a body must bring Stall × MinRate bytes, or
	// its upstream is given up. It should be less than Headers, so that a body
	// that never begins is refused within that. 0: 1.5 seconds.
	Stall time.Duration

	// MinRate is in bytes per second. 0: 4096.
	MinRate int64

	// Unread is how long a download goes on once its last reader has left.
	// 0: 5 minutes.
	Unread time.Duration

	// Retry is for how long an upstream that failed is asked after others of the
	// same content, and containerd not at all. 0: 5 seconds.
	Retry time.Duration

	// Peer bounds the wait for another node to say whether it has a blob, and
	// three times of it the wait for one that is receiving the blob itself: a
	// lost node should not be noticed. 0: 300 milliseconds.
	Peer time.Duration

	// Hedge is the least time after which a request for a manifest, or a HEAD, is
	// made a second time, to another endpoint where there is one, and the
	// first answer taken. What an upstream usually takes is waited for in any
	// case. 0: 100 milliseconds.
	Hedge time.Duration
}

// withDefaults returns cfg with every zero field replaced by its default.
func (cfg Config) withDefaults() Config {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&cfg.AllowedTTL, 5*time.Minute)
	def(&cfg.MemberTTL, time.Hour)
	def(&cfg.OfflineTTL, 30*24*time.Hour)
	t := &cfg.Timeouts
	def(&t.Dial, time.Second)
	def(&t.Headers, 1800*time.Millisecond)
	def(&t.Tag, time.Second)
	def(&t.Stall, 1500*time.Millisecond)
	def(&t.Unread, 5*time.Minute)
	def(&t.Retry, 5*time.Second)
	def(&t.Peer, 300*time.Millisecond)
	def(&t.Hedge, 100*time.Millisecond)
	if t.MinRate == 0 {
		t.MinRate = 4096
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return cfg
}

// validate names the first field that is wrong.
func (cfg Config) validate() error {
	if cfg.Dir == "" {
		return errors.New("cache: Dir is empty: name the directory to store in")
	}
	for name, n := range map[string]int64{
		"MaxSize":          cfg.MaxSize,
		"MinFreeDisk":      cfg.MinFreeDisk,
		"AllowedTTL":       int64(cfg.AllowedTTL),
		"MemberTTL":        int64(cfg.MemberTTL),
		"OfflineTTL":       int64(cfg.OfflineTTL),
		"Timeouts.Dial":    int64(cfg.Timeouts.Dial),
		"Timeouts.Headers": int64(cfg.Timeouts.Headers),
		"Timeouts.Tag":     int64(cfg.Timeouts.Tag),
		"Timeouts.Stall":   int64(cfg.Timeouts.Stall),
		"Timeouts.MinRate": cfg.Timeouts.MinRate,
		"Timeouts.Unread":  int64(cfg.Timeouts.Unread),
		"Timeouts.Retry":   int64(cfg.Timeouts.Retry),
		"Timeouts.Peer":    int64(cfg.Timeouts.Peer),
		"Timeouts.Hedge":   int64(cfg.Timeouts.Hedge),
	} {
		if n < 0 {
			return fmt.Errorf("cache: %s is negative: use 0 for its default", name)
		}
	}
	if err := cfg.Peer.validate(); err != nil {
		return err
	}
	return validateRegistries(cfg.Registries)
}

func validateRegistries(registries map[string]Registry) error {
	if len(registries) == 0 {
		return errors.New("cache: Registries is empty: name at least one registry to answer for")
	}
	for host, reg := range registries {
		if host == "" || host != strings.ToLower(host) || strings.ContainsAny(host, "/?#@ ") {
			return fmt.Errorf("cache: registry %q is not a host in lower case, with its port if it has one", host)
		}
		if len(reg.Upstreams) == 0 {
			return fmt.Errorf("cache: registry %s has no upstream: name at least one", host)
		}
		for _, up := range reg.Upstreams {
			if _, err := up.parse(); err != nil {
				return fmt.Errorf("cache: registry %s: %w", host, err)
			}
			for _, address := range up.Endpoints {
				if _, _, err := net.SplitHostPort(address); err != nil {
					return fmt.Errorf("cache: registry %s: endpoint %q is not host:port", host, address)
				}
			}
		}
	}
	return nil
}

// parse returns the base URL of the upstream, without a path.
func (up Upstream) parse() (*url.URL, error) {
	u, err := url.Parse(up.URL)
	switch {
	case err != nil:
		return nil, fmt.Errorf("upstream URL: %w", err)
	case u.User != nil:
		return nil, fmt.Errorf("upstream URL of %s has credentials in it: leave them out", u.Host)
	case u.Scheme != "https" && u.Scheme != "http", u.Host == "", u.Opaque != "",
		strings.Trim(u.Path, "/") != "", u.RawQuery != "", u.Fragment != "":
		return nil, fmt.Errorf("upstream URL %q is not https://host[:port]", up.URL)
	}
	return &url.URL{Scheme: u.Scheme, Host: strings.ToLower(u.Host)}, nil
}
