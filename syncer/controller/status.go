package controller

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/syncer/certificates"
)

const (
	// maxRepositories bounds the list in the status, which must fit into one
	// object.
	maxRepositories = 500
	// maxDetails bounds how many problems it tells of.
	maxDetails = 50
	// maxLine bounds a message, in bytes.
	maxLine = 1024
)

// view is everything that a status is made from.
type view struct {
	now     metav1.Time
	version string
	before  v1alpha1.Status // as it was last written
	found   *findings
	sync    v1alpha1.Status // as the engine has it
	engine  error           // why nothing is synchronised though it should be
}

// compose makes the status.
func compose(v view) v1alpha1.Status {
	s := *v.sync.DeepCopy()
	s.ObservedGeneration, s.Version = v.found.asked.Generation, v.version
	s.Activation = &v1alpha1.Activation{Status: v1alpha1.ActivationActive}
	s.Trust, s.Conditions = v.before.Trust, slices.Clone(v.before.Conditions)
	s.Content, s.Repositories = content(s.Repositories), incompleteFirst(s.Repositories)
	if v.found.certificates == nil && v.found.trust.Trust != nil {
		s.Trust = v.found.trust.Trust
	}
	if v.found.loginServer != "" {
		s.LoginServer = &v1alpha1.LoginServerStatus{Host: v.found.loginServer}
	} else {
		s.LoginServer = v.before.LoginServer
	}
	if cr := v.found.cr; cr != nil && cr.Spec.Suspend {
		suspend(&s)
	}
	s.LastActivityTime = lastActivity(s.RegistrySyncResult)
	s.Parent = parentStatus(v.found, s.LastSyncTime)
	setConditions(&s, v)
	s.StatusDetails = details(v)
	return s
}

// suspend says that nothing is synchronised.
func suspend(s *v1alpha1.Status) {
	s.Activation.Status = v1alpha1.ActivationInactive
	s.ConnectionState = v1alpha1.ConnectionStateOffline
	s.NextSyncTime = nil
	if s.RegistrySyncResult == nil {
		s.RegistrySyncResult = &v1alpha1.RegistrySyncResult{}
	}
	s.RegistrySyncResult.SyncState = v1alpha1.SyncStateNotActivated
}

func lastActivity(r *v1alpha1.RegistrySyncResult) *metav1.Time {
	if r == nil {
		return nil
	}
	if r.LastSyncEndTime != nil && !r.LastSyncEndTime.Before(r.LastSyncStartTime) {
		return r.LastSyncEndTime
	}
	return r.LastSyncStartTime
}

func parentStatus(f *findings, lastSync *metav1.Time) *v1alpha1.ParentStatus {
	if f.source == nil || f.cr == nil {
		return nil
	}
	return &v1alpha1.ParentStatus{
		Endpoint: f.source.Namespace,
		SyncProperties: v1alpha1.SyncProperties{
			TokenID:         f.source.Username,
			Schedule:        f.cr.Spec.Sync.Schedule,
			SyncWindow:      f.cr.Spec.Sync.Window,
			MessageTTL:      f.cr.Spec.Sync.MessageTTL,
			LastSyncTime:    lastSync,
			GatewayEndpoint: f.source.Gateway,
		},
	}
}

func isComplete(r v1alpha1.RepositoryStatus) bool {
	return r.LastError == "" && r.TagsPresent == r.TagsWanted
}

func content(all []v1alpha1.RepositoryStatus) *v1alpha1.ContentStatus {
	c := &v1alpha1.ContentStatus{Repositories: len(all)}
	for _, r := range all {
		if isComplete(r) {
			c.Complete++
		}
		c.TagsWanted += r.TagsWanted
		c.TagsPresent += r.TagsPresent
		c.BytesLeft += r.BytesLeft
	}
	return c
}

// incompleteFirst leaves complete repositories out when there are too many.
func incompleteFirst(all []v1alpha1.RepositoryStatus) []v1alpha1.RepositoryStatus {
	listed := slices.Clone(all)
	if len(listed) > maxRepositories {
		slices.SortStableFunc(listed, func(a, b v1alpha1.RepositoryStatus) int {
			return cmp.Compare(order(isComplete(a)), order(isComplete(b)))
		})
		listed = listed[:maxRepositories]
		slices.SortFunc(listed, func(a, b v1alpha1.RepositoryStatus) int { return cmp.Compare(a.Name, b.Name) })
	}
	for i := range listed {
		listed[i].LastError = oneLine(listed[i].LastError)
	}
	return listed
}

func order(last bool) int {
	if last {
		return 1
	}
	return 0
}

