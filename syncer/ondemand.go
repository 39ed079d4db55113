package syncer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

// OnDemand tells the syncer what a client asked a replica for and is not here
// yet. It does so by a small file in the storage that both share, since they run
// on different machines and need not know of one another.
type OnDemand struct {
	notes storage.Notes
	spec  func() *v1alpha1.Spec
	log   *slog.Logger

	mu         sync.Mutex         // guards what follows
	lately     map[wish]time.Time // told
	selections []selection        // of the spec selected
	selected   *v1alpha1.Spec
}

// wish is what a client asked for: a repository here, and a tag or digest.
type wish struct{ repository, reference string }

// onDemandDir is where wishes lie, in the storage.
const onDemandDir = "on-demand"

// A wish is not told again for a while: clients try several times, and so do
// several clients.
const tellAgain = 10 * time.Second

// NewOnDemand prepares telling what is missing of what a spec selects. spec is
// asked each time, and returns another pointer when something has changed; log
// takes what goes wrong.
func NewOnDemand(store *storage.Store, spec func() *v1alpha1.Spec, log *slog.Logger) *OnDemand {
	return &OnDemand{notes: store.Notes(onDemandDir), spec: spec, log: log, lately: make(map[wish]time.Time)}
}

// Missing takes note that a client asked for a manifest that is not here. What is
// not selected is not told. It is fit for registry.Config.Missing.
func (o *OnDemand) Missing(ctx context.Context, repository, reference string) {
	w := wish{repository, reference}
	if !w.valid() || !o.due(w, time.Now()) {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tellTimeout) // the client may give up, and others wait, too
	defer cancel()
	if err := o.tell(ctx, w); err != nil {
		o.log.Warn("the syncer could not be told what a client waits for", "repository", repository, "reference", reference, "error", err)
	}
}

func (w wish) valid() bool {
	if !storage.ValidName(w.repository) {
		return false
	}
	return storage.ValidTag(w.reference) || digest.Digest(w.reference).Validate() == nil
}

// due reports whether a wish is selected and has not been told lately.
func (o *OnDemand) due(w wish, now time.Time) bool {
	spec := o.spec()
	if spec.Sync.OnDemand != nil && !*spec.Sync.OnDemand {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.selected != spec {
		o.selected, o.selections = spec, selectionsOf(spec)
	}
	selected := slices.ContainsFunc(o.selections, func(s selection) bool {
		part, _ := s.of(w.repository)
		return len(part) > 0 && part.mayHave(w.reference)
	})
	return selected && isFirst(o.lately, w, now)
}

// selectionsOf is what a spec selects of each registry. What is not valid in it
// selects nothing; the syncer says so.
func selectionsOf(spec *v1alpha1.Spec) (all []selection) {
	parent := v1alpha1.Upstream{Repositories: spec.Repositories}
	for _, from := range append([]v1alpha1.Upstream{parent}, spec.Upstreams...) {
		if selection, err := newSelection(from.Prefix, from.Repositories); err == nil {
			all = append(all, selection)
		}
	}
	return all
}

// maxLately bounds how many wishes are remembered.
const maxLately = 10_000

func isFirst(lately map[wish]time.Time, w wish, now time.Time) bool {
	if last, ok := lately[w]; ok && now.Sub(last) < tellAgain {
		return false
	}
	if len(lately) >= maxLately {
		maps.DeleteFunc(lately, func(_ wish, last time.Time) bool { return now.Sub(last) >= tellAgain })
	}
	if len(lately) >= maxLately {
		return false
	}
	lately[w] = now
	return true
}

// tell leaves a file for the syncer. There are only so many names for them: where
// two wishes have the same, the later one is in, and the other is told again by
// the next who asks.
func (o *OnDemand) tell(ctx context.Context, w wish) error {
	text := w.repository + "\n" + w.reference + "\n"
	sum := sha256.Sum256([]byte(text))
	return o.notes.Write(ctx, hex.EncodeToString(sum[:])[:3], []byte(text))
}

// mayHave reports whether a tag is selected, as far as that can be told without
// the other tags. What a digest belongs to is not known here.
func (s selection) mayHave(reference string) bool {
	if strings.Contains(reference, ":") {
		return true
	}
	for _, sel := range s {
		if !matchAny(sel.exclude, reference) && (sel.names(reference) || sel.includes(reference)) {
			return true
		}
	}
	return false
}

// wanted are the wishes that the syncer knows of.
type wanted struct {
	mu     sync.Mutex
	queue  []wish
	lately map[wish]time.Time
	more   chan struct{} // holds a value when there is something in queue
}

func newWanted() *wanted {
	return &wanted{lately: make(map[wish]time.Time), more: make(chan struct{}, 1)}
}

// maxWanted bounds how many wishes wait.
const maxWanted = 1000

func (w *wanted) add(x wish, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.queue) >= maxWanted || !isFirst(w.lately, x, now) {
		return
	}
	w.queue = append(w.queue, x)
	select {
	case w.more <- struct{}{}:
	default:
	}
}

func (w *wanted) take() (all []wish) {
	w.mu.Lock()
	defer w.mu.Unlock()
	all, w.queue = w.queue, nil
	return all
}

