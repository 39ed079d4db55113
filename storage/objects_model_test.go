package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/storage/internal/membucket"
)

// The model has clients and collectors at several replicas, on an object store
// whose every call may take long before it is carried out and long after, may
// fail, or be carried out and seem to have failed, and processes that die between
// any two calls. What a client was told is there must be there. Time is not real:
// days pass in seconds, and the order in which calls are carried out follows from
// the delays, which are random.

const (
	modelDays   = 12
	modelMinAge = time.Hour
	modelGrace  = 10 * time.Minute
	modelTags   = 2
)

// process is one that may die. A slow one is held up in the middle of much that
// it does.
type process struct {
	dead atomic.Bool
	slow bool
}

type processKey struct{}

// as has what is done with a context be done by a process.
func (p *process) as(ctx context.Context) context.Context {
	return context.WithValue(ctx, processKey{}, p)
}

var errDied = errors.New("the process has died")

// weather is what calls meet.
type weather struct {
	mu   sync.Mutex
	rand *rand.Rand // guarded by mu
	calm atomic.Bool
}

func (w *weather) draw(slow bool) (delay time.Duration, fault bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	longest := []time.Duration{0, 0, 0, 50 * time.Millisecond, 50 * time.Millisecond, time.Second, time.Second, 20 * time.Second}[w.rand.IntN(8)]
	if w.rand.IntN(80) == 0 {
		longest = 20 * time.Minute
	}
	if slow && w.rand.IntN(8) == 0 {
		longest = 3 * time.Minute
	}
	if longest > 0 {
		delay = upTo(w.rand, longest)
	}
	return delay, w.rand.IntN(300) == 0
}

func upTo(r *rand.Rand, longest time.Duration) time.Duration {
	return time.Duration(r.Int64N(int64(longest)))
}

func (w *weather) meet(ctx context.Context, _, key string) error {
	p, ok := ctx.Value(processKey{}).(*process)
	if ok && p.dead.Load() {
		return errDied
	}
	if w.calm.Load() || !strings.HasPrefix(key, "docker/") && !strings.HasPrefix(key, "limbo/") {
		return nil
	}
	delay, fault := w.draw(ok && p.slow)
	if delay > 0 && !sleep(ctx, delay) {
		return context.Cause(ctx)
	}
	if ok && p.dead.Load() {
		return errDied
	}
	if fault {
		return errFault
	}
	return nil
}

// modelClient pushes to tags that are its own, deletes them, and looks after
// them.
type modelClient struct {
	t     *testing.T
	store *Store
	id    int
	rand  *rand.Rand
	tags  map[string]modelImage // by repository:tag, as acknowledged
	told  int                   // pushes that were acknowledged
}

type modelImage struct {
	manifest digest.Digest
	layers   []digest.Digest
}

func (c *modelClient) repo(name string) Repository {
	r, err := c.store.Repository(name)
	if err != nil {
		panic(err)
	}
	return r
}

func (c *modelClient) live(ctx context.Context) {
	for end := time.Now().Add(modelDays * 24 * time.Hour); time.Now().Before(end); {
		repo := []string{"a", "b/c"}[c.rand.IntN(2)]
		tag := fmt.Sprintf("t%d-%d", c.id, c.rand.IntN(modelTags))
		name := repo + ":" + tag
		delete(c.tags, name)
		if c.rand.IntN(3) == 0 {
			_ = c.repo(repo).DeleteTag(ctx, tag) // whether it is gone matters to nobody
		} else if image, err := c.push(ctx, repo, tag); err == nil {
			c.tags[name] = image
			c.told++
		}
		c.check(ctx)
		// Content is about to be deleted when it comes again, often.
		pause := upTo(c.rand, 4*time.Hour)
		if c.rand.IntN(2) == 0 {
			pause = modelMinAge + renewTime + upTo(c.rand, 4*modelGrace)
		}
		sleep(ctx, pause)
		c.check(ctx)
	}
}

// push does what a client and a registry do between them.
func (c *modelClient) push(ctx context.Context, repo, tag string) (image modelImage, err error) {
	began := time.Now()
	for range 1 + c.rand.IntN(2) {
		content := fmt.Appendf(nil, "layer %d", c.rand.IntN(40))
		d := digest.FromBytes(content)
		image.layers = append(image.layers, d)
		if f, err := c.repo(repo).OpenLayer(ctx, d); err == nil {
			f.Close()
			continue
		}
		switch c.rand.IntN(3) {
		case 0:
			_, err = upload(ctx, c.store, repo, content)
		case 1:
			other := []string{"a", "b/c"}[c.rand.IntN(2)]
			err = c.repo(repo).MountLayer(ctx, c.repo(other), d)
		default:
			if err = c.partial(ctx, d, content); err == nil {
				err = c.repo(repo).LinkLayer(ctx, d)
			}
		}
		if err != nil {
			return image, err
		}
	}
	looked := time.Now()
	for _, d := range image.layers {
		if _, err := c.repo(repo).UseLayer(ctx, d); err != nil {
			return image, err
		}
	}
	content := manifestOf("", image.layers, nil, fmt.Sprint(c.rand.IntN(3)))
	image.manifest = digest.FromBytes(content)
	if err := c.repo(repo).PutManifest(ctx, image.manifest, content, tag); err != nil {
		return image, err
	}
	if time.Since(looked) > modelMinAge || time.Since(began) > 3*modelMinAge {
		return image, errors.New("nobody waits for so long")
	}
	return image, nil
}

