// Package syncer brings the content that a ConnectedRegistry selects from its
// parent registry into this registry's storage: what is wanted against what is
// here gives a plan, and the plan is carried out so that nobody ever sees an
// image that is not whole, whatever the parent does and whenever the process
// dies.
//
// # Bytes
//
// A blob comes in chunks, several at once where the parent sends parts, into a
// storage.Partial that whoever comes next goes on with; it counts when its digest
// does. One request of the queue's brings one chunk, so that what somebody waits
// for overtakes everything else within a chunk's time. Layers of a
// nondistributable type that list URLs are fetched by runtimes from there, and
// are neither fetched nor asked for here. Where a parent redirects to a storage,
// the credentials stay behind.
//
// # Questions
//
// A tag costs one HEAD; a manifest is read once and found by its digest ever
// after. All requests to a registry go by its pace, which outlives
// synchronisations: what it asked for with Retry-After or the headers of its rate
// limits, and the operator's budget.
//
// It may import api/v1alpha1, trust and storage; never registry or agent.
package syncer
