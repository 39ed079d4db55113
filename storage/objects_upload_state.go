package storage

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// An upload that goes on over several requests, at whichever replica, is an
// upload in parts of the object store and one small object beside its data,
//
//	…/_uploads/<id>/data.parts
//
// which says in a line of JSON what parts there are, and holds the bytes behind
// them that do not fill one. It is replaced on condition that nobody else has,
// so that of two who go on with the same upload one is told. What of it fits
// one part never becomes an upload in parts.
//
// It holds the state of a hash over all of that, too. So what the data is when it
// is in its place is known for certain: small data bears its digest, and what was
// put together bears the mark of the state that knows it. Distribution hashes as
// well, but what it has hashed may be another's who went on with the same upload.

const (
	uploadSuffix = ".parts"
	maxState     = 4 << 20 // bytes of its line, more than 10,000 parts take
)

// uploadState is what the object beside an upload's data says.
type uploadState struct {
	Upload string        `json:"upload,omitempty"` // the object store's; empty: no part is full yet
	Parts  []bucket.Part `json:"parts,omitempty"`
	// Whole is set before the parts are put together: nothing can be added.
	Whole bool `json:"whole,omitempty"`
	// Mark is what the data put together bears as metadata: nobody else's does.
	Mark string `json:"mark,omitempty"`
	// Hash is the state of the hash over everything that was received; when it
	// is whole there is the digest instead. Both are empty if there is none, of
	// an upload that an earlier release began.
	Hash   []byte        `json:"hash,omitempty"`
	Digest digest.Digest `json:"digest,omitempty"`
	// Nonce tells this state from one that another writer has put.
	Nonce string `json:"nonce"`
}

// markName is the name of the metadata with a state's mark.
const markName = "upload"

func (s uploadState) size() (n int64) {
	for _, p := range s.Parts {
		n += p.Size
	}
	return n
}

// markOf is the metadata of data put together.
func markOf(mark string) map[string]string {
	if mark == "" {
		return nil
	}
	return map[string]string{markName: mark}
}

// placed describes the data of an upload that is in its place, and what its digest
// is, if that is known.
func (d *bucketDriver) placed(ctx context.Context, path string) (bucket.Attributes, digest.Digest, error) {
	at, err := d.bucket.Stat(ctx, objectKey(path))
	if err != nil || at.Metadata[markName] == "" {
		return at, digest.Digest(at.Metadata[sealName]), err
	}
	state, err := d.readState(ctx, objectKey(path)+uploadSuffix)
	if !state.Whole || state.Mark != at.Metadata[markName] { // it is not there, or another's
		return at, "", err
	}
	return at, state.Digest, err
}

// readState reads the first line of the object beside an upload's data. The state
// of an object that is damaged, or not there, is the zero value.
func (d *bucketDriver) readState(ctx context.Context, key string) (state uploadState, err error) {
	r, _, err := d.bucket.Open(ctx, key, 0, -1)
	if err != nil {
		return state, ignoreAbsent(err)
	}
	defer r.Close()
	head, err := bufio.NewReader(io.LimitReader(r, maxState)).ReadBytes('\n')
	if errors.Is(err, io.EOF) || err == nil && json.Unmarshal(head, &state) != nil {
		return uploadState{}, nil
	}
	return state, err
}

// abortUpload throws away the parts of an upload whose state is about to be
// deleted.
func (d *bucketDriver) abortUpload(ctx context.Context, stateKey string) error {
	state, err := d.readState(ctx, stateKey)
	if err != nil || state.Upload == "" {
		return err // without a state nobody can go on with it, and what it began is swept
	}
	return d.bucket.Abort(ctx, stateKey[:len(stateKey)-len(uploadSuffix)], state.Upload)
}
