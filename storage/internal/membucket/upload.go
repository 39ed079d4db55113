package membucket

import (
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

const maxParts = 10_000

// Begin implements [bucket.Bucket].
func (b *Bucket) Begin(ctx context.Context, key string, metadata map[string]string) (id string, err error) {
	err = b.do(ctx, "Begin", key, func() error {
		if err := check(key, metadata); err != nil {
			return err
		}
		if b.uploads == nil {
			b.uploads = map[string]*upload{}
		}
		b.begun++
		id = fmt.Sprintf("upload-%d", b.begun)
		b.uploads[id] = &upload{key: key, metadata: maps.Clone(metadata), begun: time.Now(), parts: map[int][]byte{}}
		return nil
	})
	return id, err
}

// Part implements [bucket.Bucket].
func (b *Bucket) Part(ctx context.Context, key, id string, number int, content io.ReadSeeker, size int64) (part bucket.Part, err error) {
	data := make([]byte, size)
	if _, err := io.ReadFull(content, data); err != nil {
		return bucket.Part{}, fmt.Errorf("%s: part %d of %q: %w", b, number, key, err)
	}
	err = b.do(ctx, "Part", key, func() error {
		u, err := b.upload(key, id)
		if err != nil {
			return err
		}
		if number < 1 || number > maxParts {
			return fmt.Errorf("the part's number %d is not between 1 and %d", number, maxParts)
		}
		u.parts[number] = data
		part = bucket.Part{Number: number, Size: size, Tag: tag(data)}
		return nil
	})
	return part, err
}

func tag(data []byte) string { return fmt.Sprintf("%x", md5.Sum(data)) }

func (b *Bucket) upload(key, id string) (*upload, error) {
	u, ok := b.uploads[id]
	if !ok || u.key != key {
		return nil, fmt.Errorf("upload %q: %w", id, fs.ErrNotExist)
	}
	return u, nil
}

// Complete implements [bucket.Bucket].
func (b *Bucket) Complete(ctx context.Context, key, id string, parts []bucket.Part, metadata map[string]string) error {
	return b.do(ctx, "Complete", key, func() error {
		u, err := b.upload(key, id)
		if err != nil {
			return err
		}
		if !maps.Equal(metadata, u.metadata) {
			return errors.New("the metadata is not what the upload was begun with")
		}
		content, err := b.join(u, parts)
		if err != nil {
			return err
		}
		delete(b.uploads, id)
		_, err = b.put(key, content, metadata)
		return err
	})
}

// join is as particular as all object stores together.
func (b *Bucket) join(u *upload, parts []bucket.Part) ([]byte, error) {
	least := b.MinPart
	if least == 0 {
		least = 5 << 20
	}
	if len(parts) == 0 {
		return nil, errors.New("there are no parts")
	}
	var content []byte
	for i, part := range parts {
		data, ok := u.parts[part.Number]
		switch {
		case i > 0 && part.Number <= parts[i-1].Number:
			return nil, fmt.Errorf("part %d comes after part %d", part.Number, parts[i-1].Number)
		case !ok || tag(data) != part.Tag || int64(len(data)) != part.Size:
			return nil, fmt.Errorf("part %d is not what was uploaded", part.Number)
		case i < len(parts)-1 && (part.Size < least || part.Size != parts[0].Size), part.Size > parts[0].Size:
			return nil, fmt.Errorf("part %d has %d bytes, the first %d: all but the last must be equal, and have %d at least", part.Number, part.Size, parts[0].Size, least)
		}
		content = append(content, data...)
	}
	return content, nil
}

// Abort implements [bucket.Bucket].
func (b *Bucket) Abort(ctx context.Context, key, id string) error {
	return b.do(ctx, "Abort", key, func() error {
		if _, err := b.upload(key, id); err == nil {
			delete(b.uploads, id)
		}
		return nil
	})
}

// Uploads implements [bucket.Bucket].
func (b *Bucket) Uploads(ctx context.Context, prefix string) iter.Seq2[bucket.Unfinished, error] {
	return func(yield func(bucket.Unfinished, error) bool) {
		var found []bucket.Unfinished
		err := b.do(ctx, "Uploads", prefix, func() error {
			for _, id := range slices.Sorted(maps.Keys(b.uploads)) {
				if u := b.uploads[id]; strings.HasPrefix(u.key, prefix) {
					found = append(found, bucket.Unfinished{Key: u.key, Upload: id, Begun: u.begun})
				}
			}
			return nil
		})
		yieldAll(found, err, yield)
	}
}