// Want has what somebody waits for brought before everything else: the manifest
// that a tag or digest stands for in one of the repositories here, with all it
// needs. It returns at once; Run does the work. What is not selected, and what
// was wanted just now, is ignored.
func (s *Syncer) Want(repository, reference string) {
	if w := (wish{repository, reference}); w.valid() {
		s.wanted.add(w, time.Now())
	}
}

// parallelWishes is how many wishes are carried out at once.
const parallelWishes = 4

// serveWishes carries out what Want is told, until ctx ends.
func (s *Syncer) serveWishes(ctx context.Context) error {
	var g errgroup.Group
	g.SetLimit(parallelWishes)
	for {
		select {
		case <-ctx.Done():
			return g.Wait()
		case <-s.wanted.more:
		}
		for _, w := range s.wanted.take() {
			g.Go(func() error {
				s.bringWish(ctx, w)
				return nil
			})
		}
	}
}

// bringWish brings what somebody waits for.
func (s *Syncer) bringWish(ctx context.Context, w wish) {
	r := s.newRun()
	r.urgent = true
	defer r.close()
	repo := r.locate(w.repository)
	if repo == nil || !repo.selection.mayHave(w.reference) {
		return
	}
	start := time.Now()
	brought, err := repo.grant(ctx, w.reference)
	if err == nil {
		err = repo.problem()
	}
	log := s.config.Logger.With("repository", w.repository, "reference", w.reference, "duration", time.Since(start).Round(time.Millisecond))
	switch {
	case ctx.Err() != nil:
	case err != nil:
		log.Warn("what a client waits for cannot be brought", "error", err)
	case brought:
		log.Info("brought what a client waits for", "bytes_fetched", r.received())
	}
}

// grant brings a tag or digest if it is selected, which it reports.
func (r *repository) grant(ctx context.Context, reference string) (bool, error) {
	wanted, err := r.wish(ctx, reference)
	if err != nil {
		return false, err
	}
	here, err := r.inventory(ctx, wanted)
	if err != nil {
		return false, err
	}
	for _, p := range planTags(wanted, here) {
		if p.Err != nil {
			return false, p.Err
		}
	}
	for _, g := range groups(planTags(wanted, here)) {
		r.syncGroup(ctx, g)
	}
	return len(wanted) > 0, nil
}

// wish is what the parent has for a wish: one tag, or those that stand for a
// digest.
func (r *repository) wish(ctx context.Context, reference string) ([]want, error) {
	if strings.Contains(reference, ":") {
		all, err := r.survey(ctx)
		return keep(all, func(w want) bool { return w.err == nil && w.digest.String() == reference }), err
	}
	names := []string{reference}
	if r.selection.ranked() {
		var err error
		if names, err = r.tags(ctx); err != nil {
			return nil, err
		}
	}
	wanted := keep(r.selection.tags(names), func(w want) bool { return w.tag == reference })
	for i := range wanted {
		wanted[i].digest, wanted[i].err = r.resolve(ctx, reference)
	}
	return keep(wanted, func(w want) bool { return !isNotFound(w.err) }), nil
}

// ranked reports whether what is selected depends on which other tags there are.
func (s selection) ranked() bool {
	for _, sel := range s {
		if sel.newest > 0 {
			return true
		}
	}
	return false
}

func keep(all []want, ok func(want) bool) (kept []want) {
	for _, w := range all {
		if ok(w) {
			kept = append(kept, w)
		}
	}
	return kept
}

// pollWishes is how often the storage is looked at for wishes: it is on another
// machine, from where nothing tells that there are some.
const pollWishes = time.Second

// watchWishes reads what replicas leave in the storage, until ctx ends.
func (s *Syncer) watchWishes(ctx context.Context) error {
	notes := s.store.content.Notes(onDemandDir)
	tick := time.NewTicker(pollWishes)
	defer tick.Stop()
	for {
		if err := s.readWishes(ctx, notes); err != nil && ctx.Err() == nil {
			s.config.Logger.Warn("what replicas ask for cannot be read", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// maxWish bounds what holds a wish.
const maxWish = 1 << 10

// readWishes takes the wishes that were left.
func (s *Syncer) readWishes(ctx context.Context, notes storage.Notes) error {
	names, err := notes.List(ctx, "")
	for _, name := range names {
		text, readErr := notes.Read(ctx, name)
		if errors.Is(readErr, fs.ErrNotExist) {
			continue
		}
		err = errors.Join(err, readErr, notes.Remove(ctx, name))
		if readErr != nil {
			continue
		}
		if w, ok := parseWish(text); ok {
			s.Want(w.repository, w.reference)
		} else {
			err = errors.Join(err, fmt.Errorf("%s/%s does not name a manifest", onDemandDir, name))
		}
	}
	return err
}

func parseWish(text []byte) (w wish, ok bool) {
	if len(text) > maxWish {
		return wish{}, false
	}
	repository, rest, _ := strings.Cut(string(text), "\n")
	w = wish{repository, strings.TrimSuffix(rest, "\n")}
	return w, w.valid()
}
