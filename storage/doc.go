// Package storage is the content store that registry replicas and the syncer
// share: the layout, storage driver and namespace of distribution v3 on a
// directory or in an object store, with integrity added underneath, at the
// driver, so that every reader gets it.
//
// What the two have in common is written once, in Store and what belongs to it,
// over the interface medium: what is kept, believed and collected. How a thing is
// put in its place in one step, sealed, condemned and brought back is for the
// medium to know: directory, described here, and objects.
//
// # Seals
//
// Content is verified against its digest once, when it is stored, and a mark
// on the file remembers it: the file's modification time is set to a value
// derived from the digest (see [SealTime]). The kernel keeps that mark honest.
// Any later write, and any copy or restore that does not carry times over,
// gives the file another modification time and so breaks the seal, and an
// unsealed file is hashed again before a byte of it is served. A read of a
// sealed file costs one stat, and the bytes can go from the page cache to the
// socket without passing through the program.
//
// A seal says that nobody wrote to the file through the file system. Decay of
// the medium underneath leaves times as they are; scrubbing, which hashes
// whatever the seals say, is what finds that.
//
// # Collection
//
// [Store.Maintain] frees the space of what nothing refers to while replicas and
// the syncer go on, in whatever process and on whatever machine, without a lock.
// A repository keeps what tags name, what the parent is still to be sent and what
// has been used lately, whatever these refer to, and whatever refers to these as
// its subject; the store keeps the blobs that a repository links to. A link is
// used when it is read or made, and its modification time remembers when, to the
// hour; so a manifest that is pulled by digest stays, and one that a tag has left
// stays for the reserve age. What is to go first goes to limbo, a second tree
// beside the first, from where any use brings it back, and is deleted when nobody
// has asked for it for the grace time.
//
// Beside the tree docker/registry/v2 the directory holds, each made when absent:
// limbo; trash, what is being deleted; quarantine, corrupt files, with damaged
// naming those that are wanted again; partial, blobs on their way in; journal;
// usage, how many bytes each repository takes; scrub.json, how far scrubbing has
// come. All but limbo and the journal can be deleted while nothing runs.
//
// # Journal
//
// What clients change while they may write is recorded in the [Journal], on the
// storage, before it is acknowledged: [Journal.Record] wraps the change. The one
// syncer reads [Journal.Entries], oldest first, compares each with what the
// store holds now, tells the parent, and removes what it has dealt with, or what
// has become too old, by [Journal.Done]. Entries of replicas whose clocks differ
// may be out of order, which is why an entry only says where to look. The
// syncer's own writes are not recorded.
//
// This package imports storage/bucket and nothing else of this module.
package storage
