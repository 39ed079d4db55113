package syncer

import (
	"cmp"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Plan is what a synchronisation would do.
type Plan struct {
	// Repositories are the selected repositories, by name.
	Repositories []RepositoryPlan
}

// RepositoryPlan is what a synchronisation would do to one repository.
type RepositoryPlan struct {
	Name string
	// Tags are the tags that are wanted, by name, and then those that are to be
	// removed. Referrers follow the images
	// that they are about and are not listed.
	Tags []TagPlan
	// Blobs is how many blobs would be fetched, Bytes their size. A blob that
	// several repositories want counts in the first of them.
	Blobs int
	Bytes int64
	// Held is why tags that are gone at the parent, or no longer selected, are
	// not removed, in one line. Empty: none is held.
	Held string
	// Err is why the repository, or part of it, cannot be brought.
	Err error
}

// TagPlan is what would be done to one tag.
type TagPlan struct {
	Name   string
	Action Action
	// Digest is what the tag stands for at the parent.
	Digest digest.Digest
	// Present is what it stands for here. Empty: nothing.
	Present digest.Digest
	// Err is why it cannot be brought. Action and Digest are empty then.
	Err error

	platforms platforms
}

// Action is what is to be done to a tag.
type Action string

// The actions.
const (
	// ActionKeep: the tag is here and whole.
	ActionKeep Action = "keep"
	// ActionCopy: something that the tag needs is not here.
	ActionCopy Action = "copy"
	// ActionTag: everything is here, the tag alone is to be written.
	ActionTag Action = "tag"
	// ActionRemove: the tag is gone at the parent, or no longer selected.
	// Digest and Present are empty.
	ActionRemove Action = "remove"
)

// want is what the parent has for a tag that is selected.
type want struct {
	tag       string
	digest    digest.Digest
	platforms platforms
	err       error // why it is not known
}

// have is what is here for a tag that is selected.
type have struct {
	digest digest.Digest // "": the tag is not here
	whole  bool          // everything that the wanted digest needs is here
}

// planTags compares what is wanted with what is here, by tag.
func planTags(wanted []want, here map[string]have) []TagPlan {
	plans := make([]TagPlan, 0, len(wanted))
	for _, w := range wanted {
		h := here[w.tag]
		p := TagPlan{Name: w.tag, Digest: w.digest, Present: h.digest, Err: w.err, platforms: w.platforms}
		switch {
		case w.err != nil:
			p.Digest = ""
		case !h.whole:
			p.Action = ActionCopy
		case h.digest != w.digest:
			p.Action = ActionTag
		default:
			p.Action = ActionKeep
		}
		plans = append(plans, p)
	}
	slices.SortFunc(plans, func(a, b TagPlan) int { return cmp.Compare(a.Name, b.Name) })
	return plans
}

// group is the tags that stand for one thing, which is brought once for all of
// them.
type group struct {
	digest    digest.Digest
	platforms platforms
	tags      []TagPlan
}

// groups puts tags together that have the same digest and platforms, in the
// order of their first tags.
func groups(plans []TagPlan) []*group {
	var result []*group
	byKey := make(map[string]*group)
	for _, p := range plans {
		if p.Err != nil {
			continue
		}
		key := p.platforms.key(p.Digest)
		g := byKey[key]
		if g == nil {
			g = &group{digest: p.Digest, platforms: p.platforms}
			byKey[key] = g
			result = append(result, g)
		}
		g.tags = append(g.tags, p)
	}
	return result
}

// key tells what is wanted of a manifest from anything else that may be.
func (wanted platforms) key(d digest.Digest) string {
	return d.String() + " " + strings.Join(wanted, " ")
}
