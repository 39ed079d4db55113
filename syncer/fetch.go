package syncer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/storage"
)

// fetcher brings blobs into repositories, each one over the network once at
// most, however many repositories and images want it. It outlives
// synchronisations, of which several may be under way.
type fetcher struct {
	store   *store
	queue   *queue
	streams int   // of one blob at once
	chunk   int64 // bytes that are asked for at once
	// distrusted are digests that a parent sent wrong bytes for; see distrust.
	distrusted *distrust

	mu      sync.Mutex
	flights map[digest.Digest]*flight
}

// flight is the fetching of a blob, for those who wait for it.
type flight struct {
	repository string
	priority   *priority
	done       chan struct{}
	err        error // to be read when done is closed
}

// ensure sees to it that a repository has a blob.
func (f *fetcher) ensure(ctx context.Context, r *repository, desc v1.Descriptor, p priority) error {
	for {
		mine, other := f.join(r.name, desc.Digest, p)
		if mine != nil {
			mine.err = f.bring(ctx, r, desc, mine.priority)
			f.leave(desc.Digest)
			close(mine.done)
			return mine.err
		}
		select {
		case <-other.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		switch {
		case other.err == nil:
			if ok, err := f.present(ctx, r, desc); ok || err != nil {
				return err
			}
		case other.repository == r.name:
			return other.err
		}
		// It was removed since, or found to be corrupt; or the parent keeps it from
		// that repository's readers and not from this one's.
	}
}

// join returns the flight that the caller has to carry out, or the one that is
// under way.
func (f *fetcher) join(repository string, d digest.Digest, p priority) (mine, other *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if other = f.flights[d]; other != nil {
		f.queue.raise(other.priority, p)
		return nil, other
	}
	mine = &flight{repository: repository, priority: f.queue.enter(p), done: make(chan struct{})}
	f.flights[d] = mine
	return mine, nil
}

func (f *fetcher) leave(d digest.Digest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.flights, d)
}

// present reports whether a repository has a blob, linking it if another has it.
func (f *fetcher) present(ctx context.Context, r *repository, desc v1.Descriptor) (bool, error) {
	if ok, err := f.store.hasBlob(ctx, r.name, desc); ok || err != nil {
		return ok, err
	}
	linked, err := f.store.link(ctx, r.name, desc)
	if linked {
		r.run.event(Event{Kind: EventBlob, Repository: r.name, Digest: desc.Digest.String(), Bytes: desc.Size, Linked: true})
	}
	return linked, err
}

func (f *fetcher) bring(ctx context.Context, r *repository, desc v1.Descriptor, p *priority) error {
	if ok, err := f.present(ctx, r, desc); ok || err != nil {
		return err
	}
	if err := f.distrusted.check(desc.Digest, time.Now()); err != nil {
		return err
	}
	if err := f.fetch(ctx, r, desc, p); err != nil {
		return err
	}
	r.run.event(Event{Kind: EventBlob, Repository: r.name, Digest: desc.Digest.String(), Bytes: desc.Size})
	_, err := f.store.link(ctx, r.name, desc)
	return err
}

// fetch brings a blob over the network. What was fetched of it before is not
// fetched again, unless it turns out to be wrong.
func (f *fetcher) fetch(ctx context.Context, r *repository, desc v1.Descriptor, p *priority) error {
	for {
		// The file is opened when it is its turn, and not by all that wait.
		if err := f.queue.acquire(ctx, p, min(desc.Size, f.chunk)); err != nil {
			return err
		}
		partial, err := f.store.content.OpenPartial(desc.Digest, desc.Size, f.chunk)
		if err != nil {
			f.queue.release()
			return storing(r.name, desc.Digest, err)
		}
		resumed := partial.Present() > 0
		t := &transfer{fetcher: f, repository: r, desc: desc, priority: p, partial: partial}
		err = t.complete(ctx)
		if !errors.Is(err, storage.ErrCorrupt) {
			return err
		}
		if !resumed {
			err = unusable(r.parent.String(), r.remote+"@"+desc.Digest.String(), "its bytes do not have that digest")
			f.distrusted.add(desc.Digest, err, time.Now())
			return err
		}
		// What lay here since before may be at fault, and not the parent.
	}
}

// transfer is one blob on its way here, over several connections where the parent
// allows.
type transfer struct {
	*fetcher
	repository *repository
	desc       v1.Descriptor
	priority   *priority
	partial    *storage.Partial

	mu   sync.Mutex
	next int // the first chunk that nobody has taken
}

// complete downloads what is missing and commits it. It closes the Partial in any
// case, and discards it unless it is worth going on with. The caller has acquired
// a turn, which complete releases.
func (t *transfer) complete(ctx context.Context) error {
	err := t.download(ctx)
	if _, broken := errors.AsType[*fault](err); broken || err != nil && ctx.Err() != nil {
		// The bytes that came are kept for the next attempt.
		_ = t.partial.Close()
		return err
	}
	if err == nil {
		err = t.partial.Commit(context.WithoutCancel(ctx))
	}
	if err == nil {
		return nil
	}
	// The storage cannot take it, and on a full disk the space is better used; or
	// the bytes are wrong.
	_ = t.partial.Discard() // what is in its way is in err
	if errors.Is(err, storage.ErrCorrupt) {
		return err
	}
	return storing(t.repository.name, t.desc.Digest, err)
}

