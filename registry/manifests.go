package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/storage"
)

// manifest is what the registry needs to know of a manifest or index, OCI or
// Docker schema 2.
type manifest struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Config        *descriptor  `json:"config"`
	Layers        []descriptor `json:"layers"`
	Manifests     []descriptor `json:"manifests"`
	Subject       *descriptor  `json:"subject"`
}

type descriptor struct {
	MediaType string        `json:"mediaType"`
	Digest    digest.Digest `json:"digest"`
	Size      int64         `json:"size"`
	URLs      []string      `json:"urls"`
}

// parallelLooks is how many blobs of a manifest are looked for at once.
const parallelLooks = 8

// putManifest stores a manifest under a tag or a digest.
func (s *Server) putManifest(w http.ResponseWriter, r *http.Request, repo storage.Repository, ref string, who caller) error {
	content, err := s.readManifest(w, r)
	if err != nil {
		return err
	}
	m, err := parseManifest(r.Header.Get("Content-Type"), content)
	if err != nil {
		return err
	}
	d, tags, err := target(ref, content)
	if err != nil {
		return err
	}
	if err := m.checkBlobs(r.Context(), repo); err != nil {
		return err
	}
	rules := s.cfg.Rules()
	if err := rules.mayTag(r.Context(), repo, d, tags); err != nil {
		return err
	}
	room, err := s.claim(r.Context(), repo, int64(len(content)))
	if err != nil {
		return err
	}
	defer room.release()
	change := storage.Change{Action: storage.ActionPush, Repository: repo.Name(), Digest: d, MediaType: m.MediaType, Size: int64(len(content)), Actor: who.name()}
	if len(tags) > 0 {
		change.Tag = tags[0]
		if before, err := repo.Tag(r.Context(), change.Tag); err == nil {
			change.Previous = before
		}
	}
	err = s.record(r.Context(), rules, change, func() error {
		return storeManifest(r.Context(), rules, repo, m, d, content, tags)
	})
	if err != nil {
		return fmt.Errorf("storing manifest %s: %w", d, err)
	}
	h := w.Header()
	h.Set("Location", "/v2/"+repo.Name()+"/manifests/"+d.String())
	h.Set("Docker-Content-Digest", d.String())
	if m.Subject != nil {
		// Tells the client that it need not keep a list of referrers itself.
		h.Set("Oci-Subject", m.Subject.Digest.String())
	}
	h.Set("Content-Length", "0")
	w.WriteHeader(http.StatusCreated)
	return nil
}

// storeManifest stores a manifest and its tag. What it refers to is looked for
// once more after: a deletion that went on meanwhile may have taken it.
func storeManifest(ctx context.Context, rules *Rules, repo storage.Repository, m *manifest, d digest.Digest, content []byte, tags []string) error {
	for _, other := range append(m.Manifests[:len(m.Manifests):len(m.Manifests)], m.subjects()...) {
		if err := repo.UseManifest(ctx, other.Digest); err != nil {
			return err
		}
	}
	immutable := len(tags) > 0 && rules.locked(repo.Name(), tags[0])
	if immutable {
		if err := repo.PutManifest(ctx, d, content); err != nil {
			return err
		}
		err := repo.CreateTag(ctx, tags[0], d)
		if errors.Is(err, fs.ErrExist) {
			return lockedError(repo, tags[0])
		}
		if err != nil {
			return err
		}
	} else if err := repo.PutManifest(ctx, d, content, tags...); err != nil {
		return err
	}
	return m.checkBlobs(ctx, repo)
}

// record makes a change, with an entry in the journal where the rules want one.
func (s *Server) record(ctx context.Context, rules *Rules, c storage.Change, apply func() error) error {
	if !rules.journal {
		return apply()
	}
	return s.cfg.Store.Journal().Record(ctx, c, apply)
}

// deleteManifest deletes a tag, or a manifest with the tags that name it.
func (s *Server) deleteManifest(w http.ResponseWriter, r *http.Request, repo storage.Repository, ref string, who caller) error {
	rules := s.cfg.Rules()
	unknown := errManifestUnknown.with(map[string]string{"name": repo.Name(), "reference": ref})
	change := storage.Change{Action: storage.ActionDelete, Repository: repo.Name(), Actor: who.name()}
	apply := func() error { return ifAbsent(repo.DeleteManifest(r.Context(), change.Digest), unknown) }
	var err error
	switch {
	case strings.Contains(ref, ":"):
		if change.Digest, err = parseDigest(ref); err != nil {
			return err
		}
	case !storage.ValidTag(ref):
		return errTagInvalid.because("%q is neither a tag nor a digest", ref)
	default:
		if change.Digest, err = repo.Tag(r.Context(), ref); err != nil {
			return ifAbsent(err, unknown)
		}
		change.Tag, change.Previous = ref, change.Digest
		apply = func() error { return ifAbsent(repo.DeleteTag(r.Context(), ref), unknown) }
	}
	err = rules.mayGo(r.Context(), repo, func(tag string) bool {
		now, err := repo.Tag(r.Context(), tag)
		return tag == ref || change.Tag == "" && err == nil && now == change.Digest
	})
	if err != nil {
		return err
	}
	if err := s.record(r.Context(), rules, change, apply); err != nil {
		return err
	}
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusAccepted)
	return nil
}

