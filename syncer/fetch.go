package syncer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/distribution/distribution/v3"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// fetcher brings blobs into repositories, each one over the network once at
// most, however many repositories and images want it.
type fetcher struct {
	parent *parent
	store  *store
	limits limits
	slots  chan struct{} // bounds the blobs that are fetched at once
	notify func(Event)
	// distrusted are digests that the parent sent wrong bytes for in earlier
	// synchronisations; see distrust.
	distrusted *distrust

	mu      sync.Mutex
	flights map[digest.Digest]*flight
}

// flight is the fetching of a blob, for those who wait for it and those who come
// later.
type flight struct {
	repository string
	done       chan struct{}
	err        error // to be read when done is closed
}

// ensure sees to it that a repository has a blob.
func (f *fetcher) ensure(ctx context.Context, repository string, desc v1.Descriptor) error {
	for {
		mine, other := f.join(repository, desc.Digest)
		if mine != nil {
			mine.err = f.bring(ctx, repository, desc)
			if mine.err != nil {
				f.leave(desc.Digest, mine)
			}
			close(mine.done)
			return mine.err
		}
		select {
		case <-other.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if other.err != nil {
			if other.repository == repository {
				return other.err
			}
			// The parent may keep it from that repository's readers and not from
			// this one's.
			continue
		}
		ok, err := f.present(ctx, repository, desc)
		if ok || err != nil {
			return err
		}
		// It was removed since, or found to be corrupt.
		f.leave(desc.Digest, other)
	}
}

// join returns the flight that the caller has to carry out, or the one that is
// under way or over.
func (f *fetcher) join(repository string, d digest.Digest) (mine, other *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if other = f.flights[d]; other != nil {
		return nil, other
	}
	mine = &flight{repository: repository, done: make(chan struct{})}
	f.flights[d] = mine
	return mine, nil
}

func (f *fetcher) leave(d digest.Digest, old *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.flights[d] == old {
		delete(f.flights, d)
	}
}

// present reports whether a repository has a blob, linking it if another has it.
func (f *fetcher) present(ctx context.Context, repository string, desc v1.Descriptor) (bool, error) {
	if ok, err := f.store.hasBlob(ctx, repository, desc); ok || err != nil {
		return ok, err
	}
	linked, err := f.store.link(ctx, repository, desc)
	if linked {
		f.notify(Event{Kind: EventBlob, Repository: repository, Digest: desc.Digest.String(), Bytes: desc.Size, Linked: true})
	}
	return linked, err
}

func (f *fetcher) bring(ctx context.Context, repository string, desc v1.Descriptor) error {
	if ok, err := f.present(ctx, repository, desc); ok || err != nil {
		return err
	}
	if err := f.distrusted.check(desc.Digest, time.Now()); err != nil {
		return err
	}
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	home, err := f.fetch(ctx, repository, desc)
	if err != nil {
		return err
	}
	f.notify(Event{Kind: EventBlob, Repository: repository, Digest: desc.Digest.String(), Bytes: desc.Size})
	if home == repository {
		return nil
	}
	_, err = f.store.link(ctx, repository, desc)
	return err
}

// fetch brings a blob over the network and returns the repository that has it
// now. What was fetched of it before is not fetched again, unless it turns out
// to be wrong.
func (f *fetcher) fetch(ctx context.Context, repository string, desc v1.Descriptor) (string, error) {
	for {
		u, err := f.store.openUpload(ctx, repository, desc.Digest)
		if err != nil {
			return "", err
		}
		resumed := u.Size() > 0
		err = f.complete(ctx, u, repository, desc)
		if err == nil {
			return u.repository, nil
		}
		if !errors.Is(err, errWrongBytes) {
			return "", err
		}
		if !resumed {
			err = unusable(f.parent.String(), repository+"@"+desc.Digest.String(), "its bytes do not have that digest")
			f.distrusted.add(desc.Digest, err, time.Now())
			return "", err
		}
		// What lay here since before may be at fault, and not the parent.
	}
}

// errWrongBytes reports an upload that does not have its digest. It has been
// discarded.
var errWrongBytes = errors.New("wrong bytes")

// complete downloads what an upload lacks and commits it. It closes the upload
// in any case, and discards it unless it is worth going on with.
func (f *fetcher) complete(ctx context.Context, u *upload, repository string, desc v1.Descriptor) error {
	cleanup := context.WithoutCancel(ctx)
	if u.Size() > desc.Size {
		return errors.Join(errWrongBytes, u.discard(cleanup))
	}
	if err := f.download(ctx, u, repository, desc); err != nil {
		if _, broken := errors.AsType[*fault](err); broken || ctx.Err() != nil {
			// The bytes that came are kept for the next attempt.
			_ = u.Close()
			return err
		}
		// The storage cannot take it; on a full disk the space is better used.
		_ = u.discard(cleanup) // what is in its way is in err
		return storing(repository, desc.Digest, err)
	}
	err := u.commit(cleanup, desc)
	if _, wrong := errors.AsType[distribution.ErrBlobInvalidDigest](err); wrong {
		return errors.Join(errWrongBytes, u.discard(cleanup))
	}
	if err != nil {
		_ = u.discard(cleanup)
		return storing(repository, desc.Digest, err)
	}
	return nil
}

// download appends what an upload lacks. Where the connection breaks off, it
// goes on, as long as that makes progress.
func (f *fetcher) download(ctx context.Context, u *upload, repository string, desc v1.Descriptor) error {
	failures := 0
	for u.Size() < desc.Size {
		before := u.Size()
		err := f.piece(ctx, u, repository, desc)
		if err == nil {
			continue
		}
		if u.Size()-before >= f.limits.stallBytes {
			failures = 0
		}
		failures++
		if err := f.parent.again(ctx, err, failures); err != nil {
			return err
		}
	}
	return nil
}

// piece appends what one request brings.
func (f *fetcher) piece(ctx context.Context, u *upload, repository string, desc v1.Descriptor) error {
	body, err := f.parent.blob(ctx, repository, desc, u.Size())
	if err != nil {
		return err
	}
	defer body.Close()
	r := &observedReader{Reader: body, observe: func(n int64) {
		f.notify(Event{Kind: EventFetched, Repository: repository, Digest: desc.Digest.String(), Bytes: n})
	}}
	defer r.flush()
	if _, err := u.ReadFrom(r); r.err != nil {
		return r.err
	} else if err != nil {
		return err
	}
	return nil
}

// observedReader tells how much was read, and keeps why reading ended apart from
// why writing did.
type observedReader struct {
	io.Reader
	observe func(n int64)
	err     error
	pending int64
}

// observeEvery is how many bytes are told of at once.
const observeEvery = 256 << 10

func (r *observedReader) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	if r.pending += int64(n); r.pending >= observeEvery {
		r.flush()
	}
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return n, err
}

func (r *observedReader) flush() {
	if r.pending > 0 {
		r.observe(r.pending)
		r.pending = 0
	}
}

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
