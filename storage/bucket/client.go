package bucket

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"strings"
	"time"
)

// store is one kind of object store. Each method asks once, and returns what
// came back; client tries again, and explains. Keys are whole.
type store interface {
	// open's error is condition when version is not empty and not the object's.
	open(ctx context.Context, key string, offset, length int64, version string) (io.ReadCloser, Attributes, error)
	stat(ctx context.Context, key string) (Attributes, error)
	put(ctx context.Context, key string, content []byte, metadata map[string]string, when Conditions) (Attributes, error)
	delete(ctx context.Context, key string) error
	// list returns a page, and the token of the next one.
	list(ctx context.Context, prefix, after, delimiter, token string) (page []Attributes, next string, err error)
	begin(ctx context.Context, key string, metadata map[string]string) (string, error)
	part(ctx context.Context, key, upload string, number int, content io.ReadSeeker, size int64) (Part, error)
	abort(ctx context.Context, key, upload string) error
	uploads(ctx context.Context, prefix, token string) (page []Unfinished, next string, err error)
	// copy and complete take several steps, which they try again each.
	copy(ctx context.Context, from, version, to string, metadata map[string]string) error
	complete(ctx context.Context, key, upload string, parts []Part, metadata map[string]string) error
	// classify says what an error of the methods above means.
	classify(err error) fault
}

// client is a Bucket over a store.
type client struct {
	store  store
	name   string // for people
	prefix string // of all keys: empty, or ending in a slash
	remedies
	scratch string // what lies below it is the store's own; empty: nothing
}

// writer is the name of the metadata that tells whose conditional Put it was.
const writer = "writer"

var _ Bucket = (*client)(nil)

func (c *client) String() string { return c.name }

// Open implements [Bucket].
func (c *client) Open(ctx context.Context, key string, offset, length int64) (io.ReadCloser, Attributes, error) {
	if offset < 0 {
		return nil, Attributes{}, fmt.Errorf("%s: read %q: the offset %d is negative", c.name, key, offset)
	}
	b := &body{offset: offset}
	var at Attributes
	err := c.try(ctx, func() (err error) {
		b.from, at, err = c.store.open(ctx, c.prefix+key, offset, length, "")
		return err
	})
	if err != nil {
		return nil, Attributes{}, c.explain(ctx, "read", key, err)
	}
	b.left = max(0, at.Size-offset)
	if length >= 0 {
		b.left = min(b.left, length)
	}
	b.reopen = func(offset, length int64) (from io.ReadCloser, err error) {
		err = c.try(ctx, func() error {
			from, _, err = c.store.open(ctx, c.prefix+key, offset, length, at.Version)
			return err
		})
		return from, err
	}
	b.explain = func(err error) error { return c.explain(ctx, "read", key, err) }
	b.ended = ctx.Err
	return b, c.ours(at), nil
}

// Stat implements [Bucket].
func (c *client) Stat(ctx context.Context, key string) (Attributes, error) {
	at, err := c.stat(ctx, key)
	return c.ours(at), c.explain(ctx, "look at", key, err)
}

func (c *client) stat(ctx context.Context, key string) (at Attributes, err error) {
	err = c.try(ctx, func() (err error) {
		at, err = c.store.stat(ctx, c.prefix+key)
		return err
	})
	return at, err
}

// ours is at as our callers know it.
func (c *client) ours(at Attributes) Attributes {
	at.Key = strings.TrimPrefix(at.Key, c.prefix)
	at.Modified = at.Modified.UTC().Truncate(time.Second) // as HTTP tells it
	delete(at.Metadata, writer)
	return at
}

// Put implements [Bucket]. When an answer got lost, what a conditional Put finds
// the next time may be its own work, so it signs.
func (c *client) Put(ctx context.Context, key string, content []byte, metadata map[string]string, when Conditions) (Attributes, error) {
	conditional := when != Conditions{}
	signature := rand.Text()
	if conditional {
		metadata = maps.Clone(metadata)
		if metadata == nil {
			metadata = map[string]string{}
		}
		metadata[writer] = signature
	}
	var at Attributes
	again := false
	err := c.try(ctx, func() (err error) {
		at, err = c.store.put(ctx, c.prefix+key, content, metadata, when)
		if err != nil && again && conditional && c.store.classify(err).kind == condition {
			there, err2 := c.store.stat(ctx, c.prefix+key)
			switch {
			case err2 == nil && there.Metadata[writer] == signature:
				at, err = there, nil
			case err2 != nil && c.store.classify(err2).kind != missing:
				err = err2 // not known yet
			}
		}
		again = true
		return err
	})
	if err != nil {
		return Attributes{}, c.explain(ctx, "write", key, err)
	}
	at.Metadata = nil
	return c.ours(at), nil
}

// Delete implements [Bucket].
func (c *client) Delete(ctx context.Context, key string) error {
	err := c.try(ctx, func() error { return c.store.delete(ctx, c.prefix+key) })
	if err != nil && c.store.classify(err).kind == missing {
		return nil
	}
	return c.explain(ctx, "delete", key, err)
}

