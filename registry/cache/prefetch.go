package cache

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/time/rate"
)

// Prefetch brings images into the cache, one after the other, and returns when
// all that is missing of them is there: of an image for several platforms, what
// this node would run. An image is named as in a pod, "registry/repository:tag"
// or "registry/repository@digest", and its registry is one of those that the
// cache answers for. bandwidth bounds what the blobs take from the upstreams, in
// bytes per second, as long as no client waits for them; 0 is no bound.
//
// What is read is what anybody may read, or the node with
// [Config].NodeCredential. It opens nothing to anybody: clients are asked about
// as ever.
//
// The error joins those of the images that are not complete.
func (c *Cache) Prefetch(ctx context.Context, images []string, bandwidth int64) error {
	return errors.Join(c.prefetchAll(ctx, images, bandwidth)...)
}

// prefetchAll returns an error for each image that is not complete.
func (c *Cache) prefetchAll(ctx context.Context, images []string, bandwidth int64) (failed []error) {
	if !c.enter() {
		return []error{errors.New("prefetching: the cache is not running")}
	}
	defer c.requests.Done()
	p := prefetch{cache: c, disk: c.disk.Load()}
	if bandwidth > 0 {
		p.limit = rate.NewLimiter(rate.Limit(bandwidth), fillChunk)
	}
	for _, name := range images {
		if err := p.image(ctx, name); err != nil {
			failed = append(failed, fmt.Errorf("prefetching %s: %w", name, err))
		}
	}
	return failed
}

// patient reports whether nobody waits for what is asked.
func (rq *request) patient() bool { return rq.limit != nil }

type prefetch struct {
	cache *Cache
	disk  *disk
	limit *rate.Limiter // nil: none
}

// manifestTypes are those that are asked for.
var manifestTypes = []string{
	ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex,
	"application/vnd.docker.distribution.manifest.v2+json",
	"application/vnd.docker.distribution.manifest.list.v2+json",
}

// parseImage reads "registry/repository[:tag][@digest]".
func parseImage(name string) (host string, rt route, err error) {
	rest, d, pinned := strings.Cut(name, "@")
	host, rest, _ = strings.Cut(rest, "/")
	repo, tag, tagged := strings.Cut(rest, ":")
	if !tagged {
		tag = "latest"
	}
	rt = route{kind: kindManifest, repo: repo, tag: tag}
	if pinned {
		rt.tag, rt.digest = "", digest.Digest(d)
	}
	if host == "" || !validRepository(repo) || !validTag(tag) || pinned && rt.digest.Validate() != nil {
		return "", route{}, errors.New("not of the form registry/repository:tag or registry/repository@digest")
	}
	return host, rt, nil
}

func (p *prefetch) image(ctx context.Context, name string) error {
	host, rt, err := parseImage(name)
	if err != nil {
		return err
	}
	reg := (*p.cache.registries.Load())[strings.ToLower(host)]
	if reg == nil {
		return fmt.Errorf("the cache does not answer for %s", host)
	}
	rq := p.request(reg, rt, "")
	var m *manifest
	err = p.authorized(ctx, &rq, func() (err error) {
		m, err = p.manifest(ctx, rq)
		return err
	})
	if err != nil {
		return err
	}
	return p.content(ctx, rq, m)
}

// authorized does what rq is for, and once more with credentials in rq if the
// registry asks for some: at first, or since those of rq have run out.
func (p *prefetch) authorized(ctx context.Context, rq **request, do func() error) error {
	err := do()
	var no *refusal
	if !errors.As(err, &no) || no.status != http.StatusUnauthorized {
		return err
	}
	auth, err := p.authorize(ctx, *rq, no.challenges)
	if err != nil {
		return err
	}
	*rq = p.request((*rq).registry, (*rq).route, auth)
	return do()
}

func (p *prefetch) request(reg *registry, rt route, auth string) *request {
	rq := &request{
		target:   target{route: rt, host: reg.host, reader: p.disk.key.reader(reg.host, rt.repo, "")},
		registry: reg, disk: p.disk, faults: &p.cache.faults, pseudonym: p.cache.pseudonym,
		header: http.Header{"Accept": manifestTypes}, limit: p.limit,
	}
	rq.setAuth(auth)
	if rt.digest != "" {
		rq = rq.about(rt.digest)
	}
	return rq
}

// manifest brings the manifest of rq.
func (p *prefetch) manifest(ctx context.Context, rq *request) (*manifest, error) {
	budget := p.cache.cfg.Timeouts.Headers
	if rq.tag != "" {
		d, err := p.cache.resolve(ctx, rq, budget)
		if err != nil {
			return nil, err
		}
		p.cache.noteTag(rq, d)
		rq = rq.about(d)
	} else if _, err := p.cache.permit(ctx, rq); err != nil {
		return nil, err
	}
	m, _, err := p.cache.manifestNow(ctx, rq, budget)
	return m, err
}

