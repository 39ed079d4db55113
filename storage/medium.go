package storage

import (
	"context"
	"io"
	"iter"
	"os"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/opencontainers/go-digest"
)

// medium is what a Store keeps its content on: a directory, or an object store.
// The Store decides what is kept, believed and collected; the medium knows how a
// thing is put in its place in one step and for good, how it bears the mark of
// having been verified, and how something that is condemned can still be had by
// whoever asks.
//
// Paths begin with a slash and are those of distribution's drivers, except for
// notes. What is not there is fs.ErrNotExist. Methods may be called concurrently,
// and by several processes at a time.
type medium interface {
	tree
	links
	blobs
	notes

	// driver is distribution's for what goes on below the Store: uploads, and
	// what distribution lists and reads. It never gets to see a blob's path,
	// nor PutContent, Move and Delete.
	driver() storagedriver.StorageDriver
	// ready finds out whether content can be read.
	ready(ctx context.Context) error
	// sweep removes what crashes and clients that gave up have left: uploads in
	// these repositories that nobody has written to since uploads, what was set
	// aside before aside, and whatever of its own it left half done.
	sweep(ctx context.Context, repositories []string, uploads, aside time.Time) (Swept, error)
}

// tree is distribution's layout, without regard to what its files are.
type tree interface {
	readFile(ctx context.Context, path string) ([]byte, error)
	// putFile stores a small file in one step, durably, in the place of what is
	// there.
	putFile(ctx context.Context, path string, content []byte) error
	// createFile is putFile for what must not be there yet, and else
	// fs.ErrExist: of several who try one succeeds. It is fs.ErrNotExist when
	// somebody removed what is around it meanwhile.
	createFile(ctx context.Context, path string, content []byte) error
	// move puts a file somewhere else, durably. An upload's data that goes to a
	// blob's path has been verified by distribution (see driver.Move) and comes
	// there sealed; whatever else goes there is unsealed.
	move(ctx context.Context, from, to string) error
	// remove removes a file, or everything below a path, condemned or not: for
	// whoever looks in one step if the medium can, and durably.
	remove(ctx context.Context, path string) error
	// removeUpload throws away an upload, given as the path of its folder. It
	// need not be there.
	removeUpload(ctx context.Context, path string) error
	// list returns what is in a folder, sorted by name, byte by byte. A medium
	// without empty folders returns fs.ErrNotExist for them.
	list(ctx context.Context, path string) ([]entry, error)
	// walk visits every file below a folder, which need not exist. modified is
	// when it was last put there.
	walk(ctx context.Context, path string, visit func(file string, modified func() (time.Time, error)) error) error
	// prune removes folders of a repository that hold nothing, where there are
	// such. all: the repository itself holds nothing.
	prune(ctx context.Context, repository string, all bool) error
	// repositories are the names of all of which there is anything, condemned
	// or not, whether they are valid or not.
	repositories(ctx context.Context) ([]string, error)
}

// entry is something in a folder.
type entry struct {
	name   string
	folder bool
}

// links are those by which repositories hold layers and manifests, and the others:
// small files that hold a digest. The path is that of the file, …/link.
type links interface {
	// readLink reads the digest in a link, of whatever kind. One that holds
	// none is as good as absent.
	readLink(ctx context.Context, path string) (digest.Digest, error)
	// look finds out when a link for d was last used, and what it names. Most
	// links need not be read for that.
	look(ctx context.Context, path string, d digest.Digest) (used time.Time, target digest.Digest, err error)
	// renew says that a link which was there just now is used now, and makes
	// sure that it stays: condemned, it is brought back. It makes no link. The
	// error is fs.ErrNotExist when the link is gone, and nil when the medium
	// cannot be written to.
	renew(ctx context.Context, path string) error
	// rescue brings a link back that was condemned, and reports whether it is
	// there now.
	rescue(ctx context.Context, path string) bool
	// putLink makes a link by which a repository holds something, or makes it
	// anew. made: there was none.
	putLink(ctx context.Context, path string, target digest.Digest) (made bool, err error)
	// links are those in a folder, <alg>/<hex>/link, condemned or not. What
	// comes back meanwhile may be there twice, but is not missing.
	links(ctx context.Context, folder string) ([]link, error)
	// condemn condemns a link, and looks after that when it was last used.
	condemn(ctx context.Context, l link) (used time.Time, err error)
	// reap deletes links that are condemned, all or none: none if one of them
	// has come back, or was used after cutoff.
	reap(ctx context.Context, all []link, cutoff time.Time) (reaped bool, err error)
}

