package registry

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage"
)

// maxManifest is the largest manifest that is accepted or served: what the OCI
// distribution specification, section "Pushing Manifests", asks for at least.
const maxManifest = 4 << 20

// getManifest answers GET and HEAD of a manifest, and tells who wants to know of
// one that is not here.
func (s *Server) getManifest(w http.ResponseWriter, r *http.Request, repo storage.Repository, ref string) error {
	err := s.sendManifest(w, r, repo, ref)
	if s.cfg.Missing != nil && errors.Is(err, errManifestUnknown) {
		s.cfg.Missing(r.Context(), repo.Name(), ref)
	}
	return err
}

// sendManifest answers GET and HEAD of a manifest by tag or digest. The Accept
// header does not select: the specification has the client say what it can
// read, but there is only one content of a digest, and a client that did not
// list its type is better served with it than with a 404.
func (s *Server) sendManifest(w http.ResponseWriter, r *http.Request, repo storage.Repository, ref string) error {
	d, err := resolve(r.Context(), repo, ref)
	if err != nil {
		return err
	}
	content, err := repo.Manifest(r.Context(), d)
	if err != nil {
		return ifAbsent(err, errManifestUnknown.with(map[string]string{"name": repo.Name(), "reference": ref}))
	}
	h := w.Header()
	h.Set("Docker-Content-Digest", d.String())
	h.Set("Etag", `"`+d.String()+`"`)
	if matchesETag(r, d) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	mediaType, known := s.types.get(d)
	if !known {
		mediaType = manifestType(content)
		s.types.put(d, mediaType)
	}
	h.Set("Content-Type", mediaType)
	h.Set("Content-Length", strconv.Itoa(len(content)))
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodGet {
		w.Write(content)
	}
	return nil
}

// getBlob answers GET and HEAD of a blob, with ranges. From the file to a plain
// connection the kernel moves the bytes (sendfile).
func (s *Server) getBlob(w http.ResponseWriter, r *http.Request, repo storage.Repository, ref string) error {
	d, err := parseDigest(ref)
	if err != nil {
		return err
	}
	f, err := repo.OpenLayer(r.Context(), d)
	if err != nil {
		return ifAbsent(err, errBlobUnknown.with(map[string]string{"digest": ref}))
	}
	defer f.Close()
	h := w.Header()
	h.Set("Docker-Content-Digest", d.String())
	h.Set("Etag", `"`+d.String()+`"`)
	h.Set("Content-Type", "application/octet-stream")
	if end, ok := rangeEnd(r.Header.Get("Range")); ok {
		f.Expect(end)
	}
	http.ServeContent(w, r, "", time.Time{}, f.ReadSeekCloser)
	return nil
}

// rangeEnd is where the one range that a client asks for ends, counted from the
// beginning, if it says so (RFC 9110, section 14.1.2). It need not be right: it
// only says how much is worth fetching.
func rangeEnd(header string) (end int64, ok bool) {
	_, last, found := strings.Cut(strings.TrimPrefix(header, "bytes="), "-")
	n, err := strconv.ParseUint(strings.TrimSpace(last), 10, 62)
	return int64(n) + 1, found && err == nil && strings.HasPrefix(header, "bytes=") && !strings.HasPrefix(header, "bytes=-")
}

// resolve turns a reference into the digest of a manifest.
func resolve(ctx context.Context, repo storage.Repository, ref string) (digest.Digest, error) {
	if strings.Contains(ref, ":") {
		return parseDigest(ref)
	}
	if !storage.ValidTag(ref) {
		return "", errManifestUnknown.because("%q is neither a tag nor a digest", ref)
	}
	d, err := repo.Tag(ctx, ref)
	if err != nil {
		return "", ifAbsent(err, errManifestUnknown.with(map[string]string{"name": repo.Name(), "reference": ref}))
	}
	return d, nil
}

func parseDigest(s string) (digest.Digest, error) {
	d, err := digest.Parse(s)
	if err != nil {
		return "", errDigestInvalid.because("%q is not a digest", s)
	}
	return d, nil
}

// matchesETag reports whether the client has content d already. Clients send
// the digest with and without the quotes that RFC 9110 asks for.
func matchesETag(r *http.Request, d digest.Digest) bool {
	for _, header := range r.Header["If-None-Match"] {
		for tag := range strings.SplitSeq(header, ",") {
			tag = strings.Trim(strings.TrimPrefix(strings.TrimSpace(tag), "W/"), `"`)
			if tag == d.String() || tag == "*" {
				return true
			}
		}
	}
	return false
}

// Media types of manifests.
const (
	typeOCIManifest    = "application/vnd.oci.image.manifest.v1+json"
	typeOCIIndex       = "application/vnd.oci.image.index.v1+json"
	typeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	typeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// manifestType is the media type of a stored manifest: what its mediaType field
// says, which OCI types may leave out, and else what its structure says.
func manifestType(content []byte) string {
	var m struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
	}
	if json.Unmarshal(content, &m) != nil {
		return "application/octet-stream" // not stored by way of the API
	}
	switch {
	case m.MediaType != "" && validHeaderValue(m.MediaType):
		return m.MediaType
	case m.Manifests != nil:
		return typeOCIIndex
	default:
		return typeOCIManifest
	}
}

func validHeaderValue(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// maxTypes bounds how many manifests' media types are remembered.
const maxTypes = 8192

// typeCache remembers the media types of manifests, which take longer to read
// off a manifest than the manifest takes to read. What it holds follows from the
// digest, so it cannot be out of date.
type typeCache struct {
	mu    sync.RWMutex
	types map[digest.Digest]string // guarded by mu
}

func newTypeCache() *typeCache { return &typeCache{types: make(map[digest.Digest]string)} }

func (c *typeCache) get(d digest.Digest) (mediaType string, ok bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	mediaType, ok = c.types[d]
	return mediaType, ok
}

func (c *typeCache) put(d digest.Digest, mediaType string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.types) >= maxTypes {
		for old := range c.types { // whichever: forgetting costs a parse
			delete(c.types, old)
			break
		}
	}
	c.types[d] = mediaType
}
