// Package bucket is an object store as the registry's storage needs it: Amazon
// S3 and what speaks its protocol, Azure Blob Storage, Google Cloud Storage.
//
// All of them are strongly consistent: what was written is read, and listed, by
// whoever asks next. This package imports nothing else of this module.
package bucket

import (
	"context"
	"errors"
	"io"
	"iter"
	"time"
)

// ErrCondition is wrapped by the error of a Put or a Copy whose condition did not
// hold.
var ErrCondition = errors.New("the object was changed by another")

// Attributes describe an object.
type Attributes struct {
	Key      string
	Size     int64     // bytes
	Modified time.Time // when it was last put, by the object store's clock, in whole seconds
	// Version is opaque and differs between any two puts of an object whose
	// contents differ, whoever made them. Those of equal contents may be equal.
	Version string
	// Metadata is what the object was put with; nil in a listing. Names consist
	// of lower-case letters and digits; "writer" is taken.
	Metadata map[string]string
}

// Conditions say what must hold for a Put to be carried out. The zero value is
// no condition.
type Conditions struct {
	Absent  bool   // there is no such object
	Version string // the object is there in this version
}

// Part is a part of an object, as Upload.Part returned it.
type Part struct {
	Number int    `json:"number"`
	Size   int64  `json:"size"`
	Tag    string `json:"tag"` // opaque
}

// Bucket is a bucket of an object store, or what lies below a prefix in one.
// Keys neither begin nor end with a slash, and no key is another's up to one of
// its slashes, as with files and directories: not every store could list both.
// Its methods may be called concurrently, try again what may succeed then, and
// end with their context.
//
// The error is fs.ErrNotExist for an object that is not there. Every other error
// names the bucket and what to do.
type Bucket interface {
	// Open reads length bytes of an object from offset on; a negative length
	// means to its end. Fewer come when the object ends before. The attributes
	// are those of the whole object. The body ends with an error when it breaks
	// off.
	Open(ctx context.Context, key string, offset, length int64) (io.ReadCloser, Attributes, error)
	// Stat describes an object.
	Stat(ctx context.Context, key string) (Attributes, error)
	// Put stores an object in one step. What it returns has no Metadata. The
	// error wraps ErrCondition when the conditions do not hold; it does not when
	// they held and only the answer got lost, so that of many exactly one wins,
	// unless somebody has replaced the object in that very moment.
	Put(ctx context.Context, key string, content []byte, metadata map[string]string, when Conditions) (Attributes, error)
	// Delete removes an object. One that is not there is no error.
	Delete(ctx context.Context, key string) error
	// List yields the objects whose keys begin with prefix and sort after
	// after, in byte order. With a delimiter of "/", those that have one after
	// the prefix are yielded once for each part up to it, as Attributes with
	// nothing but a Key that ends in the slash. The first error ends it. What
	// changes while it runs is listed, or not.
	List(ctx context.Context, prefix, after, delimiter string) iter.Seq2[Attributes, error]
	// Copy makes to a copy of from with other metadata, within the object
	// store, however large it is. from and to may be the same. Unless version
	// is empty, what is copied is that version of from: the error wraps
	// ErrCondition when another is there, or none.
	Copy(ctx context.Context, from, version, to string, metadata map[string]string) error

	// Begin begins an upload in parts, which other processes may go on with.
	// Nothing can be seen of it until Complete.
	Begin(ctx context.Context, key string, metadata map[string]string) (upload string, err error)
	// Part uploads a part; numbers begin with 1 and are at most 10,000. All
	// but the last have the same size, 5 MiB at least. A number that is
	// uploaded again replaces what there was. content is read from where it
	// stands, more than once.
	Part(ctx context.Context, key, upload string, number int, content io.ReadSeeker, size int64) (Part, error)
	// Complete puts the object together from all of its parts, in order of
	// their numbers, with the metadata that it was begun with. A part that was
	// replaced after Part returned it is an error, or is taken as it was. The
	// error is fs.ErrNotExist when there is no such upload.
	Complete(ctx context.Context, key, upload string, parts []Part, metadata map[string]string) error
	// Abort throws an upload away. One that is not there is no error.
	Abort(ctx context.Context, key, upload string) error
	// Uploads yields the uploads that were begun and neither completed nor
	// aborted, where the object store can tell, for whoever sweeps. prefix is
	// a whole key: MinIO tells of no other.
	Uploads(ctx context.Context, prefix string) iter.Seq2[Unfinished, error]

	// String names the bucket for people: "s3://images/edge".
	String() string
}

// Unfinished is an upload in parts that was begun.
type Unfinished struct {
	Key, Upload string
	Begun       time.Time
}
