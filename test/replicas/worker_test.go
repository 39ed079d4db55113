package replicas

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
)

// repositories are few, so that clients meet in them. Each has tags of its own
// there.
var repositories = []string{"team/app", "team/app/web", "other"}

const tagsOfEach = 5

// worker pushes, pulls and deletes with one client, one thing after another, so
// that it knows what its tags are.
type worker struct {
	t       *testing.T
	name    string
	client  client
	layers  []blob
	ledger  *ledger
	rand    *rand.Rand
	patient patience
	tags    map[string]digest.Digest // repository:tag
	done    atomic.Int64             // things done
	fresh   bool                     // each image has a layer that nobody else has
	// tolerates says which failures are no fault. Nil: none is.
	tolerates func(error) bool
}

func newWorker(t *testing.T, name string, c client, layers []blob, l *ledger) *worker {
	return &worker{t: t, name: name, client: c, layers: layers, ledger: l, tags: make(map[string]digest.Digest), rand: rand.New(rand.NewPCG(rand.Uint64(), 0))}
}

// run works until ctx ends. What is begun then is finished.
func (w *worker) run(ctx context.Context) {
	defer w.client.close()
	for ctx.Err() == nil {
		if err := w.round(context.WithoutCancel(ctx)); err != nil {
			w.t.Errorf("%s: %v", w.name, err)
			return
		}
		w.done.Add(1)
	}
}

// round does one thing.
func (w *worker) round(ctx context.Context) error {
	repository := repositories[w.rand.IntN(len(repositories))]
	tag := fmt.Sprintf("%s-%d", w.name, w.rand.IntN(tagsOfEach))
	known, there := w.tags[repository+":"+tag]
	switch n := w.rand.IntN(10); {
	case n < 2 && there:
		return w.remove(ctx, repository, tag)
	case n < 5 && there:
		return w.pull(ctx, repository, tag, known)
	}
	return w.push(ctx, repository, tag)
}

func (w *worker) push(ctx context.Context, repository, tag string) error {
	layers := make([]blob, 1+w.rand.IntN(3))
	for i := range layers {
		layers[i] = w.layers[w.rand.IntN(len(w.layers))]
	}
	if w.fresh {
		layers = append(layers, newLayer(w.rand.Uint64(), 200_000))
	}
	note := ""
	if w.rand.IntN(2) == 0 {
		note = fmt.Sprint(w.name, w.rand.Uint64()) // an image that nobody else has
	}
	i := newImage(layers, note)
	what := fmt.Sprintf("pushing %s:%s", repository, tag)
	err := w.patient.try(ctx, what, func() error { return w.client.push(ctx, i, repository, tag) })
	if w.failed(err, repository, tag) {
		return err
	}
	if err == nil {
		w.tags[repository+":"+tag] = i.manifest.Digest
		w.ledger.pushed(repository, tag, i.manifest.Digest)
	}
	return nil
}

func (w *worker) remove(ctx context.Context, repository, tag string) error {
	again := false
	err := w.patient.try(ctx, fmt.Sprintf("deleting %s:%s", repository, tag), func() error {
		err := w.client.remove(ctx, repository, tag)
		if again && isNotFound(err) {
			return nil // the answer to the first request was lost
		}
		again = true
		return err
	})
	if w.failed(err, repository, tag) {
		return err
	}
	if err == nil {
		delete(w.tags, repository+":"+tag)
		w.ledger.deleted(repository, tag)
	}
	return nil
}

func (w *worker) pull(ctx context.Context, repository, tag string, want digest.Digest) error {
	return w.patient.try(ctx, fmt.Sprintf("pulling %s:%s", repository, tag), func() error {
		d, err := w.client.pull(ctx, repository, tag)
		if err == nil && d != want {
			err = fmt.Errorf("it is %s, and %s was acknowledged", d, want)
		}
		return err
	})
}

// failed reports whether an error is a fault. One that is not leaves a tag of
// which nobody knows what it is.
func (w *worker) failed(err error, repository, tag string) bool {
	if err == nil || w.tolerates == nil || !w.tolerates(err) {
		return err != nil
	}
	delete(w.tags, repository+":"+tag)
	w.ledger.refused(repository, tag)
	return false
}
