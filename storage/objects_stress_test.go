package storage

import (
	"context"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/storage/internal/membucket"
)

// configEnv names a file that says what object store tests are to use instead of
// one in memory, as bucket.Load reads it. Each test has a prefix of its own there.
const configEnv = "STORAGE_TEST_BUCKET"

func testBucket(t *testing.T) bucket.Bucket {
	t.Helper()
	file := os.Getenv(configEnv)
	if file == "" {
		return new(membucket.Bucket)
	}
	cfg, err := bucket.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	prefix := strings.ToLower(t.Name()) + "-" + strings.TrimPrefix(time.Now().Format(".000000000"), ".")
	switch {
	case cfg.S3 != nil:
		cfg.S3.Prefix = prefix
	case cfg.Azure != nil:
		cfg.Azure.Prefix = prefix
	case cfg.GCS != nil:
		cfg.GCS.Prefix = prefix
	}
	b, err := bucket.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Object stores count time in seconds.
const (
	objectsMinAge = 5 * time.Second
	objectsGrace  = time.Second
)

// TestObjectsCollectWhilePushing is TestCollectWhilePushing on an object store,
// with two collectors.
func TestObjectsCollectWhilePushing(t *testing.T) {
	t.Parallel()
	b := testBucket(t)
	open := func() *Store {
		s, err := Open(t.Context(), Config{Root: t.TempDir(), Bucket: b})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		s.renewAfter = 0
		return s
	}
	stores := []*Store{open(), open()}
	ctx, cancel := context.WithCancel(t.Context())
	var collecting, pushing sync.WaitGroup
	var freed, again atomic.Int64
	for _, leader := range []*Store{open(), open()} {
		collecting.Go(func() {
			for ctx.Err() == nil {
				c, err := leader.pass(ctx, objectsMinAge, objectsGrace)
				if err != nil && ctx.Err() == nil {
					t.Error(err)
				}
				freed.Add(int64(c.Blobs))
				sleep(ctx, objectsGrace/4)
			}
		})
	}
	var pushers []*pusher
	for id := range 4 {
		p := newPusher(t, stores, id, &again)
		pushers = append(pushers, p)
		pushing.Go(func() {
			for round := 0; round < stressRounds() || freed.Load() < 20; round++ {
				if err := p.round(ctx); err != nil {
					t.Errorf("pusher %d: %v", id, err)
					return
				}
				sleep(ctx, time.Duration(p.rand.IntN(200))*time.Millisecond)
			}
		})
	}
	pushing.Wait()
	cancel()
	collecting.Wait()
	t.Logf("%d blobs freed, %d pushes made again", freed.Load(), again.Load())
	leader := open()
	settle(t, leader, objectsMinAge+3*time.Second, objectsMinAge, objectsGrace)
	want := make(map[digest.Digest]bool)
	for _, p := range pushers {
		p.reachable(want)
	}
	for b, err := range leader.medium.blobs(t.Context(), false) {
		if err != nil {
			t.Fatal(err)
		}
		if !want[b.digest] {
			t.Errorf("%s is left over", b.digest)
		}
	}
	for _, p := range pushers {
		p.check()
	}
}
