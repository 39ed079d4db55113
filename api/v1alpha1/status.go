package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Status is what is there.
type Status struct {
	// ObservedGeneration is the generation of the spec that the rest is about.
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Version is the version of the program that wrote this.
	Version string `json:"version,omitempty"`
	// Activation says whether anything is synchronised; see Spec.Suspend.
	Activation *Activation `json:"activation,omitempty"`
	// LoginServer is where clients reach this registry.
	LoginServer *LoginServerStatus `json:"loginServer,omitempty"`
	// Parent is the registry that content comes from.
	Parent *ParentStatus `json:"parent,omitempty"`
	// ConnectionState is the state of the connection to the parent.
	ConnectionState ConnectionState `json:"connectionState,omitempty"`
	// LastSyncTime is the end of the last synchronisation that succeeded.
	LastSyncTime *metav1.Time `json:"lastSyncTime,omitempty"`
	// NextSyncTime is the start of the next synchronisation on schedule.
	NextSyncTime *metav1.Time `json:"nextSyncTime,omitempty"`
	// RegistrySyncResult is the last synchronisation, or the one under way.
	RegistrySyncResult *RegistrySyncResult `json:"registrySyncResult,omitempty"`
	// Delayed says in one line for each registry why requests to it wait: for
	// Sync.MaxRequestsPerHour, or because it asked for that. Empty: none does.
	Delayed []string `json:"delayed,omitempty"`
	// LastActivityTime is when a synchronisation last began or ended.
	LastActivityTime *metav1.Time `json:"lastActivityTime,omitempty"`
	// LastResync is the value of AnnotationResync that was last carried out.
	LastResync string `json:"lastResync,omitempty"`
	// StatusDetails are the problems there are, each once.
	StatusDetails []StatusDetail `json:"statusDetails,omitempty"`
	// Conditions say what can be relied on.
	//
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// Content sums Repositories up, including those that the list leaves out.
	Content *ContentStatus `json:"content,omitempty"`
	// Repositories says of each selected repository how complete it is, by
	// name. In a cluster there are 500 at most: the incomplete ones first.
	Repositories []RepositoryStatus `json:"repositories,omitempty"`
	// Changes says how far the parent is behind what clients changed here.
	Changes *ChangesStatus `json:"changes,omitempty"`
	// Notifications says how many were sent.
	Notifications *NotificationsStatus `json:"notifications,omitempty"`
	// Children are the connected registries whose parent this one is and that
	// read with a client token, by name.
	Children []Child `json:"children,omitempty"`
	// Trust says which CA certificates nodes trust, and how far a rotation got.
	Trust *TrustStatus `json:"trust,omitempty"`
}

// ChangesStatus says how far the parent is behind what clients pushed and deleted
// here. The counts are since the start of the syncer.
type ChangesStatus struct {
	// Waiting is how many changes are to be brought, OldestTime when the first of
	// them was made.
	Waiting    int          `json:"waiting"`
	OldestTime *metav1.Time `json:"oldestTime,omitempty"`
	// Brought are those that the parent has taken, Dropped those that it has not
	// within Sync.MessageTTL, Conflicts those that contradict one there.
	Brought   int `json:"brought"`
	Dropped   int `json:"dropped"`
	Conflicts int `json:"conflicts"`
	// Problems are why changes wait, and the last that were dropped or contradict
	// one at the parent, in one line each.
	Problems []string `json:"problems,omitempty"`
}

// NotificationsStatus counts notifications, each once for each receiver.
type NotificationsStatus struct {
	// Waiting are still to be sent.
	Waiting int `json:"waiting"`
	// Delivered and DeadLetters are those that were sent and given up since the
	// start of the syncer.
	Delivered   int `json:"delivered"`
	DeadLetters int `json:"deadLetters"`
	// LastError is why the last attempt failed. Empty: it did not.
	LastError string `json:"lastError,omitempty"`
}

// AnnotationResync on a ConnectedRegistry asks for a synchronisation now,
// whenever its value is one that was not there before; see
// SyncTriggerManual.
const AnnotationResync = Group + "/resync"

// Activation says whether anything is synchronised.
type Activation struct {
	Status ActivationStatus `json:"status"`
}

// ActivationStatus is Active or Inactive.
type ActivationStatus string

// The states.
const (
	ActivationActive   ActivationStatus = "Active"
	ActivationInactive ActivationStatus = "Inactive"
)

// LoginServerStatus is where clients reach the registry.
type LoginServerStatus struct {
	// Host is the host, with a port unless it is 443.
	Host string `json:"host"`
}

// ParentStatus is the registry that content comes from.
type ParentStatus struct {
	// Endpoint is its host, with a port unless it is the scheme's own.
	Endpoint string `json:"endpoint"`
	// SyncProperties say how it is synchronised with.
	SyncProperties SyncProperties `json:"syncProperties"`
}

// SyncProperties say how a parent is synchronised with, in Azure's words.
type SyncProperties struct {
	// TokenID is the name that the parent knows this registry by. Empty:
	// anonymous, or an identity.
	TokenID string `json:"tokenId,omitempty"`
	// Schedule, SyncWindow and MessageTTL are the spec's, with their defaults.
	Schedule   string `json:"schedule,omitempty"`
	SyncWindow string `json:"syncWindow,omitempty"`
	MessageTTL string `json:"messageTtl,omitempty"`
	// LastSyncTime is the end of the last synchronisation that succeeded.
	LastSyncTime *metav1.Time `json:"lastSyncTime,omitempty"`
	// GatewayEndpoint is the host that the connection string names. Empty:
	// there is none.
	GatewayEndpoint string `json:"gatewayEndpoint,omitempty"`
}

