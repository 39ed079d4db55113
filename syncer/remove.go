package syncer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// removals is what is to be done about a repository's tags that are here and not
// wanted.
type removals struct {
	tags []string // to be removed
	// held is why tags that are not wanted stay for now, in one line. Empty: all
	// of them are in tags.
	held string
}

// removalRules are what removals are held by.
type removalRules struct {
	percent int  // more of a repository's tags than this are not removed at once
	manual  bool // a person asked for it, so that percent does not hold
	// silent: the parent lists no tags at all, which it did not before.
	silent bool
}

// planRemovals says which of the tags that are here go, where stay says which
// stay.
func planRemovals(here []string, stay map[string]bool, rules removalRules) removals {
	var gone []string
	for _, tag := range here {
		if !stay[tag] {
			gone = append(gone, tag)
		}
	}
	switch {
	case len(gone) == 0:
		return removals{}
	case rules.silent:
		return removals{held: fmt.Sprintf("%d of %d tags stay although the parent lists none at all: if it says so again in the next synchronisation, they go", len(gone), len(here))}
	case !rules.manual && len(gone)*100 > rules.percent*len(here):
		return removals{held: fmt.Sprintf("%d of %d tags are gone at the parent or no longer selected, more than the %d %% of spec.sync.maxRemovals: they go with a synchronisation by hand", len(gone), len(here), rules.percent)}
	}
	return removals{tags: gone}
}

// removals finds out which tags are to go. It writes nothing, and an error keeps
// all of them.
//
// A tag that is selected counts as gone only when the parent's list leaves it
// out and the parent says that there is no such tag when asked for it: lists may
// be cut short, or late.
func (r *repository) removals(ctx context.Context, plans []TagPlan) (removals, error) {
	here, err := r.run.store.tags(ctx, r.name)
	if len(here) == 0 || err != nil {
		return removals{}, err
	}
	rules := removalRules{percent: r.run.maxRemovals, manual: r.run.manual}
	if len(r.selection) == 0 {
		return planRemovals(here, nil, rules), nil // whatever the parent has
	}
	listed, err := r.tags(ctx)
	if err != nil {
		return removals{}, err
	}
	rules.silent = len(listed) == 0 && !r.run.silentBefore[r.name]
	stay, doubtful, err := r.staying(ctx, here, listed, plans)
	if err != nil {
		return removals{}, err
	}
	if !rules.silent {
		if err := r.confirm(ctx, doubtful, stay); err != nil {
			return removals{}, err
		}
	}
	return planRemovals(here, stay, rules), nil
}

// staying are the tags that stay, and those here that do not unless the parent
// has them after all.
func (r *repository) staying(ctx context.Context, here, listed []string, plans []TagPlan) (stay map[string]bool, doubtful []string, err error) {
	stay = make(map[string]bool)
	unknown := make(map[string]bool) // to the parent, which was asked for them
	for _, p := range plans {
		stay[p.Name] = p.Err == nil
		unknown[p.Name] = isNotFound(p.Err)
	}
	for _, w := range r.selection.tags(listed) {
		stay[w.tag] = true // also if it was deleted since it was listed
	}
	selected := make(map[string]bool) // of all that may be at the parent
	for _, w := range r.selection.tags(slices.Compact(slices.Sorted(slices.Values(append(slices.Clone(here), listed...))))) {
		selected[w.tag] = true
	}
	for _, tag := range here {
		follows, err := r.follows(ctx, tag)
		if err != nil {
			return nil, nil, err
		}
		_, isListed := slices.BinarySearch(listed, tag)
		switch {
		case stay[tag] || unknown[tag]:
		case follows && isListed:
			stay[tag] = true
		case (selected[tag] || follows) && !isListed:
			doubtful = append(doubtful, tag)
		}
	}
	return stay, doubtful, nil
}

// follows reports whether a tag is one of cosign's that comes with an image
// which is here.
func (r *repository) follows(ctx context.Context, tag string) (bool, error) {
	name, _, suffixed := strings.Cut(tag, ".")
	if !r.run.referrers || !suffixed || !referrerTag.MatchString(tag) {
		return false, nil
	}
	subject := digest.NewDigestFromEncoded(digest.SHA256, strings.TrimPrefix(name, "sha256-"))
	_, ok, err := r.run.store.manifest(ctx, r.name, subject)
	return ok, err
}