// setConditions changes the conditions that are there, so that those which stay
// keep their times.
func setConditions(s *v1alpha1.Status, v view) {
	set := func(conditionType string, status metav1.ConditionStatus, reason, message string) {
		setCondition(s, v.now, metav1.Condition{Type: conditionType, Status: status, Reason: reason, Message: oneLine(message)})
	}
	holds := func(conditionType string, err error, good, bad string) {
		if err != nil {
			set(conditionType, metav1.ConditionFalse, bad, err.Error())
		} else {
			set(conditionType, metav1.ConditionTrue, good, "")
		}
	}
	holds(v1alpha1.ConditionAccepted, v.found.invalid, "Valid", "Invalid")
	if v.found.cr == nil {
		set(v1alpha1.ConditionReady, metav1.ConditionFalse, "Invalid", "no valid resource was ever there")
		return
	}
	holds(v1alpha1.ConditionRendered, v.found.rendering, "Rendered", "NotRendered")
	if v.found.certificates == nil {
		for _, c := range v.found.trust.Conditions {
			c.Message = oneLine(c.Message)
			setCondition(s, v.now, c)
		}
	}
	syncConditions(s, v, set)
	for _, t := range []string{v1alpha1.ConditionAccepted, v1alpha1.ConditionRendered, certificates.ConditionCertificateReady, certificates.ConditionTrustDistributed} {
		c := meta.FindStatusCondition(s.Conditions, t)
		if c == nil {
			set(v1alpha1.ConditionReady, metav1.ConditionUnknown, "Unknown", t+" is not known yet")
			return
		}
		if c.Status != metav1.ConditionTrue {
			set(v1alpha1.ConditionReady, c.Status, c.Reason, t+": "+c.Message)
			return
		}
	}
	set(v1alpha1.ConditionReady, metav1.ConditionTrue, "Ready", "")
}

// syncConditions say how the last synchronisation ended. While one is under way
// they stay as they are.
func syncConditions(s *v1alpha1.Status, v view, set func(conditionType string, status metav1.ConditionStatus, reason, message string)) {
	r := s.RegistrySyncResult
	switch err := cmp.Or(v.found.parent, v.engine); {
	case v.found.cr.Spec.Suspend:
		set(v1alpha1.ConditionSynced, metav1.ConditionFalse, "Suspended", "spec.suspend is set")
		set(v1alpha1.ConditionParentReachable, metav1.ConditionUnknown, "Suspended", "spec.suspend is set")
	case err != nil:
		set(v1alpha1.ConditionSynced, metav1.ConditionFalse, "NotPossible", err.Error())
	case !v.found.active:
		set(v1alpha1.ConditionSynced, metav1.ConditionTrue, "NoParent", "")
		set(v1alpha1.ConditionParentReachable, metav1.ConditionUnknown, "NoParent", "")
	case r == nil:
		set(v1alpha1.ConditionSynced, metav1.ConditionFalse, "NotYet", "no synchronisation has ended yet")
		set(v1alpha1.ConditionParentReachable, metav1.ConditionUnknown, "NotYet", "no synchronisation has ended yet")
	case r.SyncState == v1alpha1.SyncStateSyncing:
		if meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionSynced) == nil {
			set(v1alpha1.ConditionSynced, metav1.ConditionFalse, "NotYet", "no synchronisation has ended yet")
			set(v1alpha1.ConditionParentReachable, metav1.ConditionUnknown, "NotYet", "no synchronisation has ended yet")
		}
	default:
		if r.SyncState == v1alpha1.SyncStateSucceeded {
			set(v1alpha1.ConditionSynced, metav1.ConditionTrue, "Complete", "")
		} else {
			set(v1alpha1.ConditionSynced, metav1.ConditionFalse, "Incomplete", r.Error)
		}
		if s.ConnectionState == v1alpha1.ConnectionStateOffline {
			set(v1alpha1.ConditionParentReachable, metav1.ConditionFalse, "Unreachable", r.Error)
		} else {
			set(v1alpha1.ConditionParentReachable, metav1.ConditionTrue, "Reachable", "")
		}
	}
}

func setCondition(s *v1alpha1.Status, now metav1.Time, c metav1.Condition) {
	if c.LastTransitionTime.IsZero() {
		c.LastTransitionTime = now
	}
	meta.SetStatusCondition(&s.Conditions, c)
}