// deleteRepository removes a repository with everything in it. The specification
// has no request for this; the path is what it would add up to.
func (s *Server) deleteRepository(w http.ResponseWriter, r *http.Request, repo storage.Repository, who caller) error {
	rules := s.cfg.Rules()
	if err := rules.mayGo(r.Context(), repo, func(string) bool { return true }); err != nil {
		return err
	}
	change := storage.Change{Action: storage.ActionDelete, Repository: repo.Name(), Actor: who.name()}
	unknown := errNameUnknown.with(map[string]string{"name": repo.Name()})
	err := s.record(r.Context(), rules, change, func() error { return ifAbsent(repo.DeleteRepository(r.Context()), unknown) })
	if err != nil {
		return err
	}
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusAccepted)
	return nil
}

func (s *Server) readManifest(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if r.ContentLength > maxManifest {
		return nil, errManifestTooLarge
	}
	body := &bodyReader{r: r.Body, turn: newTurn(w), stall: s.stall}
	content, err := io.ReadAll(http.MaxBytesReader(w, io.NopCloser(body), maxManifest))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return nil, errManifestTooLarge
	}
	if err != nil {
		return nil, errSizeInvalid.because("the manifest was cut short")
	}
	return content, nil
}

// target is the digest to store content under, and the tags to point at it.
func target(ref string, content []byte) (digest.Digest, []string, error) {
	if !strings.Contains(ref, ":") {
		if !storage.ValidTag(ref) {
			return "", nil, errTagInvalid.because("%q is not a tag", ref)
		}
		return digest.FromBytes(content), []string{ref}, nil
	}
	d, err := parseDigest(ref)
	if err != nil {
		return "", nil, err
	}
	if actual := d.Algorithm().FromBytes(content); actual != d {
		return "", nil, errDigestInvalid.because("the manifest's digest is %s", actual)
	}
	return d, nil, nil
}

// parseManifest checks that content is a manifest of a type that the registry
// knows, and of the type that the client says it is.
func parseManifest(contentType string, content []byte) (*manifest, error) {
	var m manifest
	if err := json.Unmarshal(content, &m); err != nil {
		return nil, errManifestInvalid.because("the manifest is not valid JSON: %v", err)
	}
	if m.SchemaVersion != 2 {
		return nil, errManifestInvalid.because("schemaVersion is %d; only 2 is supported", m.SchemaVersion)
	}
	declared, err := declaredType(contentType)
	if err != nil {
		return nil, err
	}
	if declared != "" && m.MediaType != "" && declared != m.MediaType {
		return nil, errManifestInvalid.because("Content-Type is %s but mediaType is %s", declared, m.MediaType)
	}
	if m.MediaType == "" {
		// Without the field the type is read off the structure ever after.
		if structure := manifestType(content); declared != "" && declared != structure {
			return nil, errManifestInvalid.because("Content-Type is %s, but without a mediaType field this is %s", declared, structure)
		} else {
			m.MediaType = structure
		}
	}
	return &m, m.validate()
}

// declaredType reads a Content-Type header. Empty, and the type of any JSON,
// declare nothing.
func declaredType(header string) (string, error) {
	if header == "" {
		return "", nil
	}
	t, _, err := mime.ParseMediaType(header)
	if err != nil {
		return "", errManifestInvalid.because("Content-Type %q is malformed", header)
	}
	if t == "application/json" || t == "application/octet-stream" {
		return "", nil
	}
	return t, nil
}

func (m *manifest) validate() error {
	switch m.MediaType {
	case typeOCIManifest, typeDockerManifest:
		if m.Config == nil {
			return errManifestInvalid.because("the manifest has no config")
		}
	case typeOCIIndex, typeDockerList:
	default:
		return errManifestInvalid.because("mediaType %q is not one that this registry stores", m.MediaType)
	}
	for d := range m.references {
		if err := d.Digest.Validate(); err != nil {
			return errManifestInvalid.because("digest %q in the manifest is invalid", d.Digest)
		}
		if d.Size < 0 {
			return errManifestInvalid.because("size of %s in the manifest is negative", d.Digest)
		}
	}
	return nil
}

// subjects is the subject, if there is one.
func (m *manifest) subjects() []descriptor {
	if m.Subject == nil {
		return nil
	}
	return []descriptor{*m.Subject}
}

// references yields every descriptor in the manifest.
func (m *manifest) references(yield func(descriptor) bool) {
	for _, d := range []*descriptor{m.Config, m.Subject} {
		if d != nil && !yield(*d) {
			return
		}
	}
	for _, list := range [][]descriptor{m.Layers, m.Manifests} {
		for _, d := range list {
			if !yield(d) {
				return
			}
		}
	}
}

// checkBlobs makes sure that what an image manifest needs is in the repository,
// except for layers that are to be had elsewhere. An index may be sparse: its
// manifests need not be here.
func (m *manifest) checkBlobs(ctx context.Context, repo storage.Repository) error {
	if m.Config == nil {
		return nil
	}
	g, failed := errgroup.WithContext(context.WithoutCancel(ctx))
	g.SetLimit(parallelLooks)
	for _, d := range append(m.Layers[:len(m.Layers):len(m.Layers)], *m.Config) {
		if failed.Err() != nil {
			break
		}
		g.Go(func() error { return d.check(ctx, repo) })
	}
	return g.Wait()
}

// check makes sure that one blob is in the repository, or to be had elsewhere.
func (d descriptor) check(ctx context.Context, repo storage.Repository) error {
	_, err := repo.UseLayer(ctx, d.Digest)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(d.URLs) > 0 {
		return nil
	}
	return errManifestBlobUnknown.because("blob %s, which the manifest refers to, is not in the repository", d.Digest).
		with(map[string]string{"digest": d.Digest.String()})
}
