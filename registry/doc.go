// Package registry is one replica of the central registry: the OCI distribution
// API, version 1.1, over the shared content store.
//
// distribution v3 is the engine of pushes, deletions and lists. What every pull
// needs, GET and HEAD of manifests and blobs, is answered by this package
// straight from the store's files, so that bytes go from the page cache to the
// socket and a manifest costs a handful of system calls.
//
// A replica keeps nothing in memory that another replica could make stale, and
// talks to nobody to serve a request. It may import storage, trust and api of
// this module.
package registry
