package syncer

import (
	"errors"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// Status is what the last synchronisation, or the one under way, found. It never
// says that something is under way that is not.
func (s *Syncer) Status() v1alpha1.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	status := s.last
	status.Delayed = s.waits()
	status.Repositories = slices.Clone(status.Repositories)
	if status.RegistrySyncResult != nil {
		status.RegistrySyncResult = new(*status.RegistrySyncResult)
	}
	if s.running != nil {
		if found := s.running.statuses(); len(found) > 0 {
			status.Repositories = found
		}
	}
	return status
}

// TakenOver is what is left of a status whose synchronisation, if one was
// under way, ended with its worker.
func TakenOver(before v1alpha1.Status) v1alpha1.Status {
	status := *before.DeepCopy()
	status.NextSyncTime = nil
	if status.ConnectionState == v1alpha1.ConnectionStateSyncing {
		status.ConnectionState = v1alpha1.ConnectionStateUnhealthy
	}
	if r := status.RegistrySyncResult; r != nil && r.SyncState == v1alpha1.SyncStateSyncing {
		r.SyncState = v1alpha1.SyncStateFailed
		r.Error = "the worker ended before the synchronisation did: it goes on in the next"
	}
	return status
}

// statuses is how complete the repositories are right now, nil until they are
// known.
func (r *run) statuses() []v1alpha1.RepositoryStatus {
	r.mu.Lock()
	found := r.repositories
	r.mu.Unlock()
	var statuses []v1alpha1.RepositoryStatus
	for _, repo := range found {
		statuses = append(statuses, repo.result().status())
	}
	return statuses
}

func (r RepositoryResult) status() v1alpha1.RepositoryStatus {
	status := v1alpha1.RepositoryStatus{Name: r.Name, TagsWanted: r.TagsWanted, TagsPresent: r.TagsPresent, BytesLeft: r.BytesLeft, RemovalsHeld: r.Held}
	if r.Err != nil {
		status.LastError = r.Err.Error()
	}
	return status
}

// withCounts takes over how complete a repository was known to be, where the
// parent did not say what there is now.
func withCounts(status v1alpha1.RepositoryStatus, before []v1alpha1.RepositoryStatus) v1alpha1.RepositoryStatus {
	i := slices.IndexFunc(before, func(b v1alpha1.RepositoryStatus) bool { return b.Name == status.Name })
	if i >= 0 && status.LastError != "" && status.TagsWanted == 0 {
		status.TagsWanted, status.TagsPresent, status.BytesLeft = before[i].TagsWanted, before[i].TagsPresent, before[i].BytesLeft
	}
	return status
}

// begin makes r the synchronisation under way.
func (s *Syncer) begin(r *run, trigger v1alpha1.SyncTrigger, start time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running = r
	s.last.ConnectionState = v1alpha1.ConnectionStateSyncing
	result := &v1alpha1.RegistrySyncResult{
		SyncTrigger:       trigger,
		SyncState:         v1alpha1.SyncStateSyncing,
		LastSyncStartTime: new(metav1.NewTime(start)),
	}
	if s.last.RegistrySyncResult != nil {
		result.LastSuccessfulSyncEndTime = s.last.RegistrySyncResult.LastSuccessfulSyncEndTime
	}
	s.last.RegistrySyncResult = result
}

// end makes the outcome of a synchronisation the status.
func (s *Syncer) end(result Result, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.silent = s.running.silences()
	s.running = nil
	s.last.ConnectionState = connectionState(result, err)
	end := metav1.NewTime(result.End)
	sync := s.last.RegistrySyncResult // Status gives copies of it away
	sync.SyncState = result.State
	sync.LastSyncEndTime = &end
	if err == nil {
		s.last.LastSyncTime = &end
		sync.LastSuccessfulSyncEndTime = &end
	} else {
		sync.Error = oneLine(err.Error())
	}
	before := s.last.Repositories
	s.last.Repositories = nil
	for _, repo := range result.Repositories {
		s.last.Repositories = append(s.last.Repositories, withCounts(repo.status(), before))
	}
}

// connectionState is what a synchronisation says about the connection. Running
// out of time says nothing against it.
func connectionState(result Result, err error) v1alpha1.ConnectionState {
	switch {
	case err == nil || result.State == v1alpha1.SyncStateTimedOut && !anyOther(result):
		return v1alpha1.ConnectionStateOnline
	case isUnreachable(err), slices.ContainsFunc(result.Repositories, func(r RepositoryResult) bool { return isUnreachable(r.Err) }):
		return v1alpha1.ConnectionStateOffline
	}
	return v1alpha1.ConnectionStateUnhealthy
}

// anyOther reports whether a repository is incomplete for another reason than
// the window.
func anyOther(result Result) bool {
	return slices.ContainsFunc(result.Repositories, func(r RepositoryResult) bool {
		return r.Err != nil && !errors.Is(r.Err, errWindow)
	})
}

// setNext says when the next synchronisation on schedule is due.
func (s *Syncer) setNext(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last.NextSyncTime = new(metav1.NewTime(t))
}
