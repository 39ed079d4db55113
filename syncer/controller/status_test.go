package controller

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/syncer"
	"github.com/connected-registry/connected-registry/syncer/certificates"
)

func at(minute int) metav1.Time {
	return metav1.NewTime(time.Date(2026, 1, 2, 3, minute, 0, 0, time.UTC))
}

func settled(status metav1.ConditionStatus, reason string) certificates.Result {
	return certificates.Result{
		Trust: &v1alpha1.TrustStatus{Phase: v1alpha1.TrustPhaseStable},
		Conditions: []metav1.Condition{
			{Type: certificates.ConditionCertificateReady, Status: status, Reason: reason, Message: "about certificates"},
			{Type: certificates.ConditionTrustDistributed, Status: metav1.ConditionTrue, Reason: "Distributed"},
		},
	}
}

func aView(t *testing.T) view {
	t.Helper()
	cr := load(t, fullSpec)
	return view{
		now: at(10), version: "v1.2.3",
		found: &findings{
			cr: cr, asked: &v1alpha1.ConnectedRegistry{ObjectMeta: metav1.ObjectMeta{Generation: 7}}, active: true,
			source:      &syncer.Source{Namespace: "registry.example.com", Parent: syncer.Parent{Username: "robot", Password: "hunter2"}},
			loginServer: "registry.site.example",
			trust:       settled(metav1.ConditionTrue, "Issued"),
		},
		sync: v1alpha1.Status{
			ConnectionState: v1alpha1.ConnectionStateOnline,
			LastSyncTime:    new(at(9)), NextSyncTime: new(at(11)),
			RegistrySyncResult: &v1alpha1.RegistrySyncResult{
				SyncTrigger: v1alpha1.SyncTriggerSchedule, SyncState: v1alpha1.SyncStateSucceeded,
				LastSyncStartTime: new(at(8)), LastSyncEndTime: new(at(9)), LastSuccessfulSyncEndTime: new(at(9)),
			},
			Repositories: []v1alpha1.RepositoryStatus{{Name: "team/app", TagsWanted: 2, TagsPresent: 2}},
		},
	}
}

