// Package storage is the content store that registry replicas and the syncer
// share: the layout, storage driver and namespace of distribution v3 on a
// directory, with integrity added underneath, at the driver, so that every
// reader gets it.
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
// This package imports nothing else of this module.
package storage
