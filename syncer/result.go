package syncer

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// Result is how one synchronisation went.
type Result struct {
	Trigger v1alpha1.SyncTrigger
	State   v1alpha1.SyncState
	Start   time.Time
	End     time.Time
	// BytesFetched is what the parent sent as blobs, manifests and lists.
	BytesFetched int64
	// BlobsFetched counts the blobs that were fetched, BlobsLinked the links
	// that were written to those which another repository had already.
	BlobsFetched int
	BlobsLinked  int
	// TagsUpdated is how many tags were written.
	TagsUpdated int
	// TagsRemoved is how many tags were removed.
	TagsRemoved int
	// Repositories are the selected repositories, by name, and those no longer
	// selected whose tags are held or could not be removed.
	Repositories []RepositoryResult
}

// RepositoryResult is how one repository went.
type RepositoryResult struct {
	Name        string
	TagsWanted  int
	TagsPresent int
	BytesLeft   int64
	// Held is why tags that are gone at the parent, or no longer selected, are
	// still here, in one line. Empty: none is held.
	Held string
	// Err is nil when everything wanted is present.
	Err error
}

// finish sums a synchronisation up, clears away what it left, and makes the
// outcome the status.
func (s *Syncer) finish(ctx context.Context, r *run, trigger v1alpha1.SyncTrigger, start time.Time) (Result, error) {
	result := Result{Trigger: trigger, State: v1alpha1.SyncStateSucceeded, Start: start, BytesFetched: r.received()}
	var errs []error
	for _, err := range []error{r.unasked(), r.err} {
		if err != nil {
			errs = append(errs, err)
		}
	}
	for _, repo := range r.repositories {
		res := repo.result()
		result.Repositories = append(result.Repositories, res)
		if res.Err != nil {
			errs = append(errs, res.Err)
		}
	}
	if len(errs) == 0 && ctx.Err() == nil {
		// What was begun and nothing wants any more.
		if _, err := r.store.content.RemovePartials(); err != nil {
			errs = append(errs, writing("removing unfinished transfers", err))
		}
	}
	err := joinOnce(errs)
	switch {
	case errors.Is(err, errWindow):
		result.State = v1alpha1.SyncStateTimedOut
	case err != nil:
		result.State = v1alpha1.SyncStateFailed
	}
	r.mu.Lock()
	result.BlobsFetched, result.BlobsLinked, result.TagsUpdated = r.blobsFetched, r.blobsLinked, r.tagsUpdated
	result.TagsRemoved = r.tagsRemoved
	r.mu.Unlock()
	result.End = time.Now()
	s.checked.expire(result.End)
	s.end(result, err)
	return result, err
}

// joinOnce joins errors, each text once: that the parent is down is not said for
// every repository.
func joinOnce(errs []error) error {
	seen := make(map[string]bool)
	var distinct []error
	for _, err := range errs {
		if !seen[err.Error()] {
			distinct = append(distinct, err)
		}
		seen[err.Error()] = true
	}
	if len(distinct) == 1 {
		return distinct[0]
	}
	return errors.Join(distinct...)
}

// report logs how a synchronisation went. A problem that persists is logged when
// it appears and when it is gone, not every minute.
func (s *Syncer) report(ctx context.Context, result Result) {
	log := s.config.Logger
	if ctx.Err() != nil && !errors.Is(context.Cause(ctx), errWindow) {
		// Nothing is wrong with any repository: the program ends.
		log.Info("synchronisation interrupted, the next one goes on with it", "trigger", result.Trigger, "bytes_fetched", result.BytesFetched)
		s.metrics.observe(result)
		return
	}
	for _, repo := range result.Repositories {
		problem := ""
		if repo.Err != nil {
			problem = repo.Err.Error()
		}
		switch problem {
		case s.logged[repo.Name]:
		case "":
			log.Info("repository is complete again", "repository", repo.Name)
		default:
			log.Warn("repository is not complete", "repository", repo.Name, "tags_wanted", repo.TagsWanted, "tags_present", repo.TagsPresent, "error", problem)
		}
		s.logged[repo.Name] = problem
		if repo.Held != "" && repo.Held != s.held[repo.Name] {
			log.Warn("removal of tags is held", "repository", repo.Name, "reason", repo.Held)
		}
		s.held[repo.Name] = repo.Held
	}
	level := slog.LevelDebug
	if result.TagsUpdated > 0 || result.TagsRemoved > 0 || result.Trigger != v1alpha1.SyncTriggerSchedule {
		level = slog.LevelInfo
	}
	log.Log(ctx, level, "synchronisation ended",
		"trigger", result.Trigger, "state", result.State, "duration", result.End.Sub(result.Start).Round(time.Millisecond),
		"tags_updated", result.TagsUpdated, "tags_removed", result.TagsRemoved, "blobs_fetched", result.BlobsFetched, "blobs_linked", result.BlobsLinked, "bytes_fetched", result.BytesFetched)
	s.metrics.observe(result)
}
