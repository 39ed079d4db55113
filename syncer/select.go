package syncer

import (
	"fmt"
	"slices"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// selection is what a ConnectedRegistry's repositories select, ready to match.
type selection []selector

// selector is one entry of spec.repositories.
type selector struct {
	repository v1alpha1.Glob
	include    []v1alpha1.Glob // empty: every tag
	exclude    []v1alpha1.Glob
	platforms  platforms
}

func newSelection(entries []v1alpha1.Repository) (selection, error) {
	var s selection
	for _, entry := range entries {
		name, err := v1alpha1.ParseGlob(entry.Name)
		if err != nil {
			return nil, fmt.Errorf("repository %q %w", entry.Name, err)
		}
		sel := selector{repository: name, platforms: entry.Platforms}
		if sel.include, err = parseGlobs(entry.Tags.Include); err != nil {
			return nil, fmt.Errorf("tags of repository %s: %w", entry.Name, err)
		}
		if sel.exclude, err = parseGlobs(entry.Tags.Exclude); err != nil {
			return nil, fmt.Errorf("tags of repository %s: %w", entry.Name, err)
		}
		s = append(s, sel)
	}
	return s, nil
}

func parseGlobs(patterns []string) ([]v1alpha1.Glob, error) {
	var globs []v1alpha1.Glob
	for _, pattern := range patterns {
		g, err := v1alpha1.ParseGlob(pattern)
		if err != nil {
			return nil, fmt.Errorf("%q %w", pattern, err)
		}
		globs = append(globs, g)
	}
	return globs, nil
}

func matchAny(globs []v1alpha1.Glob, name string) bool {
	return slices.ContainsFunc(globs, func(g v1alpha1.Glob) bool { return g.Match(name) })
}

// exact are the repositories that are selected by their names, sorted.
func (s selection) exact() []string {
	var names []string
	for _, sel := range s {
		if sel.repository.Literal() {
			names = append(names, sel.repository.String())
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// wild are the globs that select repositories out of the parent's catalogue.
func (s selection) wild() []v1alpha1.Glob {
	var globs []v1alpha1.Glob
	for _, sel := range s {
		if !sel.repository.Literal() {
			globs = append(globs, sel.repository)
		}
	}
	return globs
}

// of is the part of the selection that is about one repository.
func (s selection) of(repository string) selection {
	var part selection
	for _, sel := range s {
		if sel.repository.Match(repository) {
			part = append(part, sel)
		}
	}
	return part
}

// named are the tags that are selected by their names alone. ok is false when
// some are not, so that the parent has to list what it has.
func (s selection) named() (tags []string, ok bool) {
	for _, sel := range s {
		if len(sel.include) == 0 {
			return nil, false
		}
		for _, g := range sel.include {
			if !g.Literal() {
				return nil, false
			}
			if !matchAny(sel.exclude, g.String()) {
				tags = append(tags, g.String())
			}
		}
	}
	slices.Sort(tags)
	return slices.Compact(tags), true
}

// tag reports whether a tag is selected, and for which platforms: those of every
// entry that selects it, nil for all. What looks like a tag of the referrers tag
// schema or of cosign follows the image that it is about, and is selected by its
// name alone.
func (s selection) tag(tag string) (wanted platforms, ok bool) {
	all := false
	for _, sel := range s {
		included := len(sel.include) == 0 || matchAny(sel.include, tag)
		if referrerTag.MatchString(tag) {
			included = slices.ContainsFunc(sel.include, func(g v1alpha1.Glob) bool { return g.Literal() && g.Match(tag) })
		}
		if !included || matchAny(sel.exclude, tag) {
			continue
		}
		ok = true
		all = all || len(sel.platforms) == 0
		wanted = append(wanted, sel.platforms...)
	}
	if all {
		return nil, ok
	}
	slices.Sort(wanted)
	return slices.Compact(wanted), ok
}