// List implements [Bucket].
func (c *client) List(ctx context.Context, prefix, after, delimiter string) iter.Seq2[Attributes, error] {
	return func(yield func(Attributes, error) bool) {
		start := after
		if start < prefix {
			start = "" // the prefix says more
		}
		if start != "" {
			start = c.prefix + start
		}
		pages(ctx, c, "list", prefix, func(token string) ([]Attributes, string, error) {
			return c.store.list(ctx, c.prefix+prefix, start, delimiter, token)
		}, func(at Attributes, err error) bool {
			if at = c.ours(at); err == nil && (at.Key <= after || c.scratch != "" && strings.HasPrefix(at.Key, c.scratch)) {
				return true
			}
			return yield(at, err)
		})
	}
}

// Uploads implements [Bucket].
func (c *client) Uploads(ctx context.Context, prefix string) iter.Seq2[Unfinished, error] {
	return func(yield func(Unfinished, error) bool) {
		pages(ctx, c, "list the uploads of", prefix, func(token string) ([]Unfinished, string, error) {
			return c.store.uploads(ctx, c.prefix+prefix, token)
		}, func(u Unfinished, err error) bool {
			u.Key = strings.TrimPrefix(u.Key, c.prefix)
			return yield(u, err)
		})
	}
}

// pages yields what all pages of a listing hold.
func pages[T any](ctx context.Context, c *client, what, prefix string, page func(token string) ([]T, string, error), yield func(T, error) bool) {
	var none T
	for token := ""; ; {
		var (
			found []T
			next  string
		)
		err := c.try(ctx, func() (err error) {
			found, next, err = page(token)
			return err
		})
		if err != nil {
			yield(none, c.explain(ctx, what, prefix, err))
			return
		}
		for _, one := range found {
			if !yield(one, nil) {
				return
			}
		}
		if next == "" {
			return
		}
		token = next
	}
}

// Copy implements [Bucket].
func (c *client) Copy(ctx context.Context, from, version, to string, metadata map[string]string) error {
	err := c.store.copy(ctx, c.prefix+from, version, c.prefix+to, metadata)
	if err != nil && version != "" && c.store.classify(err).kind == missing {
		err = ErrCondition
	}
	return c.explain(ctx, "copy", from, err)
}

// Begin implements [Bucket].
func (c *client) Begin(ctx context.Context, key string, metadata map[string]string) (upload string, err error) {
	err = c.try(ctx, func() (err error) {
		upload, err = c.store.begin(ctx, c.prefix+key, metadata)
		return err
	})
	return upload, c.explain(ctx, "begin the upload of", key, err)
}

// Part implements [Bucket].
func (c *client) Part(ctx context.Context, key, upload string, number int, content io.ReadSeeker, size int64) (part Part, err error) {
	start, err := content.Seek(0, io.SeekCurrent)
	if err != nil {
		return Part{}, fmt.Errorf("part %d of %q: %w", number, key, err)
	}
	err = c.try(ctx, func() error {
		if _, err := content.Seek(start, io.SeekStart); err != nil {
			return err
		}
		part, err = c.store.part(ctx, c.prefix+key, upload, number, &section{ReadSeeker: content, start: start, size: size}, size)
		return err
	})
	return part, c.explain(ctx, fmt.Sprintf("upload part %d of", number), key, err)
}

// Complete implements [Bucket]. When an answer got lost, the upload may be gone
// because it is complete.
func (c *client) Complete(ctx context.Context, key, upload string, parts []Part, metadata map[string]string) error {
	if len(parts) == 0 {
		return fmt.Errorf("%s: complete %q: there are no parts", c.name, key)
	}
	return c.explain(ctx, "complete the upload of", key, c.store.complete(ctx, c.prefix+key, upload, parts, metadata))
}

// Abort implements [Bucket].
func (c *client) Abort(ctx context.Context, key, upload string) error {
	err := c.try(ctx, func() error { return c.store.abort(ctx, c.prefix+key, upload) })
	if err != nil && c.store.classify(err).kind == missing {
		return nil
	}
	return c.explain(ctx, "abort the upload of", key, err)
}

func (c *client) try(ctx context.Context, act func() error) error {
	return try(ctx, c.store.classify, act)
}

// explain says what err means, and what to do about it.
func (c *client) explain(ctx context.Context, what, key string, err error) error {
	if err == nil {
		return nil
	}
	if ended := ctx.Err(); ended != nil {
		return fmt.Errorf("%s: %s %q: %w", c.name, what, key, ended)
	}
	f := c.store.classify(err)
	switch f.kind {
	case missing:
		return fmt.Errorf("%s: %s %q: %w", c.name, what, key, fs.ErrNotExist)
	case condition:
		return fmt.Errorf("%s: %s %q: %w", c.name, what, key, ErrCondition)
	}
	return fmt.Errorf("%s: %s %q: %s", c.name, what, key, c.remedies.describe(f))
}
