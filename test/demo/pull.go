package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The hops that can answer containerd.
const (
	hopCache    = "cache"
	hopRegistry = "registry"
	hopUpstream = "upstream"
)

// source is where the bytes of an answer were read.
type source string

const (
	fromDisk     source = "the cache's disk"
	viaRegistry  source = "the registry"
	fromUpstream source = "the upstream"
)

// node pulls as a node does: through containerd's own resolver, by whatever
// hosts.toml the agent has written into certsDir.
type node struct {
	certsDir string
	hopOf    map[string]string // by the host[:port] that answered
}

// pulled says what one pull fetched and where it came from.
type pulled struct {
	Bytes   int64
	Digests int
	Time    time.Duration
	By      map[string]int64 // bytes by the hop that answered
	From    map[source]int64 // bytes by where they were read
}

// check wants by to have answered everything, and most of the bytes to have
// been read in one place; empty: in any.
func (p pulled) check(by string, most source) error {
	for hop, n := range p.By {
		if hop != by {
			return fmt.Errorf("%d bytes were answered by %s, expected %s", n, hop, by)
		}
	}
	if most != "" && 2*p.From[most] < p.Bytes {
		return fmt.Errorf("%d of %d bytes came from %s, expected most of them", p.From[most], p.Bytes, most)
	}
	return nil
}

// pull resolves ref and fetches one platform of it with everything below,
// verifying every digest, and the signature attached to it.
func (n *node) pull(ctx context.Context, ref, platform string) (pulled, error) {
	start := time.Now()
	seen := &recorder{hopOf: n.hopOf, last: map[digest.Digest]answer{}, by: map[string]int64{}, from: map[source]int64{}}
	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts: config.ConfigureHosts(ctx, config.HostOptions{
			HostDir: config.HostDirFromRoot(n.certsDir),
			// A fresh transport for each pull: a connection kept alive over
			// a stopped server would blur which hop is there.
			UpdateClient: func(c *http.Client) error {
				c.Transport = &recordingTransport{next: c.Transport, seen: seen}
				return nil
			},
		}),
	})
	name, root, err := resolver.Resolve(ctx, ref)
	if err != nil {
		return pulled{}, fmt.Errorf("resolving %s: %w", ref, err)
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return pulled{}, fmt.Errorf("pulling %s: %w", ref, err)
	}
	w := &walk{fetcher: fetcher, platform: platform, seen: seen}
	if err := w.fetchTree(ctx, root); err != nil {
		return pulled{}, fmt.Errorf("pulling %s: %w", ref, err)
	}
	return pulled{Bytes: w.bytes, Digests: w.digests, Time: time.Since(start), By: seen.by, From: seen.from}, nil
}

// walk fetches a tree of descriptors, children after parents.
type walk struct {
	fetcher  remotes.Fetcher
	platform string
	seen     *recorder
	bytes    int64
	digests  int
}

func (w *walk) fetchTree(ctx context.Context, d ocispec.Descriptor) error {
	data, err := w.fetch(ctx, d)
	if err != nil {
		return err
	}
	var m struct {
		Manifests []ocispec.Descriptor `json:"manifests"`
		Config    *ocispec.Descriptor  `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return fmt.Errorf("reading manifest %s: %w", d.Digest, err)
	}
	for _, child := range m.Manifests {
		if child.Platform == nil || child.Platform.OS+"/"+child.Platform.Architecture == w.platform {
			if err := w.fetchTree(ctx, child); err != nil {
				return err
			}
		}
	}
	blobs := m.Layers
	if m.Config != nil {
		blobs = append([]ocispec.Descriptor{*m.Config}, blobs...)
	}
	for _, blob := range blobs {
		if _, err := w.fetch(ctx, blob); err != nil {
			return err
		}
	}
	return nil
}

// fetch reads one descriptor to its end. Manifests are returned; of blobs only
// the digest is wanted, and they are not kept in memory.
func (w *walk) fetch(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	body, err := w.fetcher.Fetch(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("fetching %s: %w", d.Digest, err)
	}
	defer body.Close()
	verifier := d.Digest.Verifier()
	var kept strings.Builder
	sink := io.Writer(verifier)
	if isManifest(d.MediaType) {
		sink = io.MultiWriter(verifier, &kept)
	}
	n, err := io.Copy(sink, io.LimitReader(body, d.Size+1))
	if err != nil {
		return nil, fmt.Errorf("fetching %s: %w", d.Digest, err)
	}
	if n != d.Size || !verifier.Verified() {
		return nil, fmt.Errorf("fetching %s: %d bytes that are not those of the digest (%d expected)", d.Digest, n, d.Size)
	}
	w.bytes += n
	w.digests++
	w.seen.count(d.Digest, n)
	return []byte(kept.String()), nil
}

func isManifest(mediaType string) bool {
	return strings.Contains(mediaType, "manifest") || strings.Contains(mediaType, "index")
}

// answer says who answered, and where the bytes were read.
type answer struct {
	by   string
	from source
}

// recorder learns who answered for each digest.
type recorder struct {
	hopOf map[string]string

	mu   sync.Mutex
	last map[digest.Digest]answer // the last 2xx
	by   map[string]int64
	from map[source]int64
}

func (r *recorder) answered(d digest.Digest, host, cacheStatus string) {
	a := answer{by: r.hopOf[host]}
	switch {
	case a.by == hopUpstream:
		a.from = fromUpstream
	case a.by == hopCache && strings.Contains(cacheStatus, "; hit"):
		a.from = fromDisk
	default:
		a.from = viaRegistry
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last[d] = a
}

func (r *recorder) count(d digest.Digest, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.last[d]
	r.by[a.by] += n
	r.from[a.from] += n
}

// recordingTransport notes who answered GET requests for content by digest.
type recordingTransport struct {
	next http.RoundTripper
	seen *recorder
}

// RoundTrip implements http.RoundTripper.
func (t *recordingTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.next.RoundTrip(req)
	if err != nil || req.Method != http.MethodGet || resp.StatusCode >= 300 {
		return resp, err
	}
	d, err := digest.Parse(req.URL.Path[strings.LastIndex(req.URL.Path, "/")+1:])
	if err != nil {
		return resp, nil //nolint:nilerr // the last element is a tag: no content is counted for it
	}
	t.seen.answered(d, req.URL.Host, resp.Header.Get("Cache-Status"))
	return resp, nil
}
