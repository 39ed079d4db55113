package syncer

import (
	"cmp"
	"context"
	"slices"
	"sync"
)

// queue hands out the right to have a transfer under way. Where several wait, the
// best goes first; see priority. It is asked again for every chunk, so that what
// is urgent waits for a chunk and not for a layer.
type queue struct {
	mu      sync.Mutex
	free    int
	waiting []*ticket
	// served is how many bytes each repository was given turns for since the
	// queue was last at rest.
	served  map[string]int64
	busy    int
	entered int64 // how many blobs were
}

// ticket is one who waits.
type ticket struct {
	*priority
	bytes int64
	ready chan struct{} // closed when it is its turn
}

// priority says how soon a blob is fetched. Its fields are guarded by the
// queue's lock.
type priority struct {
	urgent bool // somebody waits for it
	// repository is the one that it is fetched for: the one that was served
	// least goes first.
	repository string
	// missing is how many bytes its image lacks: of a repository's images the
	// one that lacks least goes first.
	missing int64
	// order is that of the blobs' arrival: what was begun is finished first.
	order int64
}

func newQueue(slots int) *queue {
	return &queue{free: slots, served: make(map[string]int64)}
}

// enter takes note of a blob that is to be fetched.
func (q *queue) enter(p priority) *priority {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.entered++
	p.order = q.entered
	return &p
}

// raise makes a blob as urgent as p for all that waits for it.
func (q *queue) raise(waiting *priority, p priority) {
	q.mu.Lock()
	defer q.mu.Unlock()
	waiting.urgent = waiting.urgent || p.urgent
	waiting.missing = min(waiting.missing, p.missing)
}

// acquire waits for the turn of a transfer of so many bytes. The caller releases
// it, unless there is an error, which is the cause of ctx.
func (q *queue) acquire(ctx context.Context, p *priority, bytes int64) error {
	t := &ticket{priority: p, bytes: bytes, ready: make(chan struct{})}
	q.mu.Lock()
	q.waiting = append(q.waiting, t)
	q.grant()
	q.mu.Unlock()
	select {
	case <-t.ready:
		return nil
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if i := slices.Index(q.waiting, t); i >= 0 {
		q.waiting = slices.Delete(q.waiting, i, i+1)
		return context.Cause(ctx)
	}
	// It was its turn meanwhile.
	q.free++
	q.busy--
	q.grant()
	return context.Cause(ctx)
}

func (q *queue) release() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.free++
	q.busy--
	q.grant()
	if q.busy == 0 {
		clear(q.served)
	}
}

// grant gives turns away while there are any. The caller holds the lock.
func (q *queue) grant() {
	for q.free > 0 && len(q.waiting) > 0 {
		t := slices.MinFunc(q.waiting, q.compare)
		q.waiting = slices.DeleteFunc(q.waiting, func(other *ticket) bool { return other == t })
		q.served[t.repository] += t.bytes
		q.free--
		q.busy++
		close(t.ready)
	}
}

func (q *queue) compare(a, b *ticket) int {
	if a.urgent != b.urgent {
		if a.urgent {
			return -1
		}
		return 1
	}
	return cmp.Or(
		cmp.Compare(q.served[a.repository], q.served[b.repository]),
		cmp.Compare(a.missing, b.missing),
		cmp.Compare(a.order, b.order),
	)
}
