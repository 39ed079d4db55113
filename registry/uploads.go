package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/distribution/v3"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

// The state of an upload is on the storage and nowhere else: distribution keeps
// the bytes, and the state of the hash at the end of each chunk, under the
// upload's id. So any replica continues what another began.

// startUpload begins an upload, or makes it unnecessary: by mounting a blob
// from another repository, or by taking all of it in this request.
func (s *Server) startUpload(w http.ResponseWriter, r *http.Request, repo storage.Repository, who caller) error {
	query := r.URL.Query()
	if mount := query.Get("mount"); mount != "" {
		done, err := s.mount(w, r, repo, mount, query.Get("from"), who)
		if done || err != nil {
			return err
		}
	}
	// Before anything is sent, a client whose upload cannot succeed learns it.
	room, err := s.claim(r.Context(), repo, max(r.ContentLength, 1))
	if err != nil {
		return err
	}
	room.release() // the bytes are claimed as they come
	blobs, err := s.blobs(r.Context(), repo)
	if err != nil {
		return err
	}
	upload, err := blobs.Create(r.Context())
	if err != nil {
		return fmt.Errorf("starting upload: %w", err)
	}
	if d := query.Get("digest"); d != "" {
		return s.finish(w, r, repo, upload, newTurn(w), d)
	}
	if err := upload.Close(); err != nil {
		return abandon(r.Context(), repo, upload, err)
	}
	return uploadStatus(w, repo, upload, http.StatusAccepted)
}

// mount links a blob of another repository into this one. done is false when
// the blob cannot be had there, for then the specification has the client
// upload it; that is also the answer to a caller who may not read there, whose
// business it is not what there is.
func (s *Server) mount(w http.ResponseWriter, r *http.Request, repo storage.Repository, mount, from string, who caller) (done bool, err error) {
	d, err := parseDigest(mount)
	if err != nil {
		return false, err
	}
	if from == "" {
		from = s.findBlob(r.Context(), d, who)
	}
	source, err := s.cfg.Store.Repository(from)
	if err != nil || !who.may(from, v1alpha1.ActionContentRead) {
		return false, nil // a mount that cannot be is an upload
	}
	room, err := s.claimMount(r.Context(), repo, source, d)
	defer room.release()
	if err == nil {
		err = repo.MountLayer(r.Context(), source, d)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("mounting %s from %s: %w", d, from, err)
	}
	blobCreated(w, repo, d)
	return true, nil
}

// maxSearch bounds in how many repositories a blob is looked for when a client
// wants it mounted from wherever it is.
const maxSearch = 1000

// findBlob names a repository with the blob that the caller may read, or none.
func (s *Server) findBlob(ctx context.Context, d digest.Digest, who caller) string {
	n := 0
	for name, err := range s.cfg.Store.Repositories(ctx, "") {
		if n++; err != nil || n > maxSearch {
			break
		}
		repo, err := s.cfg.Store.Repository(name)
		if err == nil && who.may(name, v1alpha1.ActionContentRead) && repo.HasLayer(ctx, d) {
			return name
		}
	}
	return ""
}

// uploadProgress tells how much of an upload has arrived.
func (s *Server) uploadProgress(w http.ResponseWriter, r *http.Request, repo storage.Repository, id string) error {
	upload, err := s.resume(r.Context(), repo, id)
	if err != nil {
		return err
	}
	if err := upload.Close(); err != nil {
		return abandon(r.Context(), repo, upload, err)
	}
	return uploadStatus(w, repo, upload, http.StatusNoContent)
}

// patchUpload appends a chunk.
func (s *Server) patchUpload(w http.ResponseWriter, r *http.Request, repo storage.Repository, id string) error {
	turn, end, err := s.turns.take(r.Context(), w, repo.Name()+"/"+id)
	if err != nil {
		return err
	}
	defer end()
	upload, err := s.resume(r.Context(), repo, id)
	if err != nil {
		return err
	}
	room, err := s.receive(w, r, repo, upload, turn)
	defer room.release()
	if errors.Is(err, storage.ErrUploadComplete) {
		return errors.Join(errRangeInvalid.because("all of it has come already"), upload.Close())
	}
	if err != nil {
		return err
	}
	if err := upload.Close(); err != nil {
		return abandon(r.Context(), repo, upload, err)
	}
	return uploadStatus(w, repo, upload, http.StatusAccepted)
}

// putUpload appends the last chunk, if there is one, and turns the upload into
// a blob.
func (s *Server) putUpload(w http.ResponseWriter, r *http.Request, repo storage.Repository, id string) error {
	ref := r.URL.Query().Get("digest")
	turn, end, err := s.turns.take(r.Context(), w, repo.Name()+"/"+id)
	if err != nil {
		return err
	}
	defer end()
	upload, err := s.resume(r.Context(), repo, id)
	if errors.Is(err, errBlobUploadUnknown) && s.finished(w, r, repo, ref) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.finish(w, r, repo, upload, turn, ref)
}

