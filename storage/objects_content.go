package storage

import (
	"context"
	"fmt"
	"io"
	"io/fs"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// objectContent is the content of an object, of which no more is fetched than
// is read: nothing until the first Read, and from there on to the end, or to
// where Expect says. A bucket's body goes on by itself where it broke off, as long
// as the same version is there. When it can no more, the object is opened once
// again from that byte: by then another version may be there that is as good.
type objectContent struct {
	// open fetches length bytes from offset on, of the same content each time.
	open func(offset, length int64) (io.ReadCloser, error)
	name string
	size int64

	offset int64         // of the next byte that is read
	expect int64         // to where a body is fetched; 0: to the end
	body   io.ReadCloser // from offset on; nil: none is open
	left   int64         // bytes that body is still to bring
	broken bool          // the last body ended with an error, and without a byte
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
	return &objectContent{open: open, name: name, size: found.Size}
}

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
		c.offset, c.broken = offset, false
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
	for c.offset < c.size {
		if err := c.fetch(); err != nil {
			return 0, c.failed(err)
		}
		n, err := c.body.Read(p[:min(int64(len(p)), c.left)])
		c.offset += int64(n)
		c.left -= int64(n)
		if err != nil || c.left == 0 {
			c.drop()
		}
		if n > 0 {
			c.broken = false
			return n, nil // what is wrong, if anything, is wrong next time, too
		}
		if err != nil && c.broken {
			return 0, c.failed(err)
		}
		c.broken = err != nil
	}
	return 0, io.EOF
}

// fetch opens a body if there is none.
func (c *objectContent) fetch() error {
	if c.body != nil {
		return nil
	}
	end := c.size
	if c.offset < c.expect && c.expect < end {
		end = c.expect
	}
	body, err := c.open(c.offset, end-c.offset)
	if err != nil {
		return err
	}
	c.body, c.left = body, end-c.offset
	return nil
}

func (c *objectContent) failed(err error) error {
	return fmt.Errorf("reading %s at byte %d of %d: %w", c.name, c.offset, c.size, shortened(err))
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
