package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/internal/membucket"
)

// These tests stop a collector, or a client, at each call to the object store in
// turn, before it is carried out or after, have the other do all of its work
// meanwhile, and let the first go on, or die.

// stop says where somebody is stopped.
type stop struct {
	process *process
	call    int64 // of the process, counted from 0
	after   bool  // the call is carried out before
	pause   time.Duration
	dies    bool

	calls   atomic.Int64
	hit     atomic.Bool
	stopped chan struct{} // closed when it is
}

// hooks makes a bucket in which that happens.
func (s *stop) hooks(b *membucket.Bucket) { b.Before, b.After = s.hook(false), s.hook(true) }

func (s *stop) hook(after bool) membucket.Hook {
	return func(ctx context.Context, method, _ string) error {
		if p, _ := ctx.Value(processKey{}).(*process); p != s.process || p == nil {
			return nil
		}
		if s.process.dead.Load() {
			return errDied
		}
		n := s.calls.Load()
		if after || method == "Read" {
			n--
		} else {
			s.calls.Add(1)
		}
		if n != s.call || after != s.after || method == "Read" || s.hit.Swap(true) {
			return nil
		}
		close(s.stopped)
		if s.dies {
			s.process.dead.Store(true)
			return errDied
		}
		if !sleep(ctx, s.pause) {
			return context.Cause(ctx)
		}
		return nil
	}
}

const stepsGrace = 10 * time.Minute

// collectToEnd makes passes until nothing waits any more.
func collectToEnd(ctx context.Context, s *Store) error {
	for range 12 {
		c, err := s.pass(ctx, time.Hour, stepsGrace)
		if err != nil {
			return err
		}
		if c.Waiting == 0 {
			return nil
		}
		sleep(ctx, stepsGrace+10*time.Second)
	}
	return errors.New("the collector never comes to an end")
}

// scene is what a client and a collector meet in: an image that was pushed long
// ago and has lost its tag.
type scene struct {
	t              *testing.T
	bucket         *membucket.Bucket
	client, leader *Store
	layer          []byte
	image          modelImage
	manifest       []byte
}

func newScene(t *testing.T, at *stop) *scene {
	s := &scene{t: t, bucket: new(membucket.Bucket), layer: []byte("layer")}
	at.hooks(s.bucket)
	s.client, s.leader = s.open(), s.open()
	s.image.layers = []digest.Digest{digest.FromBytes(s.layer)}
	s.manifest = manifestOf("", s.image.layers, nil, "")
	s.image.manifest = digest.FromBytes(s.manifest)
	if err := s.push(t.Context(), "a", "old"); err != nil {
		t.Fatal(err)
	}
	if err := s.repo("a").DeleteTag(t.Context(), "old"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * time.Hour)
	return s
}

func (s *scene) open() *Store {
	store, err := Open(s.t.Context(), Config{Root: s.t.TempDir(), Bucket: s.bucket})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { store.Close() })
	return store
}