// content brings what m refers to.
func (p *prefetch) content(ctx context.Context, rq *request, m *manifest) error {
	var refers struct {
		Manifests []ocispec.Descriptor
		Config    *ocispec.Descriptor
		Layers    []ocispec.Descriptor
	}
	if err := json.Unmarshal(m.body, &refers); err != nil {
		return fmt.Errorf("reading manifest %s: %w", m.digest, err)
	}
	if len(refers.Manifests) > 0 {
		child, err := ofThisNode(refers.Manifests)
		if err != nil {
			return err
		}
		if m, err = p.manifest(ctx, rq.about(child)); err != nil {
			return err
		}
		refers.Manifests = nil
		if err := json.Unmarshal(m.body, &refers); err != nil {
			return fmt.Errorf("reading manifest %s: %w", m.digest, err)
		}
		if len(refers.Manifests) > 0 {
			return fmt.Errorf("%s is an index within an index", m.digest)
		}
	}
	blobs := refers.Layers
	if refers.Config != nil {
		blobs = append(blobs, *refers.Config)
	}
	for _, b := range blobs {
		err := p.authorized(ctx, &rq, func() error { return p.blob(ctx, rq, b.Digest) })
		if err != nil {
			return fmt.Errorf("blob %s: %w", b.Digest, err)
		}
	}
	return nil
}

// ofThisNode chooses among the images of an index as containerd does.
func ofThisNode(all []ocispec.Descriptor) (digest.Digest, error) {
	match := platforms.Default()
	var best *ocispec.Descriptor
	for i, d := range all {
		if d.Platform == nil || !match.Match(*d.Platform) {
			continue
		}
		if best == nil || match.Less(*d.Platform, *best.Platform) {
			best = &all[i]
		}
	}
	if best == nil || best.Digest.Validate() != nil {
		return "", fmt.Errorf("it has no image for %s", platforms.DefaultString())
	}
	return best.Digest, nil
}

// blob brings one blob, unless the node has it.
func (p *prefetch) blob(ctx context.Context, rq *request, d digest.Digest) error {
	if d.Validate() != nil {
		return errors.New("not a digest")
	}
	of := *rq
	of.kind = kindBlob
	rq = of.about(d)
	var err error
	for range 2 + len(rq.registry.upstreams) {
		if p.disk.store.has(d) {
			p.disk.store.touch(d) // what is wanted is not evicted before the rest
			return nil
		}
		if _, ok := p.disk.content.size(ctx, d); ok {
			return nil
		}
		var f *fill
		f, _, err = p.cache.startFill(rq)
		if errors.Is(err, errAgain) {
			continue
		}
		if err != nil {
			return err
		}
		err = f.awaitEnd(ctx)
		if rq.patient() {
			f.hurry()
		}
		f.leave(p.cache.cfg.Timeouts.Unread)
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
	return err
}

// authorize returns what to say to a registry that asks for credentials: the
// node's own, or a token that its token service gives for them, or for none
// (distribution, "Token Authentication Specification").
func (p *prefetch) authorize(ctx context.Context, rq *request, challenges []string) (string, error) {
	user, password := "", ""
	if credential := p.cache.cfg.NodeCredential; credential != nil {
		user, password = credential(rq.host)
	}
	basic := ""
	if user != "" {
		basic = "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
	}
	for _, challenge := range challenges {
		scheme, params, _ := strings.Cut(challenge, " ")
		switch {
		case strings.EqualFold(scheme, "Basic") && basic != "":
			return basic, nil
		case strings.EqualFold(scheme, "Bearer"):
			return p.token(ctx, rq, challengeParams(params), &tokenRequest{
				auth: basic, credential: p.disk.key.fact("credential", rq.host, "password", user, password),
			})
		}
	}
	return "", errors.New("the registry asks for credentials, of which this node has none: let everybody read it (anonymousPull), or name it in a workload by one of the registry's own names (nodeCache.prefetchWorkloads)")
}

// challengeParams reads the parameters of a challenge (RFC 9110, section 11.2).
func challengeParams(s string) map[string]string {
	params := make(map[string]string)
	for s != "" {
		name, rest, ok := strings.Cut(s, "=")
		if !ok {
			break
		}
		var value string
		if quoted, found := strings.CutPrefix(rest, `"`); found {
			value, s, _ = strings.Cut(quoted, `"`)
			_, s, _ = strings.Cut(s, ",")
		} else {
			value, s, _ = strings.Cut(rest, ",")
		}
		params[strings.ToLower(strings.TrimSpace(name))] = strings.TrimSpace(value)
	}
	return params
}

// token asks for q the token service that a challenge names.
func (p *prefetch) token(ctx context.Context, rq *request, challenge map[string]string, q *tokenRequest) (string, error) {
	reg := rq.registry
	realm, err := url.Parse(challenge["realm"])
	up := reg.upstreams[0][len(reg.upstreams[0])-1]
	if err != nil || realm.Host == "" || realm.Scheme != "https" && realm.Scheme != up.base.Scheme {
		return "", errors.New("the registry names no token service that can be used")
	}
	reg.tokens.Store(&tokenService{realm, up})
	q.query = url.Values{"service": {challenge["service"]}, "scope": {"repository:" + rq.repo + ":pull"}}
	status, body, err := p.cache.forwardToken(ctx, reg, q)
	if err != nil {
		return "", err
	}
	if status != http.StatusOK {
		return "", fmt.Errorf("the token service %s answered %d and no token", realm.Host, status)
	}
	// So that what this token may read is known of the next one as well.
	if err := p.disk.rememberToken(reg, q.credential, body); err != nil {
		return "", err
	}
	var answer struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return "", fmt.Errorf("reading the answer of the token service %s: %w", realm.Host, err)
	}
	return "Bearer " + cmp.Or(answer.Token, answer.AccessToken), nil
}