// download fetches the missing chunks: the first alone until it has shown that
// the parent sends parts, then several at once.
func (t *transfer) download(ctx context.Context) error {
	first := t.take()
	if first < 0 {
		t.queue.release()
		return nil
	}
	if t.repository.parent.noRanges.Load() {
		return t.downloadWhole(ctx)
	}
	g, all := errgroup.WithContext(ctx)
	more := sync.OnceFunc(func() {
		for range min(t.streams, t.partial.Chunks()) - 1 {
			g.Go(func() error { return t.work(all, t.take(), false, func() {}) })
		}
	})
	g.Go(func() error { return t.work(all, first, true, more) })
	err := g.Wait()
	if !errors.Is(err, errNoRanges) {
		return err
	}
	t.repository.parent.noRanges.Store(true)
	if err := t.queue.acquire(ctx, t.priority, t.desc.Size); err != nil {
		return err
	}
	return t.downloadWhole(ctx)
}

// take returns a chunk that is missing and nobody is at, -1 if there is none.
func (t *transfer) take() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	for ; t.next < t.partial.Chunks(); t.next++ {
		if _, length := t.partial.Missing(t.next); length > 0 {
			t.next++
			return t.next - 1
		}
	}
	return -1
}

// work fetches chunks until there are none left, the given one first. turn says
// whether there is a turn for that already; sent is called when the parent has
// sent a part.
func (t *transfer) work(ctx context.Context, chunk int, turn bool, sent func()) error {
	for ; chunk >= 0; chunk = t.take() {
		if !turn {
			if err := t.queue.acquire(ctx, t.priority, t.chunk); err != nil {
				return err
			}
		}
		err := t.persist(ctx, func() error { return t.piece(ctx, chunk, sent) }, func() int64 {
			_, length := t.partial.Missing(chunk)
			return length
		})
		t.queue.release()
		if err != nil {
			return err
		}
		turn = false
	}
	return nil
}

// downloadWhole fetches a blob from a parent that sends no parts. It releases the
// turn.
func (t *transfer) downloadWhole(ctx context.Context) error {
	defer t.queue.release()
	return t.persist(ctx, func() error { return t.whole(ctx) }, func() int64 { return t.desc.Size - t.partial.Present() })
}

// persist calls fetch until nothing is left. Where the connection breaks off, it
// goes on, as long as that makes progress.
func (t *transfer) persist(ctx context.Context, fetch func() error, left func() int64) error {
	failures := 0
	for before := left(); before > 0; before = left() {
		err := fetch()
		if err == nil {
			continue
		}
		if before-left() >= t.repository.parent.limits.stallBytes {
			failures = 0
		}
		failures++
		if err := t.repository.parent.again(ctx, err, failures); err != nil {
			return err
		}
	}
	return nil
}

// piece appends to a chunk what one request brings.
func (t *transfer) piece(ctx context.Context, chunk int, sent func()) error {
	offset, length := t.partial.Missing(chunk)
	body, err := t.repository.parent.blob(ctx, t.repository.remote, t.desc, offset, length)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }() // what matters has been read
	sent()
	return t.copy(body, func(b []byte) error { return t.partial.Write(chunk, b) })
}

// whole reads a blob from its beginning and keeps what is missing.
func (t *transfer) whole(ctx context.Context) error {
	body, err := t.repository.parent.blob(ctx, t.repository.remote, t.desc, 0, t.desc.Size)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }() // what matters has been read
	for chunk := range t.partial.Chunks() {
		offset, length := t.partial.Missing(chunk)
		end := offset + length
		if _, err := io.CopyN(io.Discard, body, offset-(t.desc.Size-body.left)); err != nil {
			return err
		}
		if err := t.copy(io.LimitReader(body, end-offset), func(b []byte) error { return t.partial.Write(chunk, b) }); err != nil {
			return err
		}
	}
	return nil
}

// buffers are what bytes pass through on their way from the network.
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

const bufferSize = 256 << 10

// copy writes what it reads, and tells of it.
func (t *transfer) copy(body io.Reader, write func([]byte) error) error {
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	untold := int64(0)
	tell := func() {
		if untold > 0 {
			t.repository.run.event(Event{Kind: EventFetched, Repository: t.repository.name, Digest: t.desc.Digest.String(), Bytes: untold})
		}
		untold = 0
	}
	defer tell()
	for {
		n, err := body.Read(buf[:])
		if n > 0 {
			if err := write(buf[:n]); err != nil {
				return err
			}
			if untold += int64(n); untold >= tellBytes {
				tell()
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// tellBytes is how many bytes are told of at once.
const tellBytes = 256 << 10

// distrust remembers for which digests the parent sent other bytes, so that a
// large blob which is wrong there is not fetched again every minute: the next
// attempt is a minute later, then two, up to an hour.
type distrust struct {
	mu      sync.Mutex
	entries map[digest.Digest]*distrusted
}

type distrusted struct {
	err   error
	times int
	until time.Time
}

func newDistrust() *distrust { return &distrust{entries: make(map[digest.Digest]*distrusted)} }

func (d *distrust) add(dgst digest.Digest, err error, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := d.entries[dgst]
	if e == nil {
		e = &distrusted{}
		d.entries[dgst] = e
	}
	e.err = err
	e.until = now.Add(min(time.Minute<<min(e.times, 10), time.Hour))
	e.times++
}

// check returns why a digest is not to be asked for now.
func (d *distrust) check(dgst digest.Digest, now time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e := d.entries[dgst]; e != nil && now.Before(e.until) {
		return fmt.Errorf("%w; it is asked again at %s", e.err, e.until.UTC().Format(time.RFC3339))
	}
	return nil
}

// clear forgets everything, for whoever says that it has been put right.
func (d *distrust) clear() {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.entries)
}