// StatusDetail is one problem.
type StatusDetail struct {
	// Code says what kind of problem it is, as one word.
	Code string `json:"code"`
	// CorrelationID is the same for as long as the problem stays.
	CorrelationID string `json:"correlationId,omitempty"`
	// Description is one line.
	Description string `json:"description"`
	// Timestamp is when the problem appeared.
	Timestamp metav1.Time `json:"timestamp"`
	// Type is how bad it is.
	Type DetailType `json:"type"`
}

// DetailType is how bad a problem is.
type DetailType string

// The types.
const (
	DetailError   DetailType = "Error"
	DetailWarning DetailType = "Warning"
)

// The types of the conditions, beside those of certificates.
const (
	// ConditionAccepted: the spec is valid. Otherwise the last valid one holds.
	ConditionAccepted = "Accepted"
	// ConditionRendered: replicas and nodes are told what the spec says.
	ConditionRendered = "Rendered"
	// ConditionParentReachable: the last synchronisation reached the parent.
	ConditionParentReachable = "ParentReachable"
	// ConditionSynced: everything that is selected was here at the end of the
	// last synchronisation.
	ConditionSynced = "Synced"
	// ConditionReady: all the others hold, but for ParentReachable and Synced:
	// what is here can be pulled.
	ConditionReady = "Ready"
)

// ContentStatus sums up how complete the repositories are.
type ContentStatus struct {
	// Repositories is how many are selected.
	Repositories int `json:"repositories"`
	// Complete is how many of them are complete.
	Complete int `json:"complete"`
	// TagsWanted, TagsPresent and BytesLeft are the sums of theirs.
	TagsWanted  int   `json:"tagsWanted"`
	TagsPresent int   `json:"tagsPresent"`
	BytesLeft   int64 `json:"bytesLeft"`
}

// ConnectionState is the state of the connection to the parent.
type ConnectionState string

// The states. Empty: no synchronisation has ended yet.
const (
	// ConnectionStateOnline: the last synchronisation reached the parent and
	// brought everything.
	ConnectionStateOnline ConnectionState = "Online"
	// ConnectionStateOffline: the parent could not be reached.
	ConnectionStateOffline ConnectionState = "Offline"
	// ConnectionStateSyncing: a synchronisation is under way.
	ConnectionStateSyncing ConnectionState = "Syncing"
	// ConnectionStateUnhealthy: the parent answered, but not everything could
	// be brought.
	ConnectionStateUnhealthy ConnectionState = "Unhealthy"
)

// RegistrySyncResult is one synchronisation.
type RegistrySyncResult struct {
	// SyncTrigger is what started it.
	SyncTrigger SyncTrigger `json:"syncTrigger,omitempty"`
	// SyncState is how far it got.
	SyncState SyncState `json:"syncState,omitempty"`
	// LastSyncStartTime is its start.
	LastSyncStartTime *metav1.Time `json:"lastSyncStartTime,omitempty"`
	// LastSyncEndTime is its end, absent while it is under way.
	LastSyncEndTime *metav1.Time `json:"lastSyncEndTime,omitempty"`
	// LastSuccessfulSyncEndTime is the end of the last one that succeeded.
	LastSuccessfulSyncEndTime *metav1.Time `json:"lastSuccessfulSyncEndTime,omitempty"`
	// Error is why it did not succeed, in one line.
	Error string `json:"error,omitempty"`
}

// SyncTrigger is what started a synchronisation.
type SyncTrigger string

// The triggers.
const (
	SyncTriggerInitial  SyncTrigger = "InitialSync"
	SyncTriggerManual   SyncTrigger = "ManualResync"
	SyncTriggerSchedule SyncTrigger = "Schedule"
	// SyncTriggerEvent: the spec or a Secret changed, or another leader took
	// over.
	SyncTriggerEvent SyncTrigger = "Event"
)

// SyncState is how far a synchronisation got.
type SyncState string

// The states.
const (
	SyncStateSyncing   SyncState = "Syncing"
	SyncStateSucceeded SyncState = "Succeeded"
	SyncStateFailed    SyncState = "Failed"
	// SyncStateTimedOut: the window ended before everything was here.
	SyncStateTimedOut SyncState = "TimedOut"
	// SyncStateNotActivated: nothing is synchronised; see Spec.Suspend.
	SyncStateNotActivated SyncState = "NotActivated"
)

// RepositoryStatus says how complete a repository is. It is complete when
// TagsPresent equals TagsWanted and LastError is empty.
type RepositoryStatus struct {
	// Name is the repository's name.
	Name string `json:"name"`
	// TagsWanted is how many tags the spec selects at the parent.
	TagsWanted int `json:"tagsWanted"`
	// TagsPresent is how many of those are here, whole, and stand for what they
	// stand for at the parent.
	TagsPresent int `json:"tagsPresent"`
	// BytesLeft is how many bytes are known to be missing here; those of
	// manifests that were not read yet are not known.
	BytesLeft int64 `json:"bytesLeft"`
	// LastError is why it is not complete, in one line.
	LastError string `json:"lastError,omitempty"`
	// RemovalsHeld is why tags that are gone at the parent, or no longer
	// selected, are still here, in one line; see Sync.MaxRemovals. Empty: none
	// is held.
	RemovalsHeld string `json:"removalsHeld,omitempty"`
}