// statusYAML is a status for people to compare.
func statusYAML(t *testing.T, s v1alpha1.Status) string {
	t.Helper()
	data, err := yaml.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestCompose(t *testing.T) {
	complete := compose(aView(t))
	golden(t, "status-complete.yaml", statusYAML(t, complete))
	if strings.Contains(statusYAML(t, complete), "hunter2") {
		t.Error("a password is in the status")
	}

	v := aView(t)
	v.before, v.now = complete, at(20)
	again := compose(v)
	if diff := cmp.Diff(complete, again); diff != "" {
		t.Errorf("nothing changed, and the status did: %s", diff)
	}

	v.found.invalid = errors.New("spec.sync.schedule: is not a schedule")
	v.found.trust = settled(metav1.ConditionFalse, "SecretMissing")
	v.sync.ConnectionState = v1alpha1.ConnectionStateOffline
	v.sync.RegistrySyncResult.SyncState = v1alpha1.SyncStateFailed
	v.sync.RegistrySyncResult.Error = "parent registry.example.com refuses connections"
	v.sync.Changes = &v1alpha1.ChangesStatus{Waiting: 1, OldestTime: new(at(12)), Problems: []string{"the parent is away"}}
	bad := compose(v)
	golden(t, "status-bad.yaml", statusYAML(t, bad))

	v.before, v.now = bad, at(30)
	worse := compose(v)
	if diff := cmp.Diff(bad.StatusDetails, worse.StatusDetails); diff != "" {
		t.Errorf("the same problems have other times: %s", diff)
	}
	v.found.cr.Spec.Suspend = true
	golden(t, "status-suspended.yaml", statusYAML(t, compose(v)))
}

func TestComposeWithoutValidResource(t *testing.T) {
	s := compose(view{now: at(1), found: &findings{asked: &v1alpha1.ConnectedRegistry{}, invalid: errors.New("spec: nonsense")}})
	if !meta.IsStatusConditionFalse(s.Conditions, v1alpha1.ConditionReady) || !meta.IsStatusConditionFalse(s.Conditions, v1alpha1.ConditionAccepted) {
		t.Errorf("conditions: %+v", s.Conditions)
	}
}

func TestSyncingKeepsConditions(t *testing.T) {
	v := aView(t)
	v.sync.ConnectionState = v1alpha1.ConnectionStateOffline
	v.sync.RegistrySyncResult.SyncState = v1alpha1.SyncStateFailed
	v.before = compose(v)
	v.sync.ConnectionState = v1alpha1.ConnectionStateSyncing
	v.sync.RegistrySyncResult.SyncState = v1alpha1.SyncStateSyncing
	s := compose(v)
	if !meta.IsStatusConditionFalse(s.Conditions, v1alpha1.ConditionParentReachable) {
		t.Error("that a synchronisation began says that the parent is back")
	}
	if len(changes(v.before, s)) != 0 {
		t.Errorf("Events: %v", changes(v.before, s))
	}
}

// TestManyRepositories keeps the status small enough to be stored.
func TestManyRepositories(t *testing.T) {
	v := aView(t)
	v.sync.Repositories = nil
	for i := range 20_000 {
		r := v1alpha1.RepositoryStatus{Name: fmt.Sprintf("team/%05d", i), TagsWanted: 1, TagsPresent: 1}
		if i%1000 == 999 {
			r.TagsPresent, r.LastError = 0, strings.Repeat("very long ", 1000)
		}
		v.sync.Repositories = append(v.sync.Repositories, r)
	}
	s := compose(v)
	if s.Content.Repositories != 20_000 || s.Content.Complete != 19_980 || s.Content.TagsPresent != 19_980 {
		t.Errorf("content: %+v", s.Content)
	}
	incomplete := 0
	for _, r := range s.Repositories {
		if r.LastError != "" {
			incomplete++
		}
	}
	if len(s.Repositories) != maxRepositories || incomplete != 20 {
		t.Errorf("%d repositories, %d of them incomplete", len(s.Repositories), incomplete)
	}
	if n := len(statusYAML(t, s)); n > 256<<10 {
		t.Errorf("the status has %d bytes", n)
	}
}

func TestChanges(t *testing.T) {
	good := compose(aView(t))
	v := aView(t)
	v.before = good
	v.sync.ConnectionState = v1alpha1.ConnectionStateOffline
	v.sync.RegistrySyncResult.SyncState = v1alpha1.SyncStateFailed
	v.sync.RegistrySyncResult.Error = "parent registry.example.com refuses connections"
	away := compose(v)
	held := aView(t)
	held.sync.Repositories[0].RemovalsHeld = "9 of 10 tags are gone at the parent"
	invalid := aView(t)
	invalid.found.invalid = errors.New("spec.sync.schedule: nonsense")
	suspended := aView(t)
	suspended.found.cr.Spec.Suspend = true
	for _, test := range []struct {
		name          string
		before, after v1alpha1.Status
		want          []string
	}{
		{"nothing", good, good, nil},
		{"away", good, away, []string{"Warning ParentUnreachable parent registry.example.com refuses connections"}},
		{"still away", away, away, nil},
		{"back", away, good, []string{"Normal ParentReachable the parent answers again"}},
		{"a new leader", v1alpha1.Status{}, good, nil},
		{"held", good, compose(held), []string{"Warning RemovalsHeld team/app: 9 of 10 tags are gone at the parent"}},
		{"invalid", good, compose(invalid), []string{"Warning Invalid spec.sync.schedule: nonsense: the last valid resource stays in force"}},
		{"suspended", good, compose(suspended), []string{"Normal Inactive synchronisation is inactive now"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got []string
			for _, e := range changes(test.before, test.after) {
				kind := "Normal"
				if e.warning {
					kind = "Warning"
				}
				got = append(got, kind+" "+e.reason+" "+e.message)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}