// blobs are the stored contents, whose digests are valid.
type blobs interface {
	// openBlob opens a blob, and brings it back if it was condemned.
	openBlob(ctx context.Context, d digest.Digest) (Content, error)
	// statBlob looks at a blob and nothing else.
	statBlob(ctx context.Context, d digest.Digest) (size int64, v version, err error)
	// requireBlob makes sure that a blob which has just been linked to is there
	// and stays, and brings it back if it was condemned.
	requireBlob(ctx context.Context, d digest.Digest) (size int64, err error)
	// putBlob stores content that has been verified, sealed.
	putBlob(ctx context.Context, d digest.Digest, content []byte) error
	// takeBlob stores the content of a file that has been verified, sealed. The
	// file, on the local disk, is gone then; the caller closes it.
	takeBlob(ctx context.Context, d digest.Digest, f *os.File) error
	// peek reads a manifest, verified, without bringing it back.
	peek(ctx context.Context, d digest.Digest) ([]byte, error)

	// verifyBlob hashes a blob, whatever its seal says, and seals it if it is
	// right, or sets it aside. It is fs.ErrNotExist, too, when it was wrong and
	// has been replaced meanwhile.
	verifyBlob(ctx context.Context, d digest.Digest) (checked, error)
	// scrubBlob is verifyBlob for a blob that nobody asks for: what is right is
	// left as it is. pace is told of bytes as they are read.
	scrubBlob(ctx context.Context, d digest.Digest, pace func(n int)) (checked, error)

	// blobs yields all, those that are not condemned in the order of their
	// digests, with their sizes if these are asked for. The first error ends it.
	blobs(ctx context.Context, sizes bool) iter.Seq2[blob, error]
	// condemnBlob condemns a blob that came before then, and reports whether it
	// is condemned.
	condemnBlob(ctx context.Context, d digest.Digest, then time.Time) (bool, error)
	// restoreBlob undoes condemnBlob.
	restoreBlob(ctx context.Context, d digest.Digest) error
	// reapBlob deletes a blob that is condemned, unless it has come back.
	reapBlob(ctx context.Context, d digest.Digest) (size int64, reaped bool, err error)
}

// notes are small files beside the tree. Names have slashes inside, between
// folders; folders come and go by themselves.
type notes interface {
	readNote(ctx context.Context, name string) ([]byte, error)
	// writeNote puts a note in one step in the place of what there is. It stays
	// when the power fails if it is to be durable.
	writeNote(ctx context.Context, name string, content []byte, durable bool) error
	// moveNote gives a note, whose content is this, another name, durably: for
	// whoever lists them it is there under one of the two at least. If it is
	// gone, it is under the new name all the same.
	moveNote(ctx context.Context, from, to string, content []byte) error
	// removeNote removes a note, or an empty folder. What is not there is no
	// error.
	removeNote(ctx context.Context, name string) error
	// listNotes returns the notes in a folder, which need not exist, sorted by
	// name.
	listNotes(ctx context.Context, folder string) ([]noteInfo, error)
}

// noteInfo is a note in a folder.
type noteInfo struct {
	entry
	modified func() (time.Time, error) // when it was last written
}

// blob is a blob as it is listed.
type blob struct {
	digest    digest.Digest
	size      int64     // bytes, if asked for
	condemned time.Time // when; the zero time when it is not
}

// checked is what hashing a blob has found out.
type checked struct {
	size    int64
	version version // of what was read, as it was before
	aside   string  // where it is now if it was wrong, for people
}

// version tells what is in a blob's place from what else has been, or will be,
// there. It is comparable.
type version struct {
	file     fileID
	modified int64 // nanoseconds
	tag      string
	final    bool // what has been verified as this cannot change behind its seal
}

// Content is stored content, open for reading. The caller closes it.
type Content struct {
	// On a directory this is an *os.File: who hands it on as it is, to
	// http.ServeContent for one, has the kernel move the bytes.
	io.ReadSeekCloser
	// Size is how many bytes there are.
	Size int64
	// Modified is when it was stored; on a directory, a sealed file's seal.
	Modified time.Time

	version version
	sealed  bool // it is known to be right
}

// Expect says that nothing from end on, counted from the beginning, is going to be
// read, so that it need not be fetched. Should it be read all the same, it comes.
func (c Content) Expect(end int64) {
	if r, ok := c.ReadSeekCloser.(interface{ Expect(end int64) }); ok {
		r.Expect(end)
	}
}
