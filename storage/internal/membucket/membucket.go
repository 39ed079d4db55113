// Package membucket is an object store in memory, for tests alone: as strict as
// the real ones are, each in what it is strictest, with faults on demand. It
// imports storage/bucket and nothing else of this module.
package membucket

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// Hook is called with the name of the method ("Open", "Put", and "Read" for the
// body of an open object) and the key that it is about, a prefix for List and
// Uploads. Its error becomes the method's.
type Hook func(ctx context.Context, method, key string) error

// Bucket is an empty bucket until something is put. Its zero value may be used;
// its fields may be set before the first call only.
type Bucket struct {
	// Before is called before anything is done. It may block, panic, or do
	// something to the bucket itself.
	Before Hook
	// After is called when it was done: its error is the answer that got lost.
	After Hook
	// MinPart is what all parts but the last must have, in bytes. Zero means 5 MiB.
	MinPart int64

	mu      sync.Mutex
	objects map[string]object
	uploads map[string]*upload
	begun   int
}

type object struct {
	content  []byte
	modified time.Time
	metadata map[string]string
}

type upload struct {
	key      string
	metadata map[string]string
	begun    time.Time
	parts    map[int][]byte
}

var _ bucket.Bucket = (*Bucket)(nil)

// String names the bucket.
func (*Bucket) String() string { return "mem://bucket" }

// SetModified gives an object another time of its last put, without a hook.
func (b *Bucket) SetModified(key string, at time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if o, ok := b.objects[key]; ok {
		o.modified = at
		b.objects[key] = o
	}
}

// do carries one method out between the hooks.
func (b *Bucket) do(ctx context.Context, method, key string, act func() error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %s %q: %w", b, method, key, err)
	}
	if b.Before != nil {
		if err := b.Before(ctx, method, key); err != nil {
			return fmt.Errorf("%s: %s %q: %w", b, method, key, err)
		}
	}
	b.mu.Lock()
	err := act()
	b.mu.Unlock()
	if err == nil && b.After != nil {
		err = b.After(ctx, method, key)
	}
	if err != nil {
		return fmt.Errorf("%s: %s %q: %w", b, method, key, err)
	}
	return nil
}

// Open implements [bucket.Bucket].
func (b *Bucket) Open(ctx context.Context, key string, offset, length int64) (io.ReadCloser, bucket.Attributes, error) {
	var (
		o  object
		at bucket.Attributes
	)
	err := b.do(ctx, "Open", key, func() (err error) {
		if offset < 0 {
			return fmt.Errorf("the offset %d is negative", offset)
		}
		o, at, err = b.find(key)
		return err
	})
	if err != nil {
		return nil, bucket.Attributes{}, err
	}
	content := o.content[min(offset, int64(len(o.content))):]
	if length >= 0 {
		content = content[:min(length, int64(len(content)))]
	}
	return &body{ctx: ctx, bucket: b, key: key, r: bytes.NewReader(content)}, at, nil
}

// body is an open object. It keeps reading what it was opened on.
type body struct {
	ctx    context.Context
	bucket *Bucket
	key    string
	r      *bytes.Reader
	closed bool
}

func (b *body) Read(p []byte) (int, error) {
	if b.closed {
		return 0, fs.ErrClosed
	}
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	if b.bucket.Before != nil {
		if err := b.bucket.Before(b.ctx, "Read", b.key); err != nil {
			return 0, err
		}
	}
	return b.r.Read(p)
}

func (b *body) Close() error {
	b.closed = true
	return nil
}

// Stat implements [bucket.Bucket].
func (b *Bucket) Stat(ctx context.Context, key string) (at bucket.Attributes, err error) {
	err = b.do(ctx, "Stat", key, func() (err error) {
		_, at, err = b.find(key)
		return err
	})
	return at, err
}

func (b *Bucket) find(key string) (object, bucket.Attributes, error) {
	o, ok := b.objects[key]
	if !ok {
		return object{}, bucket.Attributes{}, fs.ErrNotExist
	}
	at := describe(key, o)
	at.Metadata = maps.Clone(o.metadata)
	return o, at, nil
}

