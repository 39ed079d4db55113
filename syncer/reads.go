package syncer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// ping asks for nothing but an answer, so that a parent that is not there, or
// not trusted, is found out once and at once. What it answers does not matter:
// registries differ here, and the questions that follow will tell.
func (p *parent) ping(ctx context.Context) error {
	_, err := p.ask(ctx, question{method: http.MethodGet, path: "/v2/", what: "/v2/", max: 1 << 20})
	if f, ok := errors.AsType[*fault](err); ok && f.status != 0 && !f.temporary {
		return nil
	}
	return err
}

// resolve asks what a tag stands for, with a HEAD and, of a parent whose answer
// to that names no digest, with a GET, unless the entity tag is the one that is
// known from before. The result's etag is empty when there is nothing to remember.
func (p *parent) resolve(ctx context.Context, repository, tag string, before known) (known, error) {
	what := repository + ":" + tag
	q := question{
		method: http.MethodHead,
		path:   "/v2/" + repository + "/manifests/" + tag,
		accept: acceptManifests,
		scope:  repositoryScope(repository),
		what:   what,
		max:    p.limits.manifest,
	}
	a, err := p.ask(ctx, q)
	switch f, _ := errors.AsType[*fault](err); {
	case f != nil && f.status == http.StatusMethodNotAllowed: // it does not do HEAD
	case err != nil:
		return known{}, err
	default:
		if d, err := digest.Parse(a.header.Get("Docker-Content-Digest")); err == nil {
			d, err = p.supported(d, what)
			return known{digest: d}, err
		}
		if etag := a.header.Get("ETag"); etag != "" && etag == before.etag {
			return before, nil
		}
	}
	q.method, q.known = http.MethodGet, before.etag
	a, err = p.ask(ctx, q)
	if f, ok := errors.AsType[*fault](err); ok && f.status == http.StatusNotModified && before.etag != "" {
		return before, nil
	}
	if err != nil {
		return known{}, err
	}
	if _, err := p.manifestOf(a, what); err != nil {
		return known{}, err
	}
	return known{a.header.Get("ETag"), digest.FromBytes(a.body)}, nil
}

func (p *parent) supported(d digest.Digest, what string) (digest.Digest, error) {
	if d.Algorithm() != digest.SHA256 {
		return "", unusable(p.String(), what, "its digest is %s, and only sha256 can be stored", d.Algorithm())
	}
	return d, nil
}

// manifest fetches a manifest by its digest, and checks that it is what it is
// called.
func (p *parent) manifest(ctx context.Context, repository string, d digest.Digest) (manifest, error) {
	what := repository + "@" + d.String()
	a, err := p.ask(ctx, question{
		method: http.MethodGet,
		path:   "/v2/" + repository + "/manifests/" + d.String(),
		accept: acceptManifests,
		scope:  repositoryScope(repository),
		what:   what,
		max:    p.limits.manifest,
	})
	if err != nil {
		return manifest{}, err
	}
	if actual := d.Algorithm().FromBytes(a.body); actual != d {
		if isHTML(a.header) {
			return manifest{}, unusable(p.String(), what, "it is a web page: is something between here and the parent that wants a login?")
		}
		return manifest{}, unusable(p.String(), what, "its digest is %s", actual)
	}
	return p.manifestOf(a, what)
}

func (p *parent) manifestOf(a answer, what string) (manifest, error) {
	if isHTML(a.header) {
		return manifest{}, unusable(p.String(), what, "it is a web page: is something between here and the parent that wants a login?")
	}
	m, err := parseManifest(a.header.Get("Content-Type"), a.body)
	if err != nil {
		return manifest{}, unusable(p.String(), what, "%s", oneLine(err.Error()))
	}
	return m, nil
}

// pageSize is how many names are asked for at once. Amazon's registry takes no
// more.
const pageSize = 1000

// roundPage divides the number of names on a page that may not be the last.
const roundPage = 50

// tags lists a repository's tags, those that are none left out.
func (p *parent) tags(ctx context.Context, repository string) ([]string, error) {
	names, err := p.names(ctx, question{
		path:  fmt.Sprintf("/v2/%s/tags/list?n=%d", repository, pageSize),
		scope: repositoryScope(repository),
		what:  "the tags of " + repository,
	}, "tags", v1alpha1.ValidTag)
	if f, ok := errors.AsType[*fault](err); ok && f.status == http.StatusNotFound {
		f.message = fmt.Sprintf("%s has no repository %s (404): push it there, or correct the name in the repositories of the configuration", p, repository)
	}
	return names, err
}

// catalog lists the parent's repositories.
func (p *parent) catalog(ctx context.Context) ([]string, error) {
	names, err := p.names(ctx, question{
		path:  fmt.Sprintf("/v2/_catalog?n=%d", pageSize),
		scope: catalogScope,
		what:  "the list of its repositories",
	}, "repositories", v1alpha1.ValidRepositoryName)
	if f, ok := errors.AsType[*fault](err); ok && f.status >= 400 && f.status < 500 && f.status != http.StatusTooManyRequests {
		f.message = fmt.Sprintf("%s does not list its repositories (%d): name them in spec.repositories without wildcards", p, f.status)
	}
	return names, err
}

