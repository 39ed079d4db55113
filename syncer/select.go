package syncer

import (
	"fmt"
	"maps"
	"path"
	"slices"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// selection is what a ConnectedRegistry's repositories select, ready to match.
type selection []selector

// selector is one entry of spec.repositories.
type selector struct {
	repository v1alpha1.Glob
	prefix     string                // of the names here; "": none
	include    []v1alpha1.TagPattern // empty: every tag
	exclude    []v1alpha1.TagPattern
	newest     int // 0: all of them
	platforms  platforms
}

// newSelection prepares entries whose repositories are called here by what
// stands behind prefix and their own prefix.
func newSelection(prefix string, entries []v1alpha1.Repository) (selection, error) {
	var s selection
	for _, entry := range entries {
		name, err := v1alpha1.ParseGlob(entry.Name)
		if err != nil {
			return nil, fmt.Errorf("repository %q %w", entry.Name, err)
		}
		sel := selector{repository: name, prefix: path.Join(prefix, entry.Prefix), newest: entry.Tags.Newest, platforms: entry.Platforms}
		if sel.include, err = parseTags(entry.Tags.Include); err != nil {
			return nil, fmt.Errorf("tags of repository %s: %w", entry.Name, err)
		}
		if sel.exclude, err = parseTags(entry.Tags.Exclude); err != nil {
			return nil, fmt.Errorf("tags of repository %s: %w", entry.Name, err)
		}
		s = append(s, sel)
	}
	return s, nil
}

func parseTags(patterns []string) ([]v1alpha1.TagPattern, error) {
	var parsed []v1alpha1.TagPattern
	for _, pattern := range patterns {
		p, err := v1alpha1.ParseTagPattern(pattern)
		if err != nil {
			return nil, fmt.Errorf("%q %w", pattern, err)
		}
		parsed = append(parsed, p)
	}
	return parsed, nil
}

func matchAny[P interface{ Match(string) bool }](patterns []P, name string) bool {
	return slices.ContainsFunc(patterns, func(p P) bool { return p.Match(name) })
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

// wild are the entries that select repositories out of the parent's catalogue.
func (s selection) wild() selection {
	var wild selection
	for _, sel := range s {
		if !sel.repository.Literal() {
			wild = append(wild, sel)
		}
	}
	return wild
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

// tags are those out of a list that are selected, by name, each with the
// platforms that it is wanted for: those of every entry that selects it, nil for
// all.
func (s selection) tags(listed []string) []want {
	selected := make(map[string]platforms)
	for _, sel := range s {
		for _, tag := range sel.tags(listed) {
			wanted, before := selected[tag]
			switch {
			case len(sel.platforms) == 0 || before && wanted == nil:
				selected[tag] = nil
			default:
				selected[tag] = append(wanted, sel.platforms...)
			}
		}
	}
	wants := make([]want, 0, len(selected))
	for _, tag := range slices.Sorted(maps.Keys(selected)) {
		wanted := selected[tag]
		slices.Sort(wanted)
		wants = append(wants, want{tag: tag, platforms: slices.Compact(wanted)})
	}
	return wants
}

// tags are those out of a list that an entry selects.
func (sel selector) tags(listed []string) []string {
	var named, others []string
	for _, tag := range listed {
		switch {
		case matchAny(sel.exclude, tag):
		case sel.names(tag):
			named = append(named, tag)
		case sel.includes(tag):
			others = append(others, tag)
		}
	}
	if sel.newest > 0 {
		others = v1alpha1.NewestTags(others, sel.newest)
	}
	return append(named, others...)
}

// names reports whether an entry includes a tag by its name alone.
func (sel selector) names(tag string) bool {
	return slices.ContainsFunc(sel.include, func(p v1alpha1.TagPattern) bool { return p.Literal() && p.Match(tag) })
}

// includes reports whether an entry includes a tag by a pattern, or with all
// others. What looks like a tag of the referrers tag schema or of cosign follows
// the image that it is about, and is included by its name alone.
func (sel selector) includes(tag string) bool {
	return (len(sel.include) == 0 || matchAny(sel.include, tag)) && !referrerTag.MatchString(tag)
}
