package storage

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	// The algorithms a digest may name; go-digest leaves linking them to its user.
	_ "crypto/sha256"
	_ "crypto/sha512"

	"github.com/opencontainers/go-digest"
)

// ErrCorrupt is wrapped by the error that reports content that does not match
// its digest.
var ErrCorrupt = errors.New("content does not match its digest")

// errUnstable reports a file that was written to while it was being hashed.
var errUnstable = errors.New("file changed while it was being verified")

// sealEpoch is the earliest seal time: 2001-09-09. The latest is 2^29 seconds
// later, in 2018, so no clock that is anywhere near right produces a seal by
// accident.
const sealEpoch = 1_000_000_000

// SealTime returns the modification time that marks a file as verified content
// of d: an even number of whole seconds between 2001 and 2018, which the
// coarsest file systems in use can store exactly. It is the zero time when d is
// not a valid digest.
func SealTime(d digest.Digest) time.Time {
	if !validDigest(d) {
		return time.Time{}
	}
	head, err := hex.DecodeString(d.Encoded()[:8])
	if err != nil {
		return time.Time{}
	}
	n := int64(binary.BigEndian.Uint32(head) & (1<<28 - 1))
	return time.Unix(sealEpoch+2*n, 0)
}

// Sealed reports whether fi describes a regular file that bears the seal of d.
// It costs no I/O; fi must come from a stat of the open file, or of the path
// that the caller is about to answer for.
func Sealed(fi fs.FileInfo, d digest.Digest) bool {
	t := SealTime(d)
	return !t.IsZero() && fi.Mode().IsRegular() && fi.ModTime().Equal(t)
}

// Seal marks f as verified content of d. The caller has just checked every byte
// and holds off whoever could write to the file; Seal checks nothing. The file
// may be open for reading only, but must belong to the user of this process.
//
// The data is flushed to stable storage first: a seal that outlives the bytes
// it vouches for, as it could when the power fails, would be a lie. The seal
// itself is not flushed; losing it costs one more hash.
func Seal(f *os.File, d digest.Digest) error {
	t := SealTime(d)
	if t.IsZero() {
		return fmt.Errorf("sealing %s: invalid digest %q", f.Name(), d)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sealing %s: %w", f.Name(), err)
	}
	if err := setModTime(f, t); err != nil {
		return fmt.Errorf("sealing %s: %w", f.Name(), err)
	}
	return nil
}

// Verify hashes the whole of f, whatever seal it bears, and seals it when it is
// content of d. The file offset is neither used nor changed.
//
// Errors: one that wraps ErrCorrupt when the content is not that of d; the
// cause of ctx when it ends first; otherwise what reading the file reported. A
// file that is right but cannot be sealed (it belongs to another user, or the
// file system is read-only) is not an error: it is hashed again next time.
func Verify(ctx context.Context, f *os.File, d digest.Digest) error {
	if err := hashFile(ctx, f, d, nil); err != nil {
		return err
	}
	if err := Seal(f, d); err != nil && !errors.Is(err, fs.ErrPermission) && !readOnlyFS(err) {
		return err
	}
	return nil
}

// OpenVerified opens the file at path for reading once it is known to hold
// content of d: at once when it is sealed, after Verify when it is not. The
// FileInfo describes the open file. Errors are those of os.Open and Verify;
// the caller decides what becomes of a corrupt file.
func OpenVerified(ctx context.Context, path string, d digest.Digest) (*os.File, fs.FileInfo, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	fi, err := f.Stat()
	if err == nil && !Sealed(fi, d) {
		if err = Verify(ctx, f, d); err == nil {
			fi, err = f.Stat()
		}
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, fi, nil
}

// hashFile compares the content of f with d. The times and size before and
// after must agree, so that a write which lands behind the hash cannot be
// hidden by the seal that follows. pace is told of what has been read; nil: nobody.
func hashFile(ctx context.Context, f *os.File, d digest.Digest, pace func(n int)) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("verifying %s: digest %q: %w", f.Name(), d, err)
	}
	before, err := f.Stat()
	if err != nil {
		return fmt.Errorf("verifying %s: %w", f.Name(), err)
	}
	if !before.Mode().IsRegular() {
		return fmt.Errorf("verifying %s: not a regular file", f.Name())
	}
	v := d.Verifier()
	content := io.NewSectionReader(f, 0, 1<<63-1)
	if _, err := io.CopyBuffer(v, &contextReader{ctx, content, pace}, make([]byte, 256<<10)); err != nil {
		return fmt.Errorf("verifying %s: %w", f.Name(), err)
	}
	if !v.Verified() {
		return fmt.Errorf("verifying %s: %w: expected %s", f.Name(), ErrCorrupt, d)
	}
	after, err := f.Stat()
	if err != nil {
		return fmt.Errorf("verifying %s: %w", f.Name(), err)
	}
	touched := !after.ModTime().Equal(before.ModTime()) && !Sealed(after, d) // another reader may have sealed it
	if touched || after.Size() != before.Size() {
		return fmt.Errorf("verifying %s: %w", f.Name(), errUnstable)
	}
	return nil
}

// contextReader ends a long read when its context does. It lives for one call
// of hashFile.
type contextReader struct {
	ctx  context.Context
	r    io.Reader
	pace func(n int)
}

func (c *contextReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	n, err := c.r.Read(p)
	if c.pace != nil {
		c.pace(n)
	}
	return n, err
}
