package syncer

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// parallelRepositories is how many repositories are looked at at once. How many
// requests that makes is bounded elsewhere.
const parallelRepositories = 8

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

// newRun prepares a synchronisation. It must be closed.
func (s *Syncer) newRun() *run {
	r := &run{
		origins:     s.origins(),
		store:       s.store,
		fetcher:     s.fetcher,
		referrers:   s.config.Referrers,
		removing:    s.config.DeletePropagation,
		clients:     s.config.ReadWrite,
		maxRemovals: s.config.MaxRemovals,
		checked:     s.checked,
		etags:       s.etags,
		progress:    s.config.Progress,
		log:         s.config.Logger,
	}
	s.mu.Lock()
	r.silentBefore = s.silent
	s.mu.Unlock()
	return r
}

func (r *run) close() {
	for _, o := range r.origins {
		o.parent.close()
	}
}

// received is how many bytes the registries sent.
func (r *run) received() (bytes int64) {
	for _, o := range r.origins {
		bytes += o.parent.received.Load()
	}
	return bytes
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
