package storage

import (
	"context"
	"io"
	"log/slog"
	"sync"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"

	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// requests bounds how many requests one operation makes at a time.
const requests = 16

// inParallel calls do for each of the items, some at a time, until one fails.
func inParallel[T any](ctx context.Context, items []T, do func(ctx context.Context, item T) error) error {
	return inParallelOf(ctx, requests, items, do)
}

func inParallelOf[T any](ctx context.Context, n int, items []T, do func(ctx context.Context, item T) error) error {
	group, limited := errgroup.WithContext(ctx)
	group.SetLimit(n)
	for _, item := range items {
		if limited.Err() != nil {
			break
		}
		group.Go(func() error { return do(limited, item) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// readObject reads a small object.
func readObject(ctx context.Context, b bucket.Bucket, key string) ([]byte, bucket.Attributes, error) {
	body, at, err := b.Open(ctx, key, 0, -1)
	if err != nil {
		return nil, at, err
	}
	defer body.Close()
	content, err := io.ReadAll(body)
	if err == nil && int64(len(content)) != at.Size {
		err = io.ErrUnexpectedEOF
	}
	return content, at, err
}

// objects is the medium on an object store. Nothing is moved there in order to
// be condemned, or to be deleted: see tombstone.
type objects struct {
	bucket bucket.Bucket
	log    *slog.Logger
	files  *bucketDriver
	clock  storeClock
	// reapTime is how long a collector has for what it has begun to delete, and
	// waitTime how long others wait for it. They are reapTime and waitTime, but
	// for tests.
	reapTime, waitTime time.Duration
}

// openObjects proves that the object store keeps what this rests on: that of
// those who put an object on a condition, one does.
func openObjects(ctx context.Context, b bucket.Bucket, log *slog.Logger) (medium, error) {
	if err := bucket.Check(ctx, b); err != nil {
		return nil, err
	}
	o := &objects{bucket: b, log: log, files: &bucketDriver{bucket: b, part: partSize}, reapTime: reapTime, waitTime: waitTime}
	if err := o.measure(ctx); err != nil {
		return nil, err
	}
	return o, nil
}

func (o *objects) driver() storagedriver.StorageDriver { return o.files }

// ready finds out whether the bucket can be read, every other second, and so by
// the request that costs least: a list costs ten times as much.
func (o *objects) ready(ctx context.Context) error {
	_, _, err := readObject(ctx, o.bucket, clockKey)
	return ignoreAbsent(err)
}

// storeClock translates the object store's times, which come in whole seconds,
// to this machine's clock. What comes out is never too early, and too late by
// two seconds and the time that a request takes at most: content seems to have
// been used later than it was, which keeps it.
type storeClock struct {
	mu    sync.Mutex
	ahead time.Duration // of ours, at least; guarded by mu
}

// seen takes note of the time of an object that has just been put.
func (c *storeClock) seen(at bucket.Attributes) {
	ahead := time.Until(at.Modified)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ahead = ahead
}

func (c *storeClock) local(modified time.Time) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return modified.Add(time.Second - c.ahead)
}

// clockKey is what is put in order to see what time it is.
const clockKey = "clock"

// measure compares the clocks.
func (o *objects) measure(ctx context.Context) error {
	at, err := o.bucket.Put(ctx, clockKey, nil, nil, bucket.Conditions{})
	if err == nil {
		o.clock.seen(at)
	}
	return err
}
