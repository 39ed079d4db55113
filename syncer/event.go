package syncer

// EventKind says what an Event is about.
type EventKind string

// The kinds of event.
const (
	// EventPlanned: Repository was compared with the parent, which has Tags
	// tags that are wanted.
	EventPlanned EventKind = "planned"
	// EventStarted: the image Digest, which Tag and perhaps other tags of
	// Repository stand for, is being brought; Missing are its blobs that are to
	// come.
	EventStarted EventKind = "started"
	// EventFetched: Bytes more of the blob Digest have arrived.
	EventFetched EventKind = "fetched"
	// EventBlob: the blob Digest of Bytes bytes is stored, or was already here
	// and is linked now (Linked).
	EventBlob EventKind = "blob"
	// EventTagged: Repository:Tag is whole and stands for Digest.
	EventTagged EventKind = "tagged"
	// EventRemoved: Repository:Tag is gone at the parent, or no longer selected,
	// and has been removed.
	EventRemoved EventKind = "removed"
	// EventFailed: Repository, or Repository:Tag, could not be brought, for
	// Err.
	EventFailed EventKind = "failed"
)

// Event is one thing that happened during a synchronisation. Which fields are
// set is said at each EventKind; Repository always is.
type Event struct {
	Kind       EventKind
	Repository string
	Tag        string
	Digest     string
	Tags       int
	Bytes      int64
	Linked     bool
	Missing    []Blob
	Err        error
}

// Blob is a blob by its digest, with its size in bytes.
type Blob struct {
	Digest string
	Size   int64
}
