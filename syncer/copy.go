package syncer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// parallelRepositories is how many repositories are looked at at once. How many
// requests that makes is bounded elsewhere.
const parallelRepositories = 8

// parallelLooks is how many of an image's blobs are looked for at once.
const parallelLooks = 8

// imagesAhead is out of how many of a repository's images the one that lacks
// least is brought first.
const imagesAhead = 16

// run is one synchronisation.
type run struct {
	origins   []*origin
	store     *store
	fetcher   *fetcher
	referrers bool
	// removing: tags that are not wanted are removed; see removalRules for
	// maxRemovals, a percentage, and manual.
	removing    bool
	maxRemovals int
	manual      bool
	// silentBefore are the repositories of which the parent listed no tag in
	// the synchronisation before.
	silentBefore map[string]bool
	// checked remembers when the referrers of unchanged images were asked for;
	// see checks.
	checked  *checks
	progress func(Event) // may be nil
	log      *slog.Logger
	// etags remembers what parents call what tags stand for; see etags.
	etags *etags
	// clients: they write tags, too, which the journal tells of.
	clients bool
	// urgent: somebody waits for what this brings.
	urgent bool
	// err is why removals could not be looked for.
	err error

	mu           sync.Mutex
	repositories []*repository // sorted by name
	blobsFetched int
	blobsLinked  int
	tagsUpdated  int
	tagsRemoved  int
}

// repository is one repository during a synchronisation.
type repository struct {
	run       *run
	parent    *parent
	name      string // here
	remote    string // at the parent
	selection selection

	// listed and listErr are what the parent lists as tags, asked once.
	list    sync.Once
	listed  []string
	listErr error
	empty   atomic.Bool // the parent lists none

	mu       sync.Mutex
	wanted   int
	present  int
	left     map[digest.Digest]int64 // blobs known to be missing here
	seen     map[digest.Digest]bool  // blobs known to be here
	subjects map[digest.Digest]bool  // manifests whose referrers were brought
	err      error
	more     int    // errors after the first
	held     string // why tags that are not wanted stay
}

func (r *run) newRepository(o *origin, name, remote string, part selection, err error) *repository {
	return &repository{
		run:       r,
		parent:    o.parent,
		name:      name,
		remote:    remote,
		selection: part,
		left:      make(map[digest.Digest]int64),
		seen:      make(map[digest.Digest]bool),
		subjects:  make(map[digest.Digest]bool),
		err:       err,
	}
}

// sync carries out the synchronisation. Its outcome is in the repositories.
func (r *run) sync(ctx context.Context) {
	var found []*repository
	for _, repo := range r.find(ctx) {
		if err := repo.problem(); err != nil {
			r.event(Event{Kind: EventFailed, Repository: repo.name, Err: err})
			continue
		}
		found = append(found, repo)
	}
	var g errgroup.Group
	g.SetLimit(parallelRepositories)
	for _, repo := range found {
		g.Go(func() error { repo.sync(ctx); return nil })
	}
	_ = g.Wait()
	if r.removing && r.unasked() == nil && ctx.Err() == nil {
		r.removeUnselected(ctx)
	}
}

// event tells of something, and counts it.
func (r *run) event(e Event) {
	r.mu.Lock()
	switch {
	case e.Kind == EventTagged:
		r.tagsUpdated++
	case e.Kind == EventRemoved:
		r.tagsRemoved++
	case e.Kind == EventBlob && e.Linked:
		r.blobsLinked++
	case e.Kind == EventBlob:
		r.blobsFetched++
	}
	r.mu.Unlock()
	if r.progress != nil {
		r.progress(e)
	}
}

// fail records why a repository is not complete.
func (r *repository) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		r.err = err
	} else if r.err.Error() != err.Error() {
		r.more++
	}
}

// failTag records why a tag is not as it should be: err, which full says
// together with the tag.
func (r *repository) failTag(tag string, err, full error) {
	r.fail(full)
	r.run.event(Event{Kind: EventFailed, Repository: r.name, Tag: tag, Err: err})
}

