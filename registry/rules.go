package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

// Rules are what a resource says about changes, and about who may read without
// credentials. They do not change; a changed resource makes new ones. The zero
// value allows everything and opens nothing.
type Rules struct {
	locks                []lock
	total, perRepository int64 // bytes; 0: no bound
	journal              bool
	mirrors              []openMirror
}

// lock is one of spec.immutableTags.
type lock struct {
	repositories []v1alpha1.Glob
	tags         []v1alpha1.TagPattern // empty: all
}

// openMirror is one of spec.mirrors with anonymousPull, and what this registry
// holds of it.
type openMirror struct {
	registry     string
	repositories []prefixed
}

type prefixed struct {
	prefix string
	name   v1alpha1.Glob
}

// NewRules reads the rules off a resource, whose patterns must be valid, as
// v1alpha1.Load sees to.
func NewRules(spec *v1alpha1.Spec) (*Rules, error) {
	r := &Rules{
		// Without anybody to tell, nobody would ever read it.
		journal: spec.Parent != nil || len(spec.Notifications) > 0,
	}
	if q := spec.Quota.Total; q != nil {
		r.total = q.Value()
	}
	if q := spec.Quota.PerRepository; q != nil {
		r.perRepository = q.Value()
	}
	for _, t := range spec.ImmutableTags {
		var l lock
		for _, name := range t.Repositories {
			g, err := v1alpha1.ParseGlob(name)
			if err != nil {
				return nil, fmt.Errorf("spec.immutableTags: %w", err)
			}
			l.repositories = append(l.repositories, g)
		}
		for _, tag := range t.Tags {
			p, err := v1alpha1.ParseTagPattern(tag)
			if err != nil {
				return nil, fmt.Errorf("spec.immutableTags: %w", err)
			}
			l.tags = append(l.tags, p)
		}
		r.locks = append(r.locks, l)
	}
	for _, m := range spec.Mirrors {
		if !m.AnonymousPull {
			continue
		}
		open, err := contentOf(spec, m.Registry)
		if err != nil {
			return nil, err
		}
		r.mirrors = append(r.mirrors, openMirror{m.Registry, open})
	}
	return r, nil
}

// contentOf is which repositories here hold the content of a registry.
func contentOf(spec *v1alpha1.Spec, host string) ([]prefixed, error) {
	var found []prefixed
	add := func(prefix string, repositories []v1alpha1.Repository) error {
		for _, repo := range repositories {
			g, err := v1alpha1.ParseGlob(repo.Name)
			if err != nil {
				return fmt.Errorf("spec.mirrors: %w", err)
			}
			found = append(found, prefixed{path.Join(prefix, repo.Prefix), g})
		}
		return nil
	}
	known := false
	for _, u := range spec.Upstreams {
		if sameRegistry(u.Endpoint, host) {
			known = true
			if err := add(u.Prefix, u.Repositories); err != nil {
				return nil, err
			}
		}
	}
	// A connection string names the parent where this cannot see it: then it
	// is the one that a mirror is of if nothing else is.
	if p := spec.Parent; p != nil && (sameRegistry(p.Endpoint, host) || p.Endpoint == "" && !known) {
		if err := add("", spec.Repositories); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// sameRegistry compares an endpoint with a host as it stands in image names.
func sameRegistry(endpoint, host string) bool {
	if u, err := url.Parse(endpoint); err == nil && u.Host != "" {
		endpoint = u.Host
	}
	hub := []string{"docker.io", "index.docker.io", "registry-1.docker.io"}
	return endpoint != "" && (strings.EqualFold(endpoint, host) || slices.Contains(hub, endpoint) && slices.Contains(hub, host))
}

// AnonymousPullFor reports whether a client without credentials may pull from a
// repository when it asks on behalf of another registry's name; see
// auth.Config.AnonymousPullFor.
func (r *Rules) AnonymousPullFor(registry, repository string) bool {
	for _, m := range r.mirrors {
		if m.registry != registry {
			continue
		}
		for _, p := range m.repositories {
			name, ok := repository, true
			if p.prefix != "" {
				name, ok = strings.CutPrefix(repository, p.prefix+"/")
			}
			if ok && p.name.Match(name) {
				return true
			}
		}
	}
	return false
}

// locked reports whether a tag, once it is there, stays as it is.
func (r *Rules) locked(repository, tag string) bool {
	for _, l := range r.locks {
		if slices.ContainsFunc(l.repositories, func(g v1alpha1.Glob) bool { return g.Match(repository) }) &&
			(len(l.tags) == 0 || slices.ContainsFunc(l.tags, func(p v1alpha1.TagPattern) bool { return p.Match(tag) })) {
			return true
		}
	}
	return false
}

// lockedError refuses to move or remove a tag.
func lockedError(repo storage.Repository, tag string) error {
	return errDenied.because("tag %s of repository %s is immutable here (spec.immutableTags): push under another tag", tag, repo.Name()).
		with(map[string]string{"name": repo.Name(), "tag": tag})
}

// mayGo returns why the tags of a repository that would go with a deletion may
// not: those of which only says so.
func (r *Rules) mayGo(ctx context.Context, repo storage.Repository, only func(tag string) bool) error {
	if len(r.locks) == 0 {
		return nil
	}
	tags, _, err := repo.Tags(ctx, "", -1)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, tag := range tags {
		if r.locked(repo.Name(), tag) && only(tag) {
			return lockedError(repo, tag)
		}
	}
	return nil
}