// confirm asks the parent for tags that it does not list, and lets those stay
// that it has.
func (r *repository) confirm(ctx context.Context, doubtful []string, stay map[string]bool) error {
	errs := make([]error, len(doubtful))
	var g errgroup.Group
	g.SetLimit(r.parent.limits.asks)
	for i, tag := range doubtful {
		g.Go(func() error {
			_, errs[i] = r.resolve(ctx, tag)
			return nil
		})
	}
	_ = g.Wait()
	for i, tag := range doubtful {
		if errs[i] != nil && !isNotFound(errs[i]) {
			return errs[i]
		}
		stay[tag] = errs[i] == nil
	}
	return nil
}

// remove takes away the tags that are gone at the parent or no longer selected,
// once everything else of the repository is as it should be: what comes in the
// place of a tag is here before the tag goes.
func (r *repository) remove(ctx context.Context, plans []TagPlan) {
	if !r.settled(plans) {
		return
	}
	rest, err := r.removals(ctx, plans)
	if err == nil {
		r.hold(rest.held)
		err = r.untag(ctx, rest.tags)
	}
	if err != nil {
		err = fmt.Errorf("removing tags of %s: %w", r.name, err)
		r.fail(err)
		r.run.event(Event{Kind: EventFailed, Repository: r.name, Err: err})
	}
}

// settled reports whether every tag that the parent has is here. That it has no
// such tag is an answer; anything else in its place is not.
func (r *repository) settled(plans []TagPlan) bool {
	known := 0
	for _, p := range plans {
		switch {
		case p.Err == nil:
			known++
		case !isNotFound(p.Err):
			return false
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.present == known
}

func (r *repository) hold(why string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held = why
}

func (r *repository) untag(ctx context.Context, tags []string) error {
	for _, tag := range tags {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := r.run.store.untag(ctx, r.name, tag); err != nil {
			return err
		}
		r.run.log.Info("tag removed: it is gone at the parent, or no longer selected", "repository", r.name, "tag", tag)
		r.run.event(Event{Kind: EventRemoved, Repository: r.name, Tag: tag})
	}
	return nil
}

// unselected are the repositories here that nothing selects any more.
func (r *run) unselected(ctx context.Context) ([]*repository, error) {
	names, err := r.store.repositories(ctx)
	if err != nil {
		return nil, err
	}
	var found []*repository
	for _, name := range names {
		if r.locate(name) == nil {
			found = append(found, &repository{run: r, name: name})
		}
	}
	return found, nil
}

// removeUnselected takes away the tags of repositories that nothing selects any
// more. Those of which there is something to say join the others.
func (r *run) removeUnselected(ctx context.Context) {
	found, err := r.unselected(ctx)
	if err != nil {
		r.err = errors.Join(r.err, err)
		return
	}
	for _, repo := range found {
		repo.remove(ctx, nil)
		if res := repo.result(); res.Held != "" || res.Err != nil {
			r.mu.Lock()
			r.repositories = append(slices.Clone(r.repositories), repo)
			slices.SortFunc(r.repositories, func(a, b *repository) int { return strings.Compare(a.name, b.name) })
			r.mu.Unlock()
		}
	}
}

// planRest adds to a plan what would be removed.
func (r *repository) planRest(ctx context.Context, plan *RepositoryPlan) {
	rest, err := r.removals(ctx, plan.Tags)
	if err != nil {
		r.fail(fmt.Errorf("removing tags of %s: %w", r.name, err))
		return
	}
	plan.Held = rest.held
	for _, tag := range rest.tags {
		plan.Tags = slices.DeleteFunc(plan.Tags, func(p TagPlan) bool { return p.Name == tag })
		plan.Tags = append(plan.Tags, TagPlan{Name: tag, Action: ActionRemove})
	}
}

// planUnselected is what would be removed of repositories that nothing selects
// any more.
func (r *run) planUnselected(ctx context.Context) ([]RepositoryPlan, error) {
	found, err := r.unselected(ctx)
	if err != nil {
		return nil, err
	}
	var plans []RepositoryPlan
	for _, repo := range found {
		plan := RepositoryPlan{Name: repo.name}
		repo.planRest(ctx, &plan)
		plan.Err = repo.problem()
		if len(plan.Tags) > 0 || plan.Held != "" || plan.Err != nil {
			plans = append(plans, plan)
		}
	}
	return plans, nil
}

// silences are the repositories of which the parent listed no tag in this
// synchronisation.
func (r *run) silences() map[string]bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	silent := make(map[string]bool)
	for _, repo := range r.repositories {
		if repo.empty.Load() {
			silent[repo.name] = true
		}
	}
	return silent
}
