package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// maxResumed is how many times in a row a body may break off without a byte
// before the reader is told.
const maxResumed = 5

// objectContent is the content of an object, of which no more is fetched than
// is read: nothing until the first Read, and from there on to the end, or to
// where Expect says. A body that breaks off is gone on with from that byte.
type objectContent struct {
	// open fetches length bytes from offset on, of the same content each time.
	open func(offset, length int64) (io.ReadCloser, error)
	done <-chan struct{} // nobody waits for the content any more
	name string
	size int64

	offset int64         // of the next byte that is read
	expect int64         // to where a body is fetched; 0: to the end
	body   io.ReadCloser // from offset on; nil: none is open
	left   int64         // bytes that body is still to bring
	broken int           // bodies in a row that brought nothing
	closed bool
}

// newObjectContent reads an object as it was found. What has taken its place
// meanwhile is read only if it is as good.
func newObjectContent(ctx context.Context, b bucket.Bucket, name string, found bucket.Attributes, asGood func(now bucket.Attributes) bool) *objectContent {
	open := func(offset, length int64) (io.ReadCloser, error) {
		body, now, err := b.Open(ctx, found.Key, offset, length)
		if err != nil {
			return nil, err
		}
		if now.Version != found.Version && !asGood(now) {
			body.Close()
			return nil, fmt.Errorf("%s: %s was replaced while it was read", b, found.Key)
		}
		return body, nil
	}
	return &objectContent{open: open, done: ctx.Done(), name: name, size: found.Size}
}

// Size is that of the whole content, in bytes.
func (c *objectContent) Size() int64 { return c.size }

// Expect says that nothing from end on is going to be read, so that it need not
// be fetched. Should it be read all the same, it comes.
func (c *objectContent) Expect(end int64) { c.expect = end }

// Seek implements [io.Seeker]. It costs nothing.
func (c *objectContent) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += c.offset
	case io.SeekEnd:
		offset += c.size
	}
	if offset < 0 {
		return 0, fmt.Errorf("reading %s: %w: offset %d", c.name, fs.ErrInvalid, offset)
	}
	if offset != c.offset {
		c.drop()
		c.offset, c.broken = offset, 0
	}
	return offset, nil
}

// Read implements [io.Reader]. It never ends short: the error is io.EOF at the
// end of the content alone.
func (c *objectContent) Read(p []byte) (int, error) {
	if c.closed {
		return 0, fmt.Errorf("reading %s: %w", c.name, fs.ErrClosed)
	}
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if c.offset >= c.size {
			return 0, io.EOF
		}
		n, err := c.read(p)
		if n > 0 {
			c.broken = 0
			return n, nil // what is wrong, if anything, is wrong next time, too
		}
		if err == nil {
			continue
		}
		if c.broken++; c.broken > maxResumed || errors.Is(err, fs.ErrNotExist) || !c.pause() {
			return 0, fmt.Errorf("reading %s at byte %d of %d: %w", c.name, c.offset, c.size, shortened(err))
		}
	}
}

// read reads from the open body, which it opens if there is none.
func (c *objectContent) read(p []byte) (int, error) {
	if c.body == nil {
		end := c.size
		if c.offset < c.expect && c.expect < end {
			end = c.expect
		}
		body, err := c.open(c.offset, end-c.offset)
		if err != nil {
			return 0, err
		}
		c.body, c.left = body, end-c.offset
	}
	n, err := c.body.Read(p[:min(int64(len(p)), c.left)])
	c.offset += int64(n)
	c.left -= int64(n)
	if err != nil || c.left == 0 {
		c.drop()
	}
	return n, err
}

// pause waits a moment before the next attempt, and tells whether it is worth
// while.
func (c *objectContent) pause() bool {
	t := time.NewTimer(time.Duration(c.broken*c.broken) * 20 * time.Millisecond)
	defer t.Stop()
	select {
	case <-c.done:
		return false
	case <-t.C:
		return true
	}
}

func (c *objectContent) drop() {
	if c.body != nil {
		c.body.Close()
		c.body = nil
	}
}

// Close ends what is being fetched.
func (c *objectContent) Close() error {
	c.closed = true
	c.drop()
	return nil
}
