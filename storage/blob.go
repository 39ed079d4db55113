package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// errClosed ends the wait of a reader whose Store was closed.
var errClosed = errors.New("storage is shutting down")

const blobsRoot = "/docker/registry/v2/blobs/"

// blobPath is the driver path of the content of d, which must be valid.
func blobPath(d digest.Digest) string {
	hex := d.Encoded()
	return blobsRoot + d.Algorithm().String() + "/" + hex[:2] + "/" + hex + "/data"
}

// parseBlobPath is the inverse of blobPath. ok is false for every other path.
func parseBlobPath(path string) (d digest.Digest, ok bool) {
	rest, ok := strings.CutPrefix(path, blobsRoot)
	if !ok {
		return "", false
	}
	parts := strings.Split(rest, "/")
	if len(parts) != 4 || parts[3] != "data" {
		return "", false
	}
	d = digest.Digest(parts[0] + ":" + parts[2])
	if d.Validate() != nil || !strings.HasPrefix(parts[2], parts[1]) || len(parts[1]) != 2 {
		return "", false
	}
	return d, true
}

// OpenBlob opens the content of d for reading once it is known to be right. The
// caller closes it.
//
// An unsealed blob is hashed first. That goes on behind the request, once for
// all who ask, and survives the one who asked: a client that gives up on a
// large blob after its own deadline finds it sealed when it comes back.
//
// Errors: fs.ErrNotExist when the blob is not stored, or was found corrupt and
// has been set aside; the cause of ctx; what the file system reported.
func (s *Store) OpenBlob(ctx context.Context, d digest.Digest) (Content, error) {
	if !validDigest(d) {
		return Content{}, fmt.Errorf("opening blob %q: %w", d, digest.ErrDigestInvalidFormat)
	}
	for {
		c, err := s.medium.openBlob(ctx, d)
		if err != nil || c.sealed {
			return c, err
		}
		verified, err := s.await(ctx, d)
		if err != nil {
			c.Close()
			return Content{}, err
		}
		if verified == c.version {
			return c, nil
		}
		// It was exchanged while it was being hashed: begin again with what is
		// there now.
		c.Close()
	}
}

// verification is one hash in progress. version and err are set before done is
// closed.
type verification struct {
	done    chan struct{}
	version version // what was found right
	err     error
}

// await has a blob hashed, or joins whoever is at it, and returns which version
// of it was found right.
func (s *Store) await(ctx context.Context, d digest.Digest) (version, error) {
	v, err := s.verification(d)
	if err != nil {
		return version{}, err
	}
	select {
	case <-v.done:
		return v.version, v.err
	case <-ctx.Done():
		return version{}, context.Cause(ctx)
	}
}

// verification returns the hash of d in progress, or starts it.
func (s *Store) verification(d digest.Digest) (*verification, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.quit:
		return nil, errClosed
	default:
	}
	if v, ok := s.pending[d]; ok {
		return v, nil
	}
	v := &verification{done: make(chan struct{})}
	s.pending[d] = v
	s.running.Go(func() {
		v.version, v.err = s.rehash(d)
		s.mu.Lock()
		delete(s.pending, d)
		s.mu.Unlock()
		close(v.done)
	})
	return v, nil
}

// rehash has a blob hashed and sealed, or set aside. It returns what was found
// right.
func (s *Store) rehash(d digest.Digest) (version, error) {
	select {
	case s.hashing <- struct{}{}:
		defer func() { <-s.hashing }()
	case <-s.quit:
		return version{}, errClosed
	}
	start := time.Now()
	ctx, stop := s.untilClosed()
	defer stop()
	c, err := s.medium.verifyBlob(ctx, d)
	if err == nil && c.aside != "" {
		err = s.setAside(ctx, d, c)
	}
	if err != nil {
		return version{}, err
	}
	s.rehashed.Add(1)
	s.log.Info("unsealed blob hashed and found right", "digest", d, "bytes", c.size, "took", time.Since(start))
	return c.version, nil
}

// setAside takes note of a blob that was found corrupt and is no longer there,
// which is the error that it returns.
func (s *Store) setAside(ctx context.Context, d digest.Digest, c checked) error {
	s.quarantined.Add(1)
	s.damaged(context.WithoutCancel(ctx), d)
	s.log.Error("corrupt blob set aside; it is no longer served and has to be fetched or pushed again",
		"digest", d, "bytes", c.size, "quarantine", c.aside)
	return &fs.PathError{Op: "open", Path: blobPath(d), Err: fs.ErrNotExist}
}

// untilClosed returns a context that ends with the Store.
func (s *Store) untilClosed() (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	ended := make(chan struct{})
	s.running.Go(func() {
		select {
		case <-s.quit:
			cancel(errClosed)
		case <-ended:
		}
	})
	return ctx, func() { close(ended); cancel(nil) }
}
