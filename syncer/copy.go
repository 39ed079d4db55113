package syncer

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// imagesAhead is out of how many of a repository's images the one that lacks
// least is brought first.
const imagesAhead = 16

// sync brings what is wanted of a repository and not here.
func (r *repository) sync(ctx context.Context) {
	plans, err := r.plan(ctx)
	if err != nil {
		r.fail(err)
		r.run.event(Event{Kind: EventFailed, Repository: r.name, Err: err})
		return
	}
	r.run.event(Event{Kind: EventPlanned, Repository: r.name, Tags: len(plans)})
	var wg sync.WaitGroup
	images := make(chan struct{}, imagesAhead)
	for _, g := range groups(plans) {
		select {
		case images <- struct{}{}:
		case <-ctx.Done():
			r.fail(context.Cause(ctx))
			wg.Wait()
			return
		}
		wg.Go(func() {
			defer func() { <-images }()
			r.syncGroup(ctx, g)
		})
	}
	wg.Wait()
	if r.run.removing {
		r.remove(ctx, plans)
	}
}

// plan compares a repository with the parent.
func (r *repository) plan(ctx context.Context) ([]TagPlan, error) {
	wanted, err := r.survey(ctx)
	if err != nil {
		return nil, err
	}
	clients, err := r.clients(ctx)
	if err != nil {
		return nil, err
	}
	wanted = slices.DeleteFunc(wanted, func(w want) bool { return clients[w.tag] })
	here, err := r.inventory(ctx, wanted)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	r.wanted = len(wanted)
	r.mu.Unlock()
	plans := planTags(wanted, here)
	for _, p := range plans {
		if p.Err != nil {
			r.failTag(p.Name, p.Err, p.Err)
		}
	}
	return plans, nil
}

// survey asks the parent what the selected tags stand for: one request for each
// tag, and the list of tags unless all are selected by name.
func (r *repository) survey(ctx context.Context) ([]want, error) {
	names, named := r.selection.named()
	if !named {
		var err error
		if names, err = r.tags(ctx); err != nil {
			return nil, err
		}
	}
	wanted := r.selection.tags(names)
	var g errgroup.Group
	g.SetLimit(r.parent.limits.asks)
	for i := range wanted {
		w := &wanted[i]
		g.Go(func() error {
			w.digest, w.err = r.resolve(ctx, w.tag)
			return nil
		})
	}
	_ = g.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if !named {
		// It was in the list and is gone: it was deleted in between.
		wanted = slices.DeleteFunc(wanted, func(w want) bool { return isNotFound(w.err) })
	}
	return wanted, nil
}

// tags is what the parent lists, which it is asked for once, if at all.
func (r *repository) tags(ctx context.Context) ([]string, error) {
	r.list.Do(func() {
		r.listed, r.listErr = r.parent.tags(ctx, r.remote)
		r.empty.Store(r.listErr == nil && len(r.listed) == 0)
	})
	return r.listed, r.listErr
}

// anywhere is the source of manifests that asks the parent for those that are
// not in the repository.
func (r *repository) anywhere(ctx context.Context, d digest.Digest) (manifest, bool, error) {
	if m, ok, err := r.run.store.manifest(ctx, r.name, d); ok || err != nil {
		return m, ok, err
	}
	m, err := r.parent.manifest(ctx, r.remote, d)
	return m, false, err
}

// syncGroup does what is to be done for the tags that stand for one digest.
func (r *repository) syncGroup(ctx context.Context, g *group) {
	err := r.bringGroup(ctx, g)
	for _, t := range g.tags {
		tagErr := err
		if isNotFound(err) {
			tagErr = r.follow(ctx, t, err)
		} else if err == nil && t.Action != ActionKeep {
			tagErr = r.writeTag(ctx, t.Name, t.Digest)
		}
		if tagErr != nil {
			r.failTag(t.Name, tagErr, fmt.Errorf("%s:%s: %w", r.name, t.Name, tagErr))
			continue
		}
		r.mu.Lock()
		r.present++
		r.mu.Unlock()
	}
}

// follow brings what a tag stands for by now, if that is something else than
// when it was asked for: registries that delete what has no tag may have deleted
// what it stood for in the meantime, which was the error err.
func (r *repository) follow(ctx context.Context, t TagPlan, err error) error {
	d, resolveErr := r.resolve(ctx, t.Name)
	if resolveErr != nil || d == t.Digest {
		return err
	}
	t.Digest, t.Action = d, ActionCopy
	if err := r.bringGroup(ctx, &group{digest: d, platforms: t.platforms, tags: []TagPlan{t}}); err != nil {
		return err
	}
	return r.writeTag(ctx, t.Name, d)
}

// clients are the tags that clients have changed and the parent was not told of:
// what it says about them is out of date.
func (r *repository) clients(ctx context.Context) (map[string]bool, error) {
	if !r.run.clients {
		return nil, nil
	}
	tags, err := r.run.store.content.Journal().Tags(ctx)
	return tags[r.name], err
}

func (r *repository) writeTag(ctx context.Context, tag string, d digest.Digest) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if clients, err := r.clients(ctx); err != nil || clients[tag] {
		return err // pushed since it was planned
	}
	if err := r.run.store.setTag(ctx, r.name, tag, d); err != nil {
		return err
	}
	r.run.log.Debug("tag brought up to date", "repository", r.name, "tag", tag, "digest", d)
	r.run.event(Event{Kind: EventTagged, Repository: r.name, Tag: tag, Digest: d.String()})
	return nil
}

// bringGroup brings the image that a group of tags stands for, and what refers
// to it. Referrers come before the tag, so that whoever verifies what it pulls
// finds the signature; that they fail is reported, and keeps nobody from the
// image.
func (r *repository) bringGroup(ctx context.Context, g *group) error {
	changed := slices.ContainsFunc(g.tags, func(t TagPlan) bool { return t.Action == ActionCopy })
	check := r.run.referrers && r.run.checked.due(r.name, g.digest, changed, time.Now())
	if !changed && !check {
		return nil
	}
	img, err := walk(ctx, g.digest, g.platforms, r.anywhere)
	if err == nil && changed {
		r.run.event(Event{Kind: EventStarted, Repository: r.name, Tag: g.tags[0].Name, Digest: g.digest.String(), Missing: r.missing(img.blobs)})
		err = r.bring(ctx, img)
	}
	if err != nil {
		return err
	}
	if check {
		if err := r.bringReferrers(ctx, img, 0); err != nil {
			r.run.checked.forget(r.name, g.digest)
			r.fail(fmt.Errorf("what refers to %s@%s: %w", r.name, g.digest, err))
		}
	}
	return nil
}

// bring stores an image: its blobs, then its manifests, each after what it
// lists. A blob that fails does not stop the others, which the next
// synchronisation then need not fetch.
func (r *repository) bring(ctx context.Context, img image) error {
	r.expect(img.blobs)
	p := priority{urgent: r.run.urgent, repository: r.name}
	for _, blob := range r.missing(img.blobs) {
		p.missing += blob.Size
	}
	errs := make([]error, len(img.blobs))
	var wg sync.WaitGroup
	for i, blob := range img.blobs {
		if r.isSeen(blob.Digest) {
			continue
		}
		wg.Go(func() {
			if errs[i] = r.run.fetcher.ensure(ctx, r, blob, p); errs[i] == nil {
				r.arrived(blob.Digest)
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	for _, m := range img.manifests {
		if m.stored {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := r.run.store.putManifest(ctx, r.name, m.manifest); err != nil {
			return err
		}
	}
	return nil
}
