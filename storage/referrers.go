package storage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// What refers to a manifest (OCI distribution specification, "Listing
// Referrers") is kept beside distribution's own directories:
//
//	repositories/<name>/_referrers/<alg>/<hex of subject>/<alg>-<hex of referrer>
//
// one file for each referrer, which holds its descriptor. So replicas that
// index at the same time need no lock. The driver writes it before the link
// that makes the referrer part of the repository, whoever puts that link there;
// an entry whose manifest is not, or no longer, part of the repository does not
// count.

// maxManifest bounds what is read to find a subject.
const maxManifest = 4 << 20

// Referrers yields the descriptors of the manifests in the repository that name
// subject as theirs, sorted by digest, beginning after last. The subject need
// not be there. It reads as it goes; the first error ends it.
func (r Repository) Referrers(ctx context.Context, subject, last digest.Digest) iter.Seq2[v1.Descriptor, error] {
	return func(yield func(v1.Descriptor, error) bool) {
		dir := r.referrersDir(subject)
		entries, err := r.store.medium.list(ctx, dir)
		if errors.Is(err, fs.ErrNotExist) {
			return
		}
		if err != nil {
			yield(v1.Descriptor{}, err)
			return
		}
		for _, e := range entries {
			d, ok := parseEntryDigest(e.name)
			if d <= last || !ok {
				continue
			}
			desc, err := r.referrer(ctx, dir, d)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if !yield(desc, err) || err != nil {
				return
			}
		}
	}
}

// referrer reads an entry. The error is fs.ErrNotExist when it does not count.
func (r Repository) referrer(ctx context.Context, dir string, d digest.Digest) (v1.Descriptor, error) {
	if _, err := r.store.medium.readLink(ctx, linkPath(r.path+"/_manifests/revisions/", d)); err != nil {
		return v1.Descriptor{}, err
	}
	content, err := r.store.medium.readFile(ctx, dir+"/"+entryName(d))
	if err != nil {
		return v1.Descriptor{}, err
	}
	var desc v1.Descriptor
	if json.Unmarshal(content, &desc) != nil || desc.Digest != d {
		r.store.log.Warn("damaged entry in the list of referrers ignored", "repository", r.name, "referrer", d)
		return v1.Descriptor{}, fs.ErrNotExist
	}
	return desc, nil
}

func (r Repository) referrersDir(subject digest.Digest) string {
	return r.path + "/_referrers/" + subject.Algorithm().String() + "/" + subject.Encoded()
}

func entryName(d digest.Digest) string { return d.Algorithm().String() + "-" + d.Encoded() }

// parseEntryDigest is the inverse of entryName.
func parseEntryDigest(name string) (d digest.Digest, ok bool) {
	alg, hex, _ := strings.Cut(name, "-")
	d = digest.Digest(alg + ":" + hex)
	return d, d.Validate() == nil
}

// indexReferrer makes the manifest d a referrer of its subject, if it has one.
func (r Repository) indexReferrer(ctx context.Context, d digest.Digest, content []byte) error {
	subject, desc, ok := describe(d, content)
	if !ok {
		return nil
	}
	entry, err := json.Marshal(desc)
	if err != nil {
		return fmt.Errorf("listing %s as a referrer of %s: %w", d, subject, err)
	}
	return r.store.medium.putFile(ctx, r.referrersDir(subject)+"/"+entryName(d), entry)
}

// forgetReferrer undoes indexReferrer. Left undone, it would do no harm.
func (r Repository) forgetReferrer(ctx context.Context, d digest.Digest, content []byte) {
	if subject, _, ok := describe(d, content); ok {
		_ = r.store.medium.remove(ctx, r.referrersDir(subject)+"/"+entryName(d))
	}
}

// describe returns the subject of a manifest, and the descriptor by which it is
// listed as a referrer of it. ok is false when it has no subject.
func describe(d digest.Digest, content []byte) (subject digest.Digest, desc v1.Descriptor, ok bool) {
	var m struct {
		MediaType    string            `json:"mediaType"`
		ArtifactType string            `json:"artifactType"`
		Config       *v1.Descriptor    `json:"config"`
		Subject      *v1.Descriptor    `json:"subject"`
		Annotations  map[string]string `json:"annotations"`
	}
	if json.Unmarshal(content, &m) != nil || m.Subject == nil || m.Subject.Digest.Validate() != nil {
		return "", v1.Descriptor{}, false
	}
	desc = v1.Descriptor{
		MediaType:    m.MediaType,
		Digest:       d,
		Size:         int64(len(content)),
		ArtifactType: m.ArtifactType,
		Annotations:  m.Annotations,
	}
	if m.Config != nil {
		if desc.ArtifactType == "" {
			desc.ArtifactType = m.Config.MediaType
		}
		if desc.MediaType == "" {
			desc.MediaType = v1.MediaTypeImageManifest
		}
	}
	if desc.MediaType == "" {
		desc.MediaType = v1.MediaTypeImageIndex
	}
	return m.Subject.Digest, desc, true
}

// parseRevisionPath recognises the driver path of the link that makes a manifest
// part of a repository, or of the directory that holds it.
func (s *Store) parseRevisionPath(path string) (r Repository, d digest.Digest, ok bool) {
	rest, ok := strings.CutPrefix(strings.TrimSuffix(path, "/link"), repositoriesRoot)
	if !ok {
		return Repository{}, "", false
	}
	parts := strings.Split(rest, "/")
	i := slices.Index(parts, "_manifests")
	if i < 1 || len(parts) != i+4 || parts[i+1] != "revisions" {
		return Repository{}, "", false
	}
	d = digest.Digest(parts[i+2] + ":" + parts[i+3])
	r, err := s.Repository(strings.Join(parts[:i], "/"))
	return r, d, err == nil && d.Validate() == nil
}

// readManifest returns the content of the manifest d if it is stored and of a
// manifest's size, and else nil.
func (s *Store) readManifest(ctx context.Context, d digest.Digest) ([]byte, error) {
	f, err := s.OpenBlob(ctx, d)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.Size > maxManifest {
		return nil, nil
	}
	return io.ReadAll(f)
}