// problem is why a repository is not complete, in one line, nil when it is.
func (r *repository) problem() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil || r.more == 0 {
		return r.err
	}
	return fmt.Errorf("%w (and %d more)", r.err, r.more)
}

func (r *repository) result() RepositoryResult {
	err := r.problem()
	r.mu.Lock()
	defer r.mu.Unlock()
	res := RepositoryResult{Name: r.name, TagsWanted: r.wanted, TagsPresent: r.present, Held: r.held, Err: err}
	for _, size := range r.left {
		res.BytesLeft += size
	}
	return res
}

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

// inventory finds out what is here of what is wanted. That a tag stands for the
// right digest does not prove that everything below is here: storage takes away
// what it finds to be corrupt, and other programs collect garbage.
//
// The price of looking is bounded by what is stored, not by tags times layers:
// in one synchronisation a manifest is read once for each repository and set of
// platforms, and a blob is looked up once for each repository (one link read,
// one stat). Nothing is asked of the parent, and no content is read.
func (r *repository) inventory(ctx context.Context, wanted []want) (map[string]have, error) {
	here := make(map[string]have)
	whole := make(map[string]bool)
	for _, w := range wanted {
		if w.err != nil {
			continue
		}
		d, err := r.run.store.tag(ctx, r.name, w.tag)
		if err != nil {
			return nil, err
		}
		key := w.platforms.key(w.digest)
		if _, ok := whole[key]; !ok {
			if whole[key], err = r.whole(ctx, w.digest, w.platforms); err != nil {
				return nil, err
			}
		}
		here[w.tag] = have{digest: d, whole: whole[key]}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	return here, nil
}

// whole reports whether everything that a manifest needs is in the repository.
func (r *repository) whole(ctx context.Context, d digest.Digest, wanted platforms) (bool, error) {
	img, err := walk(ctx, d, wanted, r.stored)
	if errors.Is(err, errNotHere) {
		return false, nil
	}
	if err != nil {
		// An index without the wanted platforms, or with a wrong size: copying
		// it will say so.
		return false, storageError(err)
	}
	g, missing := errgroup.WithContext(context.WithoutCancel(ctx))
	g.SetLimit(parallelLooks)
	for _, blob := range img.blobs {
		if missing.Err() != nil {
			break
		}
		if r.isSeen(blob.Digest) {
			continue
		}
		g.Go(func() error {
			ok, err := r.run.store.hasBlob(ctx, r.name, blob)
			if err == nil && !ok {
				err = errNotHere
			}
			if err == nil {
				r.arrived(blob.Digest)
			}
			return err
		})
	}
	if err := g.Wait(); !errors.Is(err, errNotHere) {
		return err == nil, storageError(err)
	}
	return false, nil
}

// storageError is err if the storage is at fault, nil if the content is.
func storageError(err error) error {
	if _, ok := errors.AsType[errContent](err); ok {
		return nil
	}
	if _, ok := errors.AsType[errSize](err); ok {
		return nil
	}
	return err
}

// stored is the source of manifests that are in the repository.
func (r *repository) stored(ctx context.Context, d digest.Digest) (manifest, bool, error) {
	m, ok, err := r.run.store.manifest(ctx, r.name, d)
	if err == nil && !ok {
		err = errNotHere
	}
	return m, true, err
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

func (r *repository) isSeen(d digest.Digest) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen[d]
}

func (r *repository) arrived(d digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen[d] = true
	delete(r.left, d)
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

// missing are those of an image's blobs that are not known to be here.
func (r *repository) missing(blobs []v1.Descriptor) []Blob {
	r.mu.Lock()
	defer r.mu.Unlock()
	var missing []Blob
	for _, blob := range blobs {
		if !r.seen[blob.Digest] {
			missing = append(missing, Blob{blob.Digest.String(), blob.Size})
		}
	}
	return missing
}

// expect takes note of blobs that are about to be brought.
func (r *repository) expect(blobs []v1.Descriptor) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, blob := range blobs {
		if !r.seen[blob.Digest] {
			r.left[blob.Digest] = blob.Size
		}
	}
}
