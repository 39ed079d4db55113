package syncer

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// Plan reads the parent and says what Sync would do now with the trigger
// ManualResync. It writes nothing.
// Its error means that nothing could be planned; what is wrong with a single
// repository is in its part of the plan.
func (s *Syncer) Plan(ctx context.Context) (*Plan, error) {
	r := s.newRun()
	r.manual = true
	defer r.close()
	repositories := r.find(ctx)
	var g errgroup.Group
	g.SetLimit(parallelRepositories)
	plans := make([]RepositoryPlan, len(repositories))
	for i, repo := range repositories {
		plans[i] = RepositoryPlan{Name: repo.name, Err: repo.problem()}
		if plans[i].Err == nil {
			g.Go(func() error {
				if plans[i].Tags, plans[i].Err = repo.plan(ctx); plans[i].Err == nil && r.removing {
					repo.planRest(ctx, &plans[i])
				}
				return nil
			})
		}
	}
	_ = g.Wait()
	counted := make(map[digest.Digest]bool)
	for i, repo := range repositories {
		if plans[i].Err == nil {
			repo.measure(ctx, &plans[i], counted)
		}
		plans[i].Err = cmp.Or(repo.problem(), plans[i].Err)
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if len(plans) > 0 && !slices.ContainsFunc(plans, func(p RepositoryPlan) bool { return !isUnreachable(p.Err) }) {
		return nil, plans[0].Err
	}
	if r.removing && r.unasked() == nil {
		rest, err := r.planUnselected(ctx)
		if err != nil {
			return nil, err
		}
		plans = append(plans, rest...)
		slices.SortFunc(plans, func(a, b RepositoryPlan) int { return cmp.Compare(a.Name, b.Name) })
	}
	return &Plan{Repositories: plans}, nil
}

// measure adds to a plan what would be fetched, leaving out what is counted
// already.
func (r *repository) measure(ctx context.Context, plan *RepositoryPlan, counted map[digest.Digest]bool) {
	for _, g := range groups(plan.Tags) {
		if !slices.ContainsFunc(g.tags, func(t TagPlan) bool { return t.Action == ActionCopy }) {
			continue
		}
		img, err := walk(ctx, g.digest, g.platforms, r.anywhere)
		if err != nil {
			r.fail(fmt.Errorf("%s:%s: %w", r.name, g.tags[0].Name, err))
			continue
		}
		for _, blob := range img.blobs {
			here, err := r.run.store.hasAnywhere(ctx, blob)
			if err != nil {
				r.fail(err)
				continue
			}
			if !here && !counted[blob.Digest] {
				counted[blob.Digest] = true
				plan.Blobs++
				plan.Bytes += blob.Size
			}
		}
	}
}