// details are the problems there are, each with the time since when.
func details(v view) []v1alpha1.StatusDetail {
	var all []v1alpha1.StatusDetail
	add := func(code string, kind v1alpha1.DetailType, subject, description string) {
		if description == "" || len(all) == maxDetails {
			return
		}
		d := v1alpha1.StatusDetail{
			Code: code, Type: kind, CorrelationID: correlationID(code, subject),
			Description: oneLine(description), Timestamp: v.now,
		}
		for _, b := range v.before.StatusDetails {
			if b.CorrelationID == d.CorrelationID {
				d.Timestamp = b.Timestamp
			}
		}
		all = append(all, d)
	}
	addError := func(code string, err error) {
		if err != nil {
			add(code, v1alpha1.DetailError, "", err.Error())
		}
	}
	addError("InvalidResource", v.found.invalid)
	addError("NotRendered", v.found.rendering)
	addError("ParentUnusable", v.found.parent)
	addError("SynchronisationImpossible", v.engine)
	addError("CertificatesUnknown", v.found.certificates)
	if v.found.certificates == nil {
		for _, c := range v.found.trust.Conditions {
			if c.Status == metav1.ConditionFalse {
				add(c.Reason, v1alpha1.DetailWarning, c.Type, c.Message)
			}
		}
	}
	if v.sync.Changes != nil {
		for _, text := range v.sync.Changes.Problems {
			add("ChangeNotBrought", v1alpha1.DetailWarning, text, text)
		}
	}
	if v.sync.Notifications != nil {
		add("NotificationsFail", v1alpha1.DetailWarning, "", v.sync.Notifications.LastError)
	}
	if v.sync.ConnectionState == v1alpha1.ConnectionStateOffline && v.sync.RegistrySyncResult != nil {
		add("ParentUnreachable", v1alpha1.DetailError, "", v.sync.RegistrySyncResult.Error)
		return all // what each repository says is the same once more
	}
	for _, r := range v.sync.Repositories {
		if r.LastError != "" {
			add("RepositoryIncomplete", v1alpha1.DetailError, r.Name, r.Name+": "+r.LastError)
		}
		if r.RemovalsHeld != "" {
			add("RemovalsHeld", v1alpha1.DetailWarning, r.Name, r.Name+": "+r.RemovalsHeld)
		}
	}
	return all
}

// correlationID is the same for the same problem, however often it is found.
func correlationID(code, subject string) string {
	sum := sha256.Sum256([]byte(code + "\x00" + subject))
	return hex.EncodeToString(sum[:8])
}

// oneLine makes a message fit into the status.
func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > maxLine {
		s = strings.ToValidUTF8(s[:maxLine-len("…")], "") + "…"
	}
	return s
}

// event is a Kubernetes Event to be raised.
type event struct {
	warning         bool
	reason, message string
}

// changes are what a person must know of the step from one status to the next.
func changes(before, after v1alpha1.Status) []event {
	var all []event
	if turned(before, after, v1alpha1.ConditionAccepted, metav1.ConditionFalse) {
		all = append(all, event{true, "Invalid", message(after, v1alpha1.ConditionAccepted) + ": the last valid resource stays in force"})
	}
	if turned(before, after, v1alpha1.ConditionRendered, metav1.ConditionFalse) {
		all = append(all, event{true, "NotRendered", message(after, v1alpha1.ConditionRendered)})
	}
	if turned(before, after, v1alpha1.ConditionParentReachable, metav1.ConditionFalse) {
		all = append(all, event{true, "ParentUnreachable", message(after, v1alpha1.ConditionParentReachable)})
	}
	if is(before, v1alpha1.ConditionParentReachable, metav1.ConditionFalse) && is(after, v1alpha1.ConditionParentReachable, metav1.ConditionTrue) {
		all = append(all, event{false, "ParentReachable", "the parent answers again"})
	}
	known := make(map[string]bool)
	for _, d := range before.StatusDetails {
		known[d.CorrelationID] = true
	}
	for _, d := range after.StatusDetails {
		if !known[d.CorrelationID] && (d.Code == "RemovalsHeld" || d.Code == "ChangeNotBrought" || d.Code == "SynchronisationImpossible" || d.Code == "ParentUnusable") {
			all = append(all, event{true, d.Code, d.Description})
		}
	}
	if was, now := before.Activation, after.Activation; was != nil && now != nil && was.Status != now.Status {
		all = append(all, event{false, string(now.Status), fmt.Sprintf("synchronisation is %s now", strings.ToLower(string(now.Status)))})
	}
	return all
}

func is(s v1alpha1.Status, conditionType string, status metav1.ConditionStatus) bool {
	return meta.IsStatusConditionPresentAndEqual(s.Conditions, conditionType, status)
}

// turned reports whether a condition has become status, or says something else
// than before about it.
func turned(before, after v1alpha1.Status, conditionType string, status metav1.ConditionStatus) bool {
	return is(after, conditionType, status) && !is(before, conditionType, status)
}

func message(s v1alpha1.Status, conditionType string) string {
	if c := meta.FindStatusCondition(s.Conditions, conditionType); c != nil {
		return c.Message
	}
	return ""
}

// quick is how long a synchronisation may take without the status telling that
// it began: most find nothing to do.
const quick = 2 * time.Second

// justBegan reports whether a synchronisation is under way that may be over
// before anybody could read of it.
func justBegan(s v1alpha1.Status, now time.Time) bool {
	r := s.RegistrySyncResult
	return r != nil && r.SyncState == v1alpha1.SyncStateSyncing && r.LastSyncStartTime != nil && now.Sub(r.LastSyncStartTime.Time) < quick
}
