package storage

import (
	"context"
	"errors"
	"io/fs"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/storage/internal/membucket"
)

// attack is an upload that two connections go on with at once, each with bytes of
// its own, and as many. Each is stopped at a call to the object store, and the
// other goes on.
type attack struct {
	begun   []byte    // what is there before
	bytes   [2][]byte // that each adds
	claimed [2]digest.Digest
	stops   [2]*stop
	// inTwo: the second adds in one request and finishes in another.
	inTwo bool
	// deleted: a third deletes the upload while both are stopped, and the second
	// goes on first.
	deleted bool
}

// request adds to the upload, and finishes it as content of claim unless that is
// empty.
func request(ctx context.Context, s *Store, id string, content []byte, claim digest.Digest) error {
	named, err := reference.WithName("app")
	if err != nil {
		return err
	}
	repo, err := s.Namespace().Repository(ctx, named)
	if err != nil {
		return err
	}
	w, err := repo.Blobs(ctx).Resume(ctx, id)
	if err != nil {
		return err
	}
	if _, err := w.Write(content); err != nil {
		return errors.Join(err, w.Close())
	}
	if claim == "" {
		return w.Close()
	}
	_, err = w.Commit(ctx, v1.Descriptor{Digest: claim})
	return err
}

// replica is a Store whose uploads are of small parts.
func replica(t *testing.T, b *membucket.Bucket) *Store {
	s, err := Open(t.Context(), Config{Bucket: b})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	s.medium.(*objects).files.part = 100
	return s
}

func (a *attack) run(t *testing.T) {
	b := &membucket.Bucket{MinPart: 100}
	one, another := replica(t, b), replica(t, b)
	named, err := reference.WithName("app")
	if err != nil {
		t.Fatal(err)
	}
	repo, err := one.Namespace().Repository(t.Context(), named)
	if err != nil {
		t.Fatal(err)
	}
	w, err := repo.Blobs(t.Context()).Create(t.Context())
	if err == nil {
		_, err = w.Write(a.begun)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	for i, stop := range a.stops {
		stop.stopped, stop.process = make(chan struct{}), new(process)
		stop.pause = time.Duration(i+1) * time.Minute // the first goes on first
	}
	if a.deleted {
		a.stops[0].pause = 3 * time.Minute
	}
	hook := func(after bool) membucket.Hook {
		first, second := a.stops[0].hook(after), a.stops[1].hook(after)
		return func(ctx context.Context, method, key string) error {
			return errors.Join(first(ctx, method, key), second(ctx, method, key))
		}
	}
	b.Before, b.After = hook(false), hook(true)

	var both sync.WaitGroup
	ended := make(chan struct{})
	both.Go(func() {
		defer close(ended)
		_ = request(a.stops[0].process.as(t.Context()), one, w.ID(), a.bytes[0], a.claimed[0]) // it may be told of the other
	})
	select {
	case <-a.stops[0].stopped:
	case <-ended:
	}
	if a.deleted {
		both.Go(func() {
			time.Sleep(time.Second)
			_ = Repository{store: another, path: repositoriesRoot + "app"}.DeleteUpload(t.Context(), w.ID()) // it may be gone
		})
	}
	ctx := a.stops[1].process.as(t.Context())
	if a.inTwo {
		_ = request(ctx, another, w.ID(), a.bytes[1], "")
		_ = request(ctx, another, w.ID(), nil, a.claimed[1])
	} else {
		_ = request(ctx, another, w.ID(), a.bytes[1], a.claimed[1])
	}
	both.Wait()
	for _, claim := range a.claimed { // whoever is left finishes it
		_ = request(t.Context(), one, w.ID(), nil, claim)
	}
	for _, claim := range a.claimed {
		a.look(t, b, claim)
	}
}

// look expects that a blob is right, or that it is not there.
func (a *attack) look(t *testing.T, b *membucket.Bucket, d digest.Digest) {
	content, at, err := readObject(t.Context(), b, blobKey(d))
	if err == nil && at.Metadata[sealName] != "" && digest.FromBytes(content) != d {
		t.Errorf("%s is sealed, and is %s", d, digest.FromBytes(content))
	}
	f, err := replica(t, b).OpenBlob(t.Context(), d)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got, err := digest.FromReader(f); err != nil || got != d {
		t.Errorf("%s is served as %s: %v", got, d, err)
	}
}

// TestUploadRaced goes through all calls at which the first can be stopped, and
// through those at which the other can while the first goes on.
func TestUploadRaced(t *testing.T) {
	for _, sizes := range [][2]int{{0, 60}, {50, 300}} {
		a := attack{begun: random(sizes[0])}
		var whole [2]digest.Digest
		for i := range a.bytes {
			a.bytes[i] = random(sizes[1])
			whole[i] = digest.FromBytes(append(a.begun[:sizes[0]:sizes[0]], a.bytes[i]...))
		}
		for _, claimed := range [][2]digest.Digest{whole, {whole[0], whole[0]}, {whole[1], whole[0]}} {
			for _, inTwo := range []bool{false, true} {
				a.claimed, a.inTwo, a.deleted = claimed, inTwo, false
				a.everywhere(t)
			}
			a.inTwo, a.deleted = false, true
			a.everywhere(t)
		}
	}
}

func (a *attack) everywhere(t *testing.T) {
	for first := int64(0); ; first++ {
		for second := int64(0); ; second++ {
			a.stops = [2]*stop{{call: first, after: first%2 == 1}, {call: second, after: second%2 == 0}}
			synctest.Test(t, a.run)
			if t.Failed() {
				t.Fatalf("%d bytes, and %d more, claimed to be %v, in two requests: %v, deleted: %v, stopped at %d and %d", len(a.begun), len(a.bytes[0]), a.claimed, a.inTwo, a.deleted, first, second)
			}
			if a.stops[1].calls.Load() <= second {
				break
			}
		}
		if a.stops[0].calls.Load() <= first {
			if first < 5 {
				t.Fatalf("there are but %d calls", first)
			}
			return
		}
	}
}

// What lies there when another's state does is not known to be anything.
func TestUploadOfAnotherState(t *testing.T) {
	b := &membucket.Bucket{MinPart: 100}
	d := smallParts(b)
	content := random(350)
	if _, err := goOn(t.Context(), d, false, content, true); err != nil {
		t.Fatal(err)
	}
	_, known, err := d.placed(t.Context(), uploadPath)
	if err != nil || known != digest.FromBytes(content) {
		t.Fatalf("known as %q, %v", known, err)
	}
	for _, metadata := range []map[string]string{markOf("another"), nil} {
		if _, err := b.Put(t.Context(), objectKey(uploadPath), random(350), metadata, bucket.Conditions{}); err != nil {
			t.Fatal(err)
		}
		if _, known, err := d.placed(t.Context(), uploadPath); err != nil || known != "" {
			t.Errorf("known as %q, %v", known, err)
		}
	}
}
