package controller_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
)

func succeeded(s v1alpha1.Status) bool {
	return s.ConnectionState == v1alpha1.ConnectionStateOnline && s.RegistrySyncResult != nil && s.RegistrySyncResult.SyncState == v1alpha1.SyncStateSucceeded
}

// TestRendersAndSynchronises has one syncer do all there is to do.
func TestRendersAndSynchronises(t *testing.T) {
	s := newSite(t)
	s.parent.push(t, "team/app:1", 4096, 3)
	s.secret("client", map[string]string{"password1": "correct horse"})
	s.create(fmt.Sprintf(`{
		"parent": {"endpoint": %q, "insecure": true}, "repositories": [{"name": "team/app"}],
		"loginServer": "registry.site.example",
		"clientTokens": [{"name": "ci", "secretRef": {"name": "client"}, "scopeMap": [{"repositories": ["**"], "actions": ["content/read"]}]}]}`, s.parent.host))
	p := s.syncer("one")
	status := s.await("synchronised", succeeded)

	if status.LoginServer.Host != "registry.site.example" || status.Parent.Endpoint != s.parent.host || status.Parent.SyncProperties.Schedule != "* * * * *" {
		t.Errorf("status: %+v %+v", status.LoginServer, status.Parent)
	}
	if status.Activation.Status != v1alpha1.ActivationActive || status.Version == "" || status.ObservedGeneration != 1 ||
		status.LastActivityTime == nil || status.NextSyncTime == nil || status.RegistrySyncResult.SyncTrigger == "" {
		t.Errorf("status: %+v", status)
	}
	if len(status.Repositories) != 1 || status.Repositories[0].TagsPresent != 1 || status.Content.Complete != 1 {
		t.Errorf("repositories: %+v %+v", status.Repositories, status.Content)
	}
	for _, c := range []string{v1alpha1.ConditionAccepted, v1alpha1.ConditionRendered, v1alpha1.ConditionSynced, v1alpha1.ConditionParentReachable} {
		if !meta.IsStatusConditionTrue(status.Conditions, c) {
			t.Errorf("condition %s: %+v", c, status.Conditions)
		}
	}

	replica, err := kube.CoreV1().Secrets(s.namespace).Get(t.Context(), "connected-registry-replica", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v1alpha1.Load("resource.yaml", replica.Data["resource.yaml"]); err != nil {
		t.Errorf("what replicas are told: %v\n%s", err, replica.Data["resource.yaml"])
	}
	var token clienttoken.File
	if err := json.Unmarshal(replica.Data["ci.json"], &token); err != nil || len(token.Passwords) != 1 || !clienttoken.PasswordMatches(token.Passwords[0], "correct horse") {
		t.Errorf("the client token: %s, %v", replica.Data["ci.json"], err)
	}
	node, err := kube.CoreV1().ConfigMaps(s.namespace).Get(t.Context(), "connected-registry-node", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	configuration, err := v1alpha1.LoadNodeConfiguration("node.yaml", []byte(node.Data["node.yaml"]))
	if err != nil {
		t.Fatalf("what nodes are told: %v\n%s", err, node.Data["node.yaml"])
	}
	if configuration.Names[0] != "registry.site.example" || len(configuration.Mirrors) != 1 || configuration.Mirrors[0].Registry != s.parent.host {
		t.Errorf("what nodes are told: %s", node.Data["node.yaml"])
	}
	if replica.OwnerReferences[0].Kind != v1alpha1.Kind || node.Labels["app.kubernetes.io/managed-by"] != "connected-registry" {
		t.Errorf("marks: %+v, %+v", replica.OwnerReferences, node.Labels)
	}

	t.Run("changes", func(t *testing.T) { s.changes(t, replica.Data) })
	if code := p.terminate(t); code != 0 {
		t.Errorf("the syncer ended with %d when it was told to end", code)
	}
	if who := s.holder(); who != "" {
		t.Errorf("%s did not give the lease back", who)
	}
}

// changes checks what follows from changes of the resource and its Secrets.
func (s *site) changes(t *testing.T, before map[string][]byte) {
	replica := func() map[string][]byte {
		secret, err := kube.CoreV1().Secrets(s.namespace).Get(t.Context(), "connected-registry-replica", metav1.GetOptions{})
		if err != nil {
			return nil
		}
		return secret.Data
	}
	shown := func() string { return fmt.Sprint(slices.Sorted(maps.Keys(replica()))) }

	s.patch(`{"spec": {"mode": "ReadWrite", "anonymousPull": true}}`)
	eventually(t, "the new mode is told to replicas", func() bool {
		return strings.Contains(string(replica()["resource.yaml"]), "mode: ReadWrite")
	}, shown)
	now := replica()
	if string(now["ci.json"]) != string(before["ci.json"]) || string(now["secret"]) != string(before["secret"]) {
		t.Error("what did not change has other bytes")
	}

	secret, err := kube.CoreV1().Secrets(s.namespace).Get(t.Context(), "client", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	secret.Data["password2"] = []byte("battery staple")
	if _, err := kube.CoreV1().Secrets(s.namespace).Update(t.Context(), secret, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the second password is told to replicas", func() bool {
		var token clienttoken.File
		return json.Unmarshal(replica()["ci.json"], &token) == nil && len(token.Passwords) == 2 &&
			strings.Contains(string(before["ci.json"]), token.Passwords[0])
	}, shown)

	if err := kube.CoreV1().Secrets(s.namespace).Delete(t.Context(), "connected-registry-replica", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a Secret that was deleted is back", func() bool { return replica()["resource.yaml"] != nil }, shown)

	// The schema lets this pass.
	s.patch(`{"spec": {"repositories": [{"name": "team/app", "tags": {"include": ["regex:("]}}]}}`)
	status := s.await("an invalid resource is told of", func(st v1alpha1.Status) bool {
		return meta.IsStatusConditionFalse(st.Conditions, v1alpha1.ConditionAccepted)
	})
	if status.ObservedGeneration < 3 || !meta.IsStatusConditionTrue(status.Conditions, v1alpha1.ConditionRendered) {
		t.Errorf("status of an invalid resource: %+v", status)
	}
	if strings.Contains(string(replica()["resource.yaml"]), "regex:(") {
		t.Error("replicas are told of an invalid resource")
	}
	s.patch(`{"spec": {"repositories": [{"name": "team/app"}, {"name": "team/other"}]}}`)
	s.parent.push(t, "team/other:1", 1024, 1)
	s.await("a repository that was added is here", func(st v1alpha1.Status) bool {
		return meta.IsStatusConditionTrue(st.Conditions, v1alpha1.ConditionAccepted) && len(st.Repositories) == 2 && st.Content.Complete == 2 && succeeded(st)
	})

	s.patch(`{"metadata": {"annotations": {"connectedregistry.io/resync": "now"}}}`)
	status = s.await("the resync that was asked for has ended", func(st v1alpha1.Status) bool { return st.LastResync == "now" })
	if status.RegistrySyncResult.SyncTrigger == v1alpha1.SyncTriggerInitial {
		t.Errorf("trigger %s", status.RegistrySyncResult.SyncTrigger)
	}

	s.patch(`{"spec": {"suspend": true}}`)
	s.await("suspended", func(st v1alpha1.Status) bool {
		return st.Activation.Status == v1alpha1.ActivationInactive && st.RegistrySyncResult.SyncState == v1alpha1.SyncStateNotActivated
	})
	s.patch(`{"spec": {"suspend": false}}`)
	s.await("active again", succeeded)

	s.parent.set(false, true)
	s.await("the parent is found away", func(st v1alpha1.Status) bool {
		return meta.IsStatusConditionFalse(st.Conditions, v1alpha1.ConditionParentReachable)
	})
	s.parent.set(false, false)
	s.await("the parent is found back", func(st v1alpha1.Status) bool {
		return meta.IsStatusConditionTrue(st.Conditions, v1alpha1.ConditionParentReachable)
	})
	eventually(t, "Events tell of it", func() bool {
		events, err := kube.CoreV1().Events(s.namespace).List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.kind=ConnectedRegistry"})
		if err != nil {
			return false
		}
		reasons := make(map[string]bool)
		for _, e := range events.Items {
			reasons[e.Reason] = true
		}
		return reasons["ParentUnreachable"] && reasons["ParentReachable"] && reasons["Invalid"] && reasons["Inactive"]
	}, func() string { return "" })
}

// TestLeaderKilled kills the leader in the midst of a copy; the other takes over
// and ends it.
func TestLeaderKilled(t *testing.T) {
	s := newSite(t)
	s.parent.push(t, "team/app:1", 4<<20, 4)
	s.parent.set(true, false)
	s.create(fmt.Sprintf(`{"parent": {"endpoint": %q, "insecure": true}, "repositories": [{"name": "team/app"}]}`, s.parent.host))
	one, two := s.leaderAndOther()
	s.await("the leader copies", isSyncing)
	if err := one.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	killed := time.Now()
	eventually(t, "the other leads", func() bool { return s.holder() == two.name }, two.log.String)
	t.Logf("the other leads %s after the kill", time.Since(killed).Round(time.Second/10))
	// What the dead one left behind does not stay: this start is the other's.
	s.await("the synchronisation is the other's", func(st v1alpha1.Status) bool {
		return st.RegistrySyncResult.LastSyncStartTime.After(killed)
	})
	s.parent.set(false, false)
	s.await("synchronised", succeeded)
	if code := two.terminate(t); code != 0 {
		t.Errorf("ended with %d", code)
	}
}

func isSyncing(s v1alpha1.Status) bool {
	return s.ConnectionState == v1alpha1.ConnectionStateSyncing && s.Content != nil && s.Content.TagsWanted > 0
}

// leaderAndOther starts two syncers and returns the one that leads first.
func (s *site) leaderAndOther() (leader, other *process) {
	s.t.Helper()
	one, two := s.syncer("one"), s.syncer("two")
	eventually(s.t, "one leads", func() bool { return s.holder() != "" }, one.log.String)
	if s.holder() == two.name {
		return two, one
	}
	return one, two
}

// TestLeaseLost cuts the leader off from the API server in the midst of a copy:
// it must have ended, with all its writing, before another may lead.
func TestLeaseLost(t *testing.T) {
	s := newSite(t)
	s.parent.push(t, "team/app:1", 64<<20, 1)
	s.parent.set(true, false)
	s.create(fmt.Sprintf(`{"parent": {"endpoint": %q, "insecure": true}, "repositories": [{"name": "team/app"}]}`, s.parent.host))
	leader := s.syncer("cut off")
	s.await("the leader copies", isSyncing)
	first := s.written(t)
	eventually(t, "bytes arrive", func() bool { return s.written(t) != first }, leader.log.String)
	leader.gate.shut()
	cut := time.Now()
	if code := leader.wait(t); code != 1 {
		t.Errorf("ended with %d", code)
	}
	t.Logf("ended %s after the cut", time.Since(cut).Round(time.Second/10))
	lease, err := kube.CoordinationV1().Leases(s.namespace).Get(t.Context(), "connected-registry-syncer", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if until := lease.Spec.RenewTime.Add(time.Duration(*lease.Spec.LeaseDurationSeconds) * time.Second); !time.Now().Before(until) {
		t.Errorf("it went on writing for %s after its lease had ended", time.Since(until))
	}
	after, state := s.written(t), s.status()
	other := s.syncer("other")
	eventually(t, "the other leads", func() bool { return s.holder() == other.name }, other.log.String)
	if after == "" || state.ConnectionState == "" {
		t.Error("nothing was written at all")
	}
	s.parent.set(false, false)
	s.await("synchronised", succeeded)
}

// written tells what is in the data directory, by name, size and time.
func (s *site) written(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(s.data, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // it has just been renamed
		}
		if info, err := d.Info(); err == nil && d.Type().IsRegular() {
			fmt.Fprintln(&all, path, info.Size(), info.ModTime().UnixNano())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}

// TestTermination ends the leader in the midst of a copy: the status does not say
// that it goes on, and the lease is free at once.
func TestTermination(t *testing.T) {
	s := newSite(t)
	s.parent.push(t, "team/app:1", 8<<20, 2)
	s.parent.set(true, false)
	s.create(fmt.Sprintf(`{"parent": {"endpoint": %q, "insecure": true}, "repositories": [{"name": "team/app"}]}`, s.parent.host))
	leader := s.syncer("one")
	s.await("the leader copies", isSyncing)
	if code := leader.terminate(t); code != 0 {
		t.Errorf("ended with %d", code)
	}
	status := s.status()
	if status.ConnectionState == v1alpha1.ConnectionStateSyncing || status.RegistrySyncResult.SyncState == v1alpha1.SyncStateSyncing {
		t.Errorf("the status says that a synchronisation goes on: %+v", status.RegistrySyncResult)
	}
	if who := s.holder(); who != "" {
		t.Errorf("%s did not give the lease back", who)
	}
}