// names reads a list page by page (distribution specification, "Listing Tags"),
// which a parent might do without end: over pages that bring nothing, that came
// before, or that are simply too many.
func (p *parent) names(ctx context.Context, q question, key string, valid func(string) bool) ([]string, error) {
	q.method, q.accept, q.max = http.MethodGet, "application/json", p.limits.list
	first := q.path
	seen := make(map[string]bool)
	var names []string
	guessed := false // the parent gave no link to a page
	for {
		a, err := p.ask(ctx, q)
		if err != nil {
			return nil, err
		}
		page, err := listed(a, key)
		if err != nil {
			return nil, unusable(p.String(), q.what, "%s", oneLine(err.Error()))
		}
		before := len(seen)
		for _, name := range page {
			if !seen[name] && valid(name) {
				names = append(names, name)
			}
			seen[name] = true
		}
		next := nextPage(a.header, q.path)
		guessed = guessed || next == ""
		if guessed && (len(page) == 0 || len(page)%roundPage != 0 || len(seen) == before) {
			slices.Sort(names)
			return names, nil
		}
		if next == "" {
			// A round number of names without a link to the next: some registries
			// leave that to whoever asks, and cap their pages at 100 names or
			// another number of their own.
			next = fmt.Sprintf("%s&last=%s", first, url.QueryEscape(page[len(page)-1]))
		}
		if len(seen) == before {
			return nil, unusable(p.String(), q.what, "its pages have no end")
		}
		if len(seen) > p.limits.names {
			return nil, unusable(p.String(), q.what, "there are more than %d", p.limits.names)
		}
		q.path = next
	}
}

// listed is the list of strings under key of a JSON object.
func listed(a answer, key string) ([]string, error) {
	if isHTML(a.header) {
		return nil, errors.New("it is a web page: is spec.parent.endpoint a registry?")
	}
	var page map[string]json.RawMessage
	if err := json.Unmarshal(a.body, &page); err != nil {
		return nil, errors.New("it is not JSON")
	}
	var names []string
	if raw, ok := page[key]; ok {
		if err := json.Unmarshal(raw, &names); err != nil {
			return nil, fmt.Errorf("its %s are not a list of names", key)
		}
	}
	return names, nil
}

// nextPage is the path and query of the page that follows the one at path, or ""
// (RFC 8288). The host that the link names is not followed: it is this one, if
// under another name, or none of our business.
func nextPage(h http.Header, path string) string {
	for _, link := range h.Values("Link") {
		target, params, ok := strings.Cut(link, ">")
		target, found := strings.CutPrefix(strings.TrimSpace(target), "<")
		if !ok || !found || !strings.Contains(strings.ToLower(strings.ReplaceAll(params, `"`, "")), "rel=next") {
			continue
		}
		base, err := url.Parse(path)
		if err != nil {
			return ""
		}
		u, err := base.Parse(target)
		if err != nil || !strings.HasPrefix(u.Path, "/v2/") {
			return ""
		}
		return u.RequestURI()
	}
	return ""
}

// referrers asks the parent's referrers API (distribution specification,
// "Listing Referrers") for what refers to a manifest. ok is false when the
// parent has none.
func (p *parent) referrers(ctx context.Context, repository string, d digest.Digest) (found []v1.Descriptor, ok bool, err error) {
	q := question{
		method: http.MethodGet,
		path:   "/v2/" + repository + "/referrers/" + d.String(),
		accept: v1.MediaTypeImageIndex,
		scope:  repositoryScope(repository),
		what:   "the referrers of " + repository + "@" + d.String(),
		max:    p.limits.manifest,
	}
	seen := make(map[digest.Digest]bool)
	for !p.noReferrers.Load() {
		a, err := p.ask(ctx, q)
		if f, is := errors.AsType[*fault](err); is && slices.Contains([]int{400, 404, 405, 406, 501}, f.status) {
			break
		} else if err != nil {
			return nil, false, err
		}
		if mediaType, _, _ := mime.ParseMediaType(a.header.Get("Content-Type")); mediaType != v1.MediaTypeImageIndex {
			break
		}
		page, err := parseManifest(v1.MediaTypeImageIndex, a.body)
		if err != nil {
			return nil, false, unusable(p.String(), q.what, "%s", oneLine(err.Error()))
		}
		before := len(seen)
		for _, desc := range page.children {
			if !seen[desc.Digest] {
				found = append(found, desc)
			}
			seen[desc.Digest] = true
		}
		if q.path = nextPage(a.header, q.path); q.path == "" {
			return found, true, nil
		}
		if len(seen) == before || len(seen) > p.limits.names {
			return nil, false, unusable(p.String(), q.what, "its pages have no end")
		}
	}
	p.noReferrers.Store(true)
	return nil, false, nil
}