// partial is how the syncer stores a blob.
func (c *modelClient) partial(ctx context.Context, d digest.Digest, content []byte) error {
	p, err := c.store.OpenPartial(d, int64(len(content)), 1<<20)
	if err != nil {
		return err
	}
	if _, missing := p.Missing(0); missing > 0 {
		err = p.Write(0, content[int64(len(content))-missing:])
	}
	if err == nil {
		err = p.Commit(ctx)
	}
	return errors.Join(err, p.Close())
}

// check reads everything that it was told is there.
func (c *modelClient) check(ctx context.Context) {
	for name, image := range c.tags {
		repo, tag, _ := strings.Cut(name, ":")
		err := insist(ctx, func() error {
			d, err := c.repo(repo).Tag(ctx, tag)
			if err == nil && d != image.manifest {
				err = fmt.Errorf("it names %s", d)
			}
			if err == nil {
				_, err = c.repo(repo).Manifest(ctx, image.manifest)
			}
			return err
		})
		for _, d := range image.layers {
			if err == nil {
				err = insist(ctx, func() error { return readLayer(ctx, c.repo(repo), d) })
			}
		}
		if err != nil {
			c.t.Errorf("%s, %v: %v", name, image, err)
			delete(c.tags, name)
		}
	}
}

// insist tries again what failed because of the weather.
func insist(ctx context.Context, do func() error) (err error) {
	for range 200 {
		err = do()
		if err == nil || errors.Is(err, fs.ErrNotExist) || ctx.Err() != nil {
			return err
		}
		sleep(ctx, time.Second)
	}
	return err
}

func readLayer(ctx context.Context, r Repository, d digest.Digest) error {
	f, err := r.OpenLayer(ctx, d)
	if err != nil {
		return err
	}
	defer f.Close()
	got, err := digest.FromReader(f)
	if err == nil && got != d {
		err = fmt.Errorf("%s reads as %s", d, got)
	}
	return err
}

// modelCollector collects, dies, and is followed by another.
func modelCollector(ctx context.Context, s *Store, r *rand.Rand) (deleted int) {
	for ctx.Err() == nil {
		life := &process{slow: true}
		death := time.AfterFunc(upTo(r, 3*time.Hour), func() { life.dead.Store(true) })
		for !life.dead.Load() && ctx.Err() == nil {
			c, _ := s.pass(life.as(ctx), modelMinAge, modelGrace) // it goes on next time
			deleted += c.Blobs + c.Layers + c.Manifests
			sleep(ctx, upTo(r, 20*time.Minute))
		}
		death.Stop()
	}
	return deleted
}

func modelSeeds() int {
	n := 2
	if s := os.Getenv("STORAGE_TEST_SEEDS"); s != "" {
		fmt.Sscan(s, &n)
	}
	return n
}

func TestObjectsModel(t *testing.T) {
	for range modelSeeds() {
		seed := rand.Uint64()
		if s := os.Getenv("STORAGE_TEST_SEED"); s != "" {
			fmt.Sscan(s, &seed)
		}
		t.Run(fmt.Sprint(seed), func(t *testing.T) { synctest.Test(t, func(t *testing.T) { runModel(t, seed) }) })
	}
}

func runModel(t *testing.T, seed uint64) {
	w := &weather{rand: rand.New(rand.NewPCG(seed, 0))}
	w.calm.Store(true)
	b := &membucket.Bucket{Before: w.meet, After: w.meet}
	open := func() *Store {
		s, err := Open(t.Context(), Config{Root: t.TempDir(), Bucket: bucket.Bucket(b)})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	var stores []*Store
	for range 4 {
		stores = append(stores, open())
	}
	w.calm.Store(false)
	ctx, cancel := context.WithCancel(t.Context())
	var clients, collectors sync.WaitGroup
	var deleted atomic.Int64
	told := make([]int, 3)
	for i := range told {
		c := &modelClient{t: t, store: stores[i], id: i, rand: rand.New(rand.NewPCG(seed, uint64(i+1))), tags: make(map[string]modelImage)}
		clients.Go(func() {
			c.live(new(process).as(ctx))
			told[i] = c.told
		})
	}
	for i := range 2 {
		collectors.Go(func() {
			deleted.Add(int64(modelCollector(ctx, stores[2+i], rand.New(rand.NewPCG(seed, uint64(10+i))))))
		})
	}
	clients.Wait()
	cancel()
	collectors.Wait()
	w.calm.Store(true)
	for _, s := range stores {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%v pushes acknowledged, %d links and blobs deleted", told, deleted.Load())
	for i, n := range told {
		if n == 0 {
			t.Errorf("client %d got nothing done", i)
		}
	}
	if deleted.Load() == 0 {
		t.Error("nothing was deleted")
	}
}