func (s *scene) repo(name string) Repository {
	r, err := s.client.Repository(name)
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

// push is a client that sends what is not there.
func (s *scene) push(ctx context.Context, repo, tag string) error {
	r := s.repo(repo)
	f, err := r.OpenLayer(ctx, s.image.layers[0])
	if err == nil {
		f.Close()
	} else if _, err = upload(ctx, s.client, repo, s.layer); err != nil {
		return err
	}
	return s.pushManifest(ctx, r, tag)
}

func (s *scene) pushManifest(ctx context.Context, r Repository, tag string) error {
	if _, err := r.UseLayer(ctx, s.image.layers[0]); err != nil {
		return err
	}
	return r.PutManifest(ctx, s.image.manifest, s.manifest, tag)
}

// acts are what a client does, each with the repository that it leaves the image
// in, under the tag new.
var acts = map[string]func(ctx context.Context, s *scene) (repo string, err error){
	"push": func(ctx context.Context, s *scene) (string, error) {
		return "a", s.push(ctx, "a", "new")
	},
	"mount": func(ctx context.Context, s *scene) (string, error) {
		if err := s.repo("b").MountLayer(ctx, s.repo("a"), s.image.layers[0]); err != nil {
			return "b", err
		}
		return "b", s.pushManifest(ctx, s.repo("b"), "new")
	},
	"tag": func(ctx context.Context, s *scene) (string, error) {
		f, err := s.repo("a").OpenManifest(ctx, s.image.manifest)
		if err != nil {
			return "a", err
		}
		f.Close()
		return "a", s.pushManifest(ctx, s.repo("a"), "new")
	},
}

// readable tells whether an image is there, whole.
func (s *scene) readable(repo string) error {
	d, err := s.repo(repo).Tag(s.t.Context(), "new")
	if err == nil && d != s.image.manifest {
		err = fmt.Errorf("the tag names %s", d)
	}
	if err == nil {
		_, err = s.repo(repo).Manifest(s.t.Context(), d)
	}
	if err == nil {
		err = readLayer(s.t.Context(), s.repo(repo), s.image.layers[0])
	}
	return err
}

// finish collects once more, and looks for what was acknowledged; then it deletes
// it, and looks for what is left.
func (s *scene) finish(repo string, acknowledged bool) {
	s.t.Helper()
	ctx := s.t.Context()
	time.Sleep(5 * time.Hour)
	if err := collectToEnd(ctx, s.open()); err != nil {
		s.t.Fatal(err)
	}
	if acknowledged {
		if err := s.readable(repo); err != nil {
			s.t.Errorf("acknowledged, and lost: %v", err)
		}
	}
	if err := s.repo(repo).DeleteTag(ctx, "new"); ignoreAbsent(err) != nil {
		s.t.Fatal(err)
	}
	time.Sleep(9 * 24 * time.Hour)
	leader := s.open()
	if err := collectToEnd(ctx, leader); err != nil {
		s.t.Fatal(err)
	}
	for range 2 { // tombstones go when what they were about has been gone for long
		if _, err := leader.sweep(ctx, 7*24*time.Hour, 30*24*time.Hour); err != nil {
			s.t.Fatal(err)
		}
		time.Sleep(48 * time.Hour)
	}
	for at, err := range s.bucket.List(ctx, "", "", "") {
		if err != nil || strings.HasPrefix(at.Key, "docker/") || strings.HasPrefix(at.Key, "limbo/") {
			s.t.Errorf("%s is left over, %v", at.Key, err)
		}
	}
}

// eachStop runs a scene for each call at which somebody can be stopped.
func eachStop(t *testing.T, pauses []time.Duration, run func(t *testing.T, s *scene, at *stop)) {
	t.Helper()
	for _, pause := range pauses {
		for _, after := range []bool{false, true} {
			last := false
			for call := int64(0); !last; call++ {
				at := &stop{process: new(process), call: call, after: after, pause: pause, dies: pause == 0}
				synctest.Test(t, func(t *testing.T) {
					at.stopped = make(chan struct{})
					run(t, newScene(t, at), at)
				})
				if t.Failed() {
					t.Fatalf("stopped at call %d, after it: %v, for %v (0: it dies)", call, after, pause)
				}
				if last = at.calls.Load() <= call; last && call < 10 {
					t.Fatalf("there are but %d calls", call)
				}
			}
		}
	}
}

func TestObjectsCollectorIsStopped(t *testing.T) {
	for name, act := range acts {
		t.Run(name, func(t *testing.T) {
			eachStop(t, []time.Duration{0, 30 * time.Second, 10 * time.Minute}, func(t *testing.T, s *scene, at *stop) {
				var collecting sync.WaitGroup
				ended := make(chan struct{})
				collecting.Go(func() {
					defer close(ended)
					_ = collectToEnd(at.process.as(t.Context()), s.leader) // it may have died
				})
				select {
				case <-at.stopped:
				case <-ended:
				}
				repo, err := act(t.Context(), s)
				if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errReaping) {
					t.Error(err)
				}
				collecting.Wait()
				s.finish(repo, err == nil)
			})
		})
	}
}

func TestObjectsClientIsStopped(t *testing.T) {
	for name, act := range acts {
		t.Run(name, func(t *testing.T) {
			eachStop(t, []time.Duration{0, 30 * time.Second, 20 * time.Minute}, func(t *testing.T, s *scene, at *stop) {
				var client sync.WaitGroup
				var repo string
				var err error
				ended := make(chan struct{})
				client.Go(func() {
					defer close(ended)
					repo, err = act(at.process.as(t.Context()), s)
				})
				select {
				case <-at.stopped:
				case <-ended:
				}
				for range 3 { // condemned, links deleted, blobs deleted
					if _, err := s.leader.pass(t.Context(), time.Hour, 0); err != nil {
						t.Error(err)
					}
					sleep(t.Context(), 3*time.Second)
				}
				client.Wait()
				s.finish(repo, err == nil)
			})
		})
	}
}

// A deletion that died half way is made again, and then everything is gone.
func TestObjectsDeletionDies(t *testing.T) {
	for name, remove := range map[string]func(ctx context.Context, r Repository, d digest.Digest) error{
		"manifest":   func(ctx context.Context, r Repository, d digest.Digest) error { return r.DeleteManifest(ctx, d) },
		"repository": func(ctx context.Context, r Repository, _ digest.Digest) error { return r.DeleteRepository(ctx) },
	} {
		t.Run(name, func(t *testing.T) {
			eachStop(t, []time.Duration{0}, func(t *testing.T, s *scene, at *stop) {
				if err := s.push(t.Context(), "b", "new"); err != nil {
					t.Fatal(err)
				}
				r := s.repo("b")
				if err := remove(at.process.as(t.Context()), r, s.image.manifest); err != nil && !at.process.dead.Load() {
					t.Fatal(err)
				}
				if err := remove(t.Context(), r, s.image.manifest); ignoreAbsent(err) != nil {
					t.Fatal(err)
				}
				if _, err := r.Manifest(t.Context(), s.image.manifest); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("the manifest is there: %v", err)
				}
				if d, err := r.Tag(t.Context(), "new"); err == nil {
					t.Errorf("the tag names %s", d)
				}
				s.finish("b", false)
			})
		})
	}
}
