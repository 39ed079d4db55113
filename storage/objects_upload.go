package storage

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"sync"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

const (
	partSize = 8 << 20 // bytes; with 10,000 parts, 83 GB at most
	maxParts = 10_000
	// uploadTime is how long one request about an upload may take. It goes on
	// when the client is gone, who may come back for it.
	uploadTime = 2 * time.Minute
)

// errContinued ends a writer behind whose back another has gone on.
var errContinued = fmt.Errorf("the upload was continued behind this request's back: %w", ErrBusy)

// objectWriter writes the data of an upload.
type objectWriter struct {
	driver  *bucketDriver
	ctx     context.Context // that of Writer, without its end
	path    string
	state   uploadState
	version string // of the state as it is stored; empty: it is not
	tail    *bytes.Buffer
	hash    hash.Hash // of everything; nil: not known
	part    int       // bytes of every part but the last
	size    int64
	saved   int64 // size as it is stored
	placed  bool  // the data is where Commit puts it
	ended   bool
	failed  error
}

// ErrUploadComplete refuses more bytes for an upload whose data is in its place,
// because somebody was about to make a blob of it and died before it was one. It
// can be committed still.
var ErrUploadComplete = errors.New("it is complete already")

var tails = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// Writer opens a file for writing, from the beginning or from its end on. What
// was committed can be gone on with only if it is empty.
func (d *bucketDriver) Writer(ctx context.Context, path string, appending bool) (storagedriver.FileWriter, error) {
	if err := d.check(path); err != nil {
		return nil, err
	}
	w := &objectWriter{driver: d, ctx: context.WithoutCancel(ctx), path: path, part: d.part, tail: tails.Get().(*bytes.Buffer), hash: sha256.New()}
	w.tail.Reset()
	ctx, cancel := w.limit()
	defer cancel()
	err := w.recall(ctx)
	if err == nil && appending {
		err = w.recallPlaced(ctx)
	} else if err == nil {
		err = w.restart(ctx)
	}
	if err != nil {
		w.release()
		return nil, err
	}
	return w, nil
}

func (w *objectWriter) limit() (context.Context, context.CancelFunc) {
	return context.WithTimeout(w.ctx, uploadTime)
}

func (w *objectWriter) stateKey() string { return objectKey(w.path) + uploadSuffix }

// recall reads what was stored of the upload.
func (w *objectWriter) recall(ctx context.Context) error {
	content, at, err := readObject(ctx, w.driver.bucket, w.stateKey())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	head, tail, ok := bytes.Cut(content, []byte("\n"))
	if err := json.Unmarshal(head, &w.state); err != nil || !ok {
		return fmt.Errorf("%s: what was received of the upload %s is damaged; begin it anew", w.driver.bucket, w.path)
	}
	w.tail.Write(tail)
	if h, ok := w.hash.(encoding.BinaryUnmarshaler); !ok || h.UnmarshalBinary(w.state.Hash) != nil {
		w.hash = nil
	}
	if len(w.state.Parts) > 0 {
		w.part = int(w.state.Parts[0].Size)
	}
	w.size = w.state.size() + int64(len(tail))
	w.saved, w.version = w.size, at.Version
	return nil
}

// recallPlaced finds out whether the data has been committed already.
func (w *objectWriter) recallPlaced(ctx context.Context) error {
	if w.version != "" && !w.state.Whole {
		return nil
	}
	at, err := w.driver.bucket.Stat(ctx, objectKey(w.path))
	if errors.Is(err, fs.ErrNotExist) {
		if w.state.Upload == "" { // what there was is lost with whoever was about to place it
			w.state, w.size, w.saved, w.hash = uploadState{}, 0, 0, sha256.New()
		}
		return nil
	}
	if err == nil && (at.Size > 0 || w.version != "") {
		w.size, w.placed = at.Size, true
	}
	return err
}

// restart forgets what was stored.
func (w *objectWriter) restart(ctx context.Context) error {
	upload := w.state.Upload
	if w.version != "" {
		w.saved = -1
	}
	w.state, w.size, w.part, w.hash = uploadState{}, 0, w.driver.part, sha256.New()
	w.tail.Reset()
	if upload == "" {
		return nil
	}
	return w.driver.bucket.Abort(ctx, objectKey(w.path), upload)
}

// Size is how many bytes have been written, before and now.
func (w *objectWriter) Size() int64 { return w.size }

// Write sends a part whenever there is one.
func (w *objectWriter) Write(p []byte) (n int, err error) {
	switch {
	case w.failed != nil:
		return 0, w.failed
	case w.ended:
		return 0, fmt.Errorf("writing %s: %w", w.path, fs.ErrClosed)
	case len(p) > 0 && (w.placed || w.state.Whole):
		return 0, fmt.Errorf("writing %s: %w", w.path, ErrUploadComplete)
	}
	for len(p) > 0 {
		fits := min(len(p), max(w.part-w.tail.Len(), 0))
		w.tail.Write(p[:fits])
		if w.hash != nil {
			w.hash.Write(p[:fits])
		}
		n, p = n+fits, p[fits:]
		w.size += int64(fits)
		if w.tail.Len() >= w.part {
			if w.failed = w.send(); w.failed != nil {
				return n, w.failed
			}
		}
	}
	return n, nil
}