// describe leaves the metadata out, as listings do. The version is that of equal
// contents, as on Amazon S3, and the time has no fractions, as in HTTP.
func describe(key string, o object) bucket.Attributes {
	sum := sha256.Sum256(o.content)
	return bucket.Attributes{Key: key, Size: int64(len(o.content)), Modified: o.modified, Version: hex.EncodeToString(sum[:16])}
}

// Put implements [bucket.Bucket].
func (b *Bucket) Put(ctx context.Context, key string, content []byte, metadata map[string]string, when bucket.Conditions) (at bucket.Attributes, err error) {
	err = b.do(ctx, "Put", key, func() error {
		old, there := b.objects[key]
		if when.Absent && there || when.Version != "" && (!there || describe(key, old).Version != when.Version) {
			return bucket.ErrCondition
		}
		o, err := b.put(key, bytes.Clone(content), metadata)
		at = describe(key, o)
		return err
	})
	if err != nil {
		return bucket.Attributes{}, err
	}
	return at, nil
}

func (b *Bucket) put(key string, content []byte, metadata map[string]string) (object, error) {
	if err := check(key, metadata); err != nil {
		return object{}, err
	}
	if b.objects == nil {
		b.objects = map[string]object{}
	}
	for other := range b.objects {
		if strings.HasPrefix(other, key+"/") || strings.HasPrefix(key, other+"/") {
			return object{}, fmt.Errorf("not every object store lists both this and %q", other)
		}
	}
	o := object{content: content, modified: time.Now().Truncate(time.Second), metadata: maps.Clone(metadata)}
	b.objects[key] = o
	return o, nil
}

func check(key string, metadata map[string]string) error {
	if key == "" || len(key) > 900 || strings.HasPrefix(key, "/") || strings.Contains(key, "//") || strings.HasSuffix(key, "/") {
		return errors.New("not every object store takes this key")
	}
	for name := range metadata {
		if name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
			return fmt.Errorf("not every object store takes %q as a name of metadata: lower-case letters and digits only", name)
		}
	}
	return nil
}

// Delete implements [bucket.Bucket].
func (b *Bucket) Delete(ctx context.Context, key string) error {
	return b.do(ctx, "Delete", key, func() error {
		delete(b.objects, key)
		return nil
	})
}

// List implements [bucket.Bucket]. What changes while it runs is listed, or not.
func (b *Bucket) List(ctx context.Context, prefix, after, delimiter string) iter.Seq2[bucket.Attributes, error] {
	return func(yield func(bucket.Attributes, error) bool) {
		for {
			var page []bucket.Attributes
			err := b.do(ctx, "List", prefix, func() error {
				page = b.page(prefix, after, delimiter)
				return nil
			})
			if !yieldAll(page, err, yield) || len(page) == 0 {
				return
			}
			after = page[len(page)-1].Key
		}
	}
}

// yieldAll yields what was found, or the error, and reports whether more is wanted.
func yieldAll[T any](found []T, err error, yield func(T, error) bool) bool {
	if err != nil {
		var none T
		yield(none, err)
		return false
	}
	for _, one := range found {
		if !yield(one, nil) {
			return false
		}
	}
	return true
}

// page is the next few of a listing.
func (b *Bucket) page(prefix, after, delimiter string) []bucket.Attributes {
	const size = 3
	names := map[string]bool{} // with those that stand for many
	for key := range b.objects {
		rest, ok := strings.CutPrefix(key, prefix)
		if !ok {
			continue
		}
		if folder, _, ok := strings.Cut(rest, delimiter); ok && delimiter != "" {
			key = prefix + folder + delimiter
		}
		if key > after {
			names[key] = true
		}
	}
	var page []bucket.Attributes
	for _, name := range slices.Sorted(maps.Keys(names)) {
		at := bucket.Attributes{Key: name}
		if o, ok := b.objects[name]; ok {
			at = describe(name, o)
		}
		if page = append(page, at); len(page) == size {
			break
		}
	}
	return page
}

// Copy implements [bucket.Bucket].
func (b *Bucket) Copy(ctx context.Context, from, version, to string, metadata map[string]string) error {
	return b.do(ctx, "Copy", from, func() error {
		o, ok := b.objects[from]
		if version != "" && (!ok || describe(from, o).Version != version) {
			return bucket.ErrCondition
		}
		if !ok {
			return fs.ErrNotExist
		}
		_, err := b.put(to, o.content, metadata)
		return err
	})
}
