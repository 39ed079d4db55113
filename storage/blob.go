package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
// FileInfo describes the open file; the caller closes it.
//
// An unsealed blob is hashed first. That goes on behind the request, once for
// all who ask, and survives the one who asked: a client that gives up on a
// large blob after its own deadline finds it sealed when it comes back.
//
// Errors: fs.ErrNotExist when the blob is not stored, or was found corrupt and
// has been set aside; the cause of ctx; what the file system reported.
func (s *Store) OpenBlob(ctx context.Context, d digest.Digest) (*os.File, fs.FileInfo, error) {
	if !validDigest(d) {
		return nil, nil, fmt.Errorf("opening blob %q: %w", d, digest.ErrDigestInvalidFormat)
	}
	path := s.path(blobPath(d))
	for {
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) && s.rescue(blobPath(d)) {
			f, err = os.Open(path)
		}
		if err != nil {
			return nil, nil, err
		}
		fi, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, nil, err
		}
		if fi.IsDir() {
			f.Close()
			return nil, nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
		}
		if Sealed(fi, d) {
			return f, fi, nil
		}
		verified, err := s.await(ctx, d, f)
		if err != nil {
			f.Close()
			return nil, nil, err
		}
		if verified != nil && os.SameFile(fi, verified) {
			return f, verified, nil
		}
		// The file was exchanged while it was being hashed: begin again
		// with the one that is there now.
		f.Close()
	}
}

// verification is one hash in progress. info and err are set before done is
// closed.
type verification struct {
	done chan struct{}
	info fs.FileInfo // the file that was found right
	err  error
}

// await has f hashed, or joins whoever is at it, and returns which file was
// found right.
func (s *Store) await(ctx context.Context, d digest.Digest, f *os.File) (fs.FileInfo, error) {
	v, err := s.verification(d, f.Name())
	if err != nil {
		return nil, err
	}
	select {
	case <-v.done:
		return v.info, v.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// verification returns the hash of d in progress, or starts it.
func (s *Store) verification(d digest.Digest, path string) (*verification, error) {
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
		v.info, v.err = s.rehash(d, path)
		s.mu.Lock()
		delete(s.pending, d)
		s.mu.Unlock()
		close(v.done)
	})
	return v, nil
}

// rehash hashes the file at path and seals it, or sets it aside. It returns the
// file that it found right.
func (s *Store) rehash(d digest.Digest, path string) (fs.FileInfo, error) {
	select {
	case s.hashing <- struct{}{}:
		defer func() { <-s.hashing }()
	case <-s.quit:
		return nil, errClosed
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	start := time.Now()
	ctx, stop := s.untilClosed()
	defer stop()
	err = Verify(ctx, f, d)
	if errors.Is(err, ErrCorrupt) {
		return nil, s.quarantine(d, path, f)
	}
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	s.rehashed.Add(1)
	s.log.Info("unsealed blob hashed and found right", "digest", d, "bytes", fi.Size(), "took", time.Since(start))
	return fi, nil
}

// quarantine moves the corrupt file that f has open out of the tree and returns
// fs.ErrNotExist for the caller to pass on. Should a good copy have taken its
// place meanwhile, that one stays, or comes back.
func (s *Store) quarantine(d digest.Digest, path string, f *os.File) error {
	gone := &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	bad, err := f.Stat()
	if err != nil {
		return err
	}
	if now, err := os.Stat(path); err != nil || !os.SameFile(now, bad) {
		return gone
	}
	aside := filepath.Join(s.root, quarantineDir, d.Algorithm().String()+"-"+d.Encoded())
	if err := os.Rename(path, aside); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return gone
		}
		return fmt.Errorf("setting corrupt blob %s aside: %w", d, err)
	}
	if moved, err := os.Stat(aside); err == nil && !os.SameFile(moved, bad) {
		if err := os.Link(aside, path); err == nil || errors.Is(err, fs.ErrExist) {
			os.Remove(aside)
		}
		return gone
	}
	s.quarantined.Add(1)
	s.damaged(d)
	s.log.Error("corrupt blob set aside; it is no longer served and has to be fetched or pushed again",
		"digest", d, "bytes", bad.Size(), "quarantine", aside)
	return gone
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

// path is the path on disk of a driver path, which begins with a slash.
func (s *Store) path(driverPath string) string { return s.root + driverPath }
