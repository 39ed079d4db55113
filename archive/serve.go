package archive

import (
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// ServeHTTP answers the reading half of the OCI distribution specification, for
// a client on the same machine: there are no credentials.
func (a *Archive) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		fail(w, http.StatusMethodNotAllowed, "UNSUPPORTED")
		return
	}
	rest, ok := strings.CutPrefix(r.URL.Path, "/v2/")
	if !ok {
		fail(w, http.StatusNotFound, "NAME_UNKNOWN")
		return
	}
	if rest == "" {
		_, _ = w.Write([]byte("{}"))
		return
	}
	for _, route := range []struct {
		middle string
		serve  func(http.ResponseWriter, *http.Request, *repository, string)
	}{
		{"/manifests/", a.serveManifest},
		{"/blobs/", a.serveBlob},
		{"/referrers/", a.serveReferrers},
		{"/tags/", a.serveTags},
	} {
		i := strings.LastIndex(rest, route.middle)
		if i < 0 {
			continue
		}
		repo := a.repositories[rest[:i]]
		if repo == nil {
			fail(w, http.StatusNotFound, "NAME_UNKNOWN")
			return
		}
		route.serve(w, r, repo, rest[i+len(route.middle):])
		return
	}
	fail(w, http.StatusNotFound, "NAME_UNKNOWN")
}

func (a *Archive) serveManifest(w http.ResponseWriter, r *http.Request, repo *repository, reference string) {
	d := digest.Digest(reference)
	if tagged, ok := repo.tags[reference]; ok {
		d = tagged.Digest
	}
	if d.Validate() != nil {
		fail(w, http.StatusNotFound, "MANIFEST_UNKNOWN")
		return
	}
	body, m, err := a.manifest(d)
	if err != nil {
		failRead(w, err, "MANIFEST_UNKNOWN")
		return
	}
	h := w.Header()
	h.Set("Content-Type", m.mediaType())
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Docker-Content-Digest", d.String())
	if r.Method == http.MethodGet {
		_, _ = w.Write(body) // a client that is gone needs no error
	}
}

func (a *Archive) serveBlob(w http.ResponseWriter, r *http.Request, _ *repository, reference string) {
	d := digest.Digest(reference)
	if d.Validate() != nil {
		fail(w, http.StatusBadRequest, "DIGEST_INVALID")
		return
	}
	content, err := a.blobs(d)
	if err != nil {
		failRead(w, err, "BLOB_UNKNOWN")
		return
	}
	defer content.Close()
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Docker-Content-Digest", d.String())
	h.Set("Etag", strconv.Quote(d.String()))
	http.ServeContent(w, r, "", time.Time{}, content)
}

func (a *Archive) serveReferrers(w http.ResponseWriter, _ *http.Request, repo *repository, subject string) {
	referrers := []v1.Descriptor{}
	for _, d := range repo.referrers[digest.Digest(subject)] {
		d.Annotations = maps.Clone(d.Annotations)
		delete(d.Annotations, RepositoryAnnotation)
		delete(d.Annotations, SubjectAnnotation)
		referrers = append(referrers, d)
	}
	writeJSON(w, v1.MediaTypeImageIndex, v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageIndex,
		Manifests: referrers,
	})
}

func (a *Archive) serveTags(w http.ResponseWriter, _ *http.Request, repo *repository, _ string) {
	writeJSON(w, "application/json", map[string]any{"tags": slices.Sorted(maps.Keys(repo.tags))})
}

func writeJSON(w http.ResponseWriter, contentType string, v any) {
	w.Header().Set("Content-Type", contentType)
	_ = json.NewEncoder(w).Encode(v) // a client that is gone needs no error
}

func failRead(w http.ResponseWriter, err error, code string) {
	if errors.Is(err, fs.ErrNotExist) {
		fail(w, http.StatusNotFound, code)
		return
	}
	fail(w, http.StatusInternalServerError, "UNKNOWN")
}

func fail(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{"code": code}}})
}