// finished answers a client whose upload is a blob already, and who was not told
// because the connection, or the replica, broke off before it came to that.
func (s *Server) finished(w http.ResponseWriter, r *http.Request, repo storage.Repository, ref string) bool {
	d, err := parseDigest(ref)
	if err != nil {
		return false
	}
	if _, err := repo.UseLayer(r.Context(), d); err != nil {
		return false
	}
	s.discard(w, r)
	blobCreated(w, repo, d)
	return true
}

// discard reads what a client sends in vain: many take no answer before they have
// sent all.
func (s *Server) discard(w http.ResponseWriter, r *http.Request) {
	body := &bodyReader{r: r.Body, turn: newTurn(w), stall: s.stall}
	_, _ = io.Copy(io.Discard, body)
}

// cancelUpload throws an upload away, and ends the request that writes to it.
func (s *Server) cancelUpload(w http.ResponseWriter, r *http.Request, repo storage.Repository, id string) error {
	_, end, err := s.turns.take(r.Context(), w, repo.Name()+"/"+id)
	if err != nil {
		return err
	}
	defer end()
	upload, err := s.resume(r.Context(), repo, id)
	if err != nil {
		return err
	}
	upload.Close()
	if err := repo.DeleteUpload(r.Context(), id); err != nil {
		return fmt.Errorf("cancelling upload %s: %w", id, err)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// finish receives what is left of an upload and commits it under its digest.
// Content that is not what was promised is thrown away.
func (s *Server) finish(w http.ResponseWriter, r *http.Request, repo storage.Repository, upload distribution.BlobWriter, turn *turn, ref string) error {
	d, err := parseDigest(ref)
	if err != nil {
		return errors.Join(err, upload.Close())
	}
	again := watchResend(r, upload, d)
	room, err := s.receive(w, r, repo, upload, turn)
	defer room.release()
	if errors.Is(err, storage.ErrUploadComplete) {
		s.discard(w, r)
		again = nil // its bytes are nowhere
	} else if err != nil {
		return err
	}
	if err := room.finish(r.Context()); err != nil {
		return errors.Join(err, upload.Close(), repo.DeleteUpload(r.Context(), upload.ID()))
	}
	_, err = upload.Commit(r.Context(), v1.Descriptor{Digest: d})
	var invalid distribution.ErrBlobInvalidDigest
	if errors.As(err, &invalid) && again.is(d) {
		err = again.commit(r.Context(), s, repo, upload, d)
	}
	switch {
	case err == nil:
		blobCreated(w, repo, d)
		return nil
	case errors.As(err, &invalid), errors.Is(err, storage.ErrCorrupt):
		return errors.Join(errDigestInvalid.with(map[string]string{"digest": d.String()}), repo.DeleteUpload(r.Context(), upload.ID()))
	case errors.Is(err, distribution.ErrBlobInvalidLength):
		return errors.Join(errSizeInvalid, repo.DeleteUpload(r.Context(), upload.ID()))
	default:
		return abandon(r.Context(), repo, upload, fmt.Errorf("committing as %s: %w", d, err))
	}
}

// receive appends the request's body to an upload, and claims room for all of it,
// which the caller releases. When it returns an error the upload is closed, unless
// that is storage.ErrUploadComplete, and the rest of the body is of no use. A client
// whose connection broke may go on from where it broke; when it is the
// storage that failed, the upload is gone, and the space that it took is free.
func (s *Server) receive(w http.ResponseWriter, r *http.Request, repo storage.Repository, upload distribution.BlobWriter, turn *turn) (*claim, error) {
	if err := checkRange(r, upload.Size()); err != nil {
		if errors.Is(err, errRangeInvalid) {
			setUploadHeaders(w, repo, upload) // tell the client where to go on
		}
		return nil, errors.Join(err, upload.Close())
	}
	room, err := s.claim(r.Context(), repo, upload.Size()+max(r.ContentLength, 0))
	if err != nil {
		return nil, errors.Join(err, upload.Close(), repo.DeleteUpload(r.Context(), upload.ID()))
	}
	body := &bodyReader{r: r.Body, turn: turn, stall: s.stall}
	if r.ContentLength < 0 {
		body.room = room
	}
	_, err = upload.ReadFrom(body)
	switch {
	case err == nil:
		return room, nil
	case errors.Is(err, storage.ErrUploadComplete):
		return room, err
	case body.full != nil:
		return room, errors.Join(body.full, upload.Close(), repo.DeleteUpload(r.Context(), upload.ID()))
	case body.err != nil && turn.lost():
		return room, errors.Join(errUploadBusy, upload.Close())
	case body.err != nil:
		return room, errors.Join(errSizeInvalid.because("the chunk was cut short"), upload.Close())
	case errors.Is(err, fs.ErrNotExist): // it has been cancelled meanwhile
		return room, errors.Join(errBlobUploadUnknown, upload.Close())
	default:
		return room, abandon(r.Context(), repo, upload, err)
	}
}

// abandon throws away an upload that the storage failed, and returns why. One that
// another writes to is not this request's to throw away.
func abandon(ctx context.Context, repo storage.Repository, upload distribution.BlobWriter, err error) error {
	if errors.Is(err, storage.ErrBusy) {
		_ = upload.Close() // of what is there, nothing came by it
		return errUploadBusy
	}
	// Of a storage that fails, neither is to be expected to succeed. Cancel
	// closes the file, and after a failed commit does nothing else.
	_ = upload.Cancel(ctx)
	_ = repo.DeleteUpload(ctx, upload.ID())
	return fmt.Errorf("upload %s: %w", upload.ID(), err)
}

// bodyReader remembers whether it was the client that broke a copy off, and
// breaks off itself when the client sends nothing for too long. However slow,
// a client that sends something goes on.
type bodyReader struct {
	r     io.Reader
	turn  *turn
	stall time.Duration
	room  *claim // for what comes; nil: there is no bound, or it is claimed
	err   error  // of the client
	full  error  // that there is no more room
}

func (b *bodyReader) Read(p []byte) (int, error) {
	n, err := b.turn.read(b.stall, func() (int, error) { return b.r.Read(p) })
	if err != nil && !errors.Is(err, io.EOF) {
		b.err = err
	}
	if b.full = b.room.more(int64(n)); b.full != nil {
		return 0, b.full
	}
	return n, err
}

// checkRange compares the Content-Range header of a chunk, "first-last" without
// a unit, with where the upload ends.
func checkRange(r *http.Request, size int64) error {
	header := r.Header.Get("Content-Range")
	if header == "" {
		return nil
	}
	from, to, ok := strings.Cut(header, "-")
	first, err1 := strconv.ParseUint(from, 10, 63)
	last, err2 := strconv.ParseUint(to, 10, 63)
	if !ok || err1 != nil || err2 != nil || last < first {
		return errBlobUploadInvalid.because("Content-Range %q is not of the form <first>-<last>", header)
	}
	if int64(first) != size {
		return errRangeInvalid.because("chunk begins at %d but the upload ends at %d", first, size)
	}
	if r.ContentLength >= 0 && r.ContentLength != int64(last-first)+1 {
		return errSizeInvalid
	}
	return nil
}

func (s *Server) resume(ctx context.Context, repo storage.Repository, id string) (distribution.BlobWriter, error) {
	if !validUploadID(id) {
		return nil, errBlobUploadUnknown
	}
	blobs, err := s.blobs(ctx, repo)
	if err != nil {
		return nil, err
	}
	upload, err := blobs.Resume(ctx, id)
	if errors.Is(err, distribution.ErrBlobUploadUnknown) || errors.Is(err, fs.ErrNotExist) {
		return nil, errBlobUploadUnknown
	}
	if err != nil {
		return nil, fmt.Errorf("resuming upload %s: %w", id, err)
	}
	return upload, nil
}

func (s *Server) blobs(ctx context.Context, repo storage.Repository) (distribution.BlobStore, error) {
	name, err := reference.WithName(repo.Name())
	if err != nil {
		return nil, errNameInvalid.with(map[string]string{"name": repo.Name()})
	}
	r, err := s.cfg.Store.Namespace().Repository(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("repository %s: %w", name, err)
	}
	return r.Blobs(ctx), nil
}

// validUploadID reports whether id has the form of a UUID, which makes it a
// safe path too.
func validUploadID(id string) bool {
	if len(id) != 36 {
		return false
	}
	for i := range len(id) {
		switch b := id[i]; {
		case '0' <= b && b <= '9', 'a' <= b && b <= 'f':
		case b == '-' && (i == 8 || i == 13 || i == 18 || i == 23):
		default:
			return false
		}
	}
	return true
}

// uploadStatus answers with how far an upload has come.
func uploadStatus(w http.ResponseWriter, repo storage.Repository, upload distribution.BlobWriter, status int) error {
	setUploadHeaders(w, repo, upload)
	if status != http.StatusNoContent {
		w.Header().Set("Content-Length", "0")
	}
	w.WriteHeader(status)
	return nil
}

func setUploadHeaders(w http.ResponseWriter, repo storage.Repository, upload distribution.BlobWriter) {
	h := w.Header()
	h.Set("Location", "/v2/"+repo.Name()+"/blobs/uploads/"+upload.ID())
	h.Set("Docker-Upload-Uuid", upload.ID())
	// Inclusive, so that an empty upload and one of a single byte look alike.
	h.Set("Range", "0-"+strconv.FormatInt(max(upload.Size()-1, 0), 10))
}

func blobCreated(w http.ResponseWriter, repo storage.Repository, d digest.Digest) {
	h := w.Header()
	h.Set("Location", "/v2/"+repo.Name()+"/blobs/"+d.String())
	h.Set("Docker-Content-Digest", d.String())
	h.Set("Content-Length", "0")
	w.WriteHeader(http.StatusCreated)
}

// deleteBlob takes a blob out of the repository.
func (s *Server) deleteBlob(w http.ResponseWriter, r *http.Request, repo storage.Repository, ref string) error {
	d, err := parseDigest(ref)
	if err != nil {
		return err
	}
	if err := repo.DeleteLayer(r.Context(), d); err != nil {
		return ifAbsent(err, errBlobUnknown.with(map[string]string{"digest": ref}))
	}
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusAccepted)
	return nil
}