// send makes a part of what there is.
func (w *objectWriter) send() error {
	ctx, cancel := w.limit()
	defer cancel()
	key := objectKey(w.path)
	if len(w.state.Parts) >= maxParts {
		return fmt.Errorf("writing %s: more than %d bytes: content of that size comes by synchronisation alone", w.path, int64(maxParts)*int64(w.part))
	}
	if w.state.Upload == "" {
		mark := rand.Text()
		upload, err := w.driver.bucket.Begin(ctx, key, markOf(mark))
		if err != nil {
			return err
		}
		w.state.Upload, w.state.Mark = upload, mark
	}
	part, err := w.driver.bucket.Part(ctx, key, w.state.Upload, len(w.state.Parts)+1, bytes.NewReader(w.tail.Bytes()), int64(w.tail.Len()))
	if err != nil {
		return err
	}
	w.state.Parts = append(w.state.Parts, part)
	w.tail.Reset()
	return nil
}

// digest is that of everything that was received; empty if it is not known.
func (w *objectWriter) digest() digest.Digest {
	if w.hash == nil {
		return w.state.Digest
	}
	return digest.NewDigest(digest.SHA256, w.hash)
}

func (w *objectWriter) save(ctx context.Context) error { return w.saveState(ctx, w.tail.Bytes()) }

// saveState stores the state, if nobody else has.
func (w *objectWriter) saveState(ctx context.Context, tail []byte) error {
	w.state.Nonce = rand.Text()
	w.state.Hash = nil
	if w.state.Whole {
		w.state.Digest = w.digest()
	} else if h, ok := w.hash.(encoding.BinaryAppender); ok {
		var err error
		if w.state.Hash, err = h.AppendBinary(nil); err != nil {
			return err
		}
	}
	head, err := json.Marshal(w.state)
	if err != nil {
		return err
	}
	content := append(append(head, '\n'), tail...)
	at, err := w.driver.bucket.Put(ctx, w.stateKey(), content, nil, bucket.Conditions{Absent: w.version == "", Version: w.version})
	if errors.Is(err, bucket.ErrCondition) {
		return fmt.Errorf("writing %s: %w", w.path, errContinued)
	}
	if err == nil {
		w.saved, w.version = w.size, at.Version
	}
	return err
}

// Close keeps what was written for whoever opens the file next.
func (w *objectWriter) Close() error {
	if w.ended {
		return nil
	}
	defer w.release()
	if w.failed != nil || w.placed || w.size == w.saved {
		return w.failed
	}
	ctx, cancel := w.limit()
	defer cancel()
	return w.save(ctx)
}

// Cancel throws away what was written.
func (w *objectWriter) Cancel(context.Context) error {
	defer w.release()
	ctx, cancel := w.limit()
	defer cancel()
	var err error
	if w.state.Upload != "" {
		err = w.driver.bucket.Abort(ctx, objectKey(w.path), w.state.Upload)
	}
	return errors.Join(err, w.driver.bucket.Delete(ctx, w.stateKey()), w.driver.bucket.Delete(ctx, objectKey(w.path)))
}

// Commit puts the data in its place. The state stays beside it if nothing else
// tells what it is.
func (w *objectWriter) Commit(context.Context) error {
	switch {
	case w.failed != nil || w.placed:
		return w.failed
	case w.ended:
		return fmt.Errorf("committing %s: %w", w.path, fs.ErrClosed)
	}
	ctx, cancel := w.limit()
	defer cancel()
	if w.failed = w.place(ctx); w.failed != nil {
		return w.failed
	}
	w.placed = true
	if w.version == "" || w.state.Mark != "" {
		return nil
	}
	return w.driver.bucket.Delete(ctx, w.stateKey())
}

func (w *objectWriter) place(ctx context.Context) error {
	key := objectKey(w.path)
	if w.state.Upload == "" {
		return w.placeSmall(ctx, key)
	}
	if w.tail.Len() > 0 {
		if err := w.send(); err != nil {
			return err
		}
	}
	// One writer at a time gets beyond this, and finds what another has placed
	// before. So it is its own data that there is in the end.
	again := w.state.Whole
	w.state.Whole = true
	if err := w.save(ctx); err != nil {
		return err
	}
	at, err := w.driver.bucket.Stat(ctx, key)
	switch {
	case err == nil && again && at.Size == w.size:
		return nil
	case err == nil && at.Size > 0:
		return fmt.Errorf("writing %s: %w", w.path, errContinued)
	case ignoreAbsent(err) != nil:
		return err
	}
	err = w.driver.bucket.Complete(ctx, key, w.state.Upload, w.state.Parts, markOf(w.state.Mark))
	if errors.Is(err, fs.ErrNotExist) { // it was, and the answer got lost
		if at, statErr := w.driver.bucket.Stat(ctx, key); statErr == nil && at.Size == w.size {
			return nil
		}
	}
	return err
}

// placeSmall stores what never filled a part.
func (w *objectWriter) placeSmall(ctx context.Context, key string) error {
	if w.version != "" {
		w.state.Whole = true
		if err := w.saveState(ctx, nil); err != nil {
			return err
		}
	}
	var seal map[string]string
	if d := w.digest(); d != "" {
		seal = sealOf(d)
	}
	_, err := w.driver.bucket.Put(ctx, key, w.tail.Bytes(), seal, bucket.Conditions{Absent: true})
	if !errors.Is(err, bucket.ErrCondition) {
		return err
	}
	// There is room for it where an empty file was committed.
	at, err := w.driver.bucket.Stat(ctx, key)
	if err == nil && at.Size == 0 {
		_, err = w.driver.bucket.Put(ctx, key, w.tail.Bytes(), seal, bucket.Conditions{Version: at.Version})
	} else if err == nil {
		err = bucket.ErrCondition
	}
	if errors.Is(err, bucket.ErrCondition) || errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("writing %s: %w", w.path, errContinued)
	}
	return err
}

func (w *objectWriter) release() {
	if w.tail != nil {
		tails.Put(w.tail)
	}
	w.tail, w.ended = nil, true
}
