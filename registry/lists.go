package registry

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"

	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/connected-registry/connected-registry/storage"
)

// maxPage bounds a page of the catalogue or of a tag list; the Link header
// leads to the rest. A catalogue page is smaller when the client does not say.
const (
	maxPage     = 10000
	defaultPage = 100
)

// listTags answers with a page of a repository's tags. Without n the
// specification wants all of them.
func (s *Server) listTags(w http.ResponseWriter, r *http.Request, repo storage.Repository) error {
	n, err := pageSize(r, -1)
	if err != nil {
		return err
	}
	tags, more, err := repo.Tags(r.Context(), r.URL.Query().Get("last"), n)
	if err != nil {
		return ifAbsent(err, errNameUnknown.with(map[string]string{"name": repo.Name()}))
	}
	if more && len(tags) > 0 {
		linkNext(w, "/v2/"+repo.Name()+"/tags/list", n, tags[len(tags)-1])
	}
	return writeJSON(w, r, struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}{repo.Name(), tags})
}

// listRepositories answers with a page of the catalogue: of those repositories
// that the caller may see.
func (s *Server) listRepositories(w http.ResponseWriter, r *http.Request, who caller) error {
	n, err := pageSize(r, defaultPage)
	if err != nil {
		return err
	}
	names, more := []string{}, false
	for name, err := range s.cfg.Store.Repositories(r.Context(), r.URL.Query().Get("last")) {
		if err != nil {
			return fmt.Errorf("listing repositories: %w", err)
		}
		if !who.sees(name) {
			continue
		}
		if len(names) == n {
			more = true
			break
		}
		names = append(names, name)
	}
	if more && n > 0 {
		linkNext(w, "/v2/_catalog", n, names[n-1])
	}
	return writeJSON(w, r, struct {
		Repositories []string `json:"repositories"`
	}{names})
}

// A page of referrers ends at either bound. Clients take no index above 4 MiB,
// and some do not look for a next page, so it is as large as it may be.
const (
	maxReferrers     = 1000
	maxReferrersSize = 3 << 20 // bytes of annotations and artifact types
)

// listReferrers answers with a page of what refers to a manifest, as an index.
func (s *Server) listReferrers(w http.ResponseWriter, r *http.Request, repo storage.Repository, ref string) error {
	subject, err := parseDigest(ref)
	if err != nil {
		return err
	}
	query := r.URL.Query()
	n, err := pageSize(r, maxReferrers)
	if err != nil {
		return err
	}
	n = min(max(n, 1), maxReferrers)
	filter := query.Get("artifactType")
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: typeOCIIndex, Manifests: []v1.Descriptor{}}
	size := 0
	for desc, err := range repo.Referrers(r.Context(), subject, digest.Digest(query.Get("last"))) {
		if err != nil {
			return fmt.Errorf("listing referrers of %s: %w", subject, err)
		}
		if filter != "" && desc.ArtifactType != filter {
			continue
		}
		size += weight(desc)
		if have := len(index.Manifests); have == n || have > 0 && size > maxReferrersSize {
			next := url.Values{"n": {strconv.Itoa(n)}, "last": {index.Manifests[have-1].Digest.String()}}
			if filter != "" {
				next.Set("artifactType", filter)
			}
			link(w, "/v2/"+repo.Name()+"/referrers/"+subject.String(), next)
			break
		}
		index.Manifests = append(index.Manifests, desc)
	}
	if filter != "" {
		w.Header().Set("Oci-Filters-Applied", "artifactType")
	}
	return writeJSONAs(w, r, typeOCIIndex, index)
}

// weight is about how many bytes a descriptor takes in an answer.
func weight(desc v1.Descriptor) int {
	n := 300 + len(desc.ArtifactType)
	for key, value := range desc.Annotations {
		n += len(key) + len(value) + 6
	}
	return n
}

// pageSize reads the query parameter n, which is cut to what is served at once.
func pageSize(r *http.Request, unset int) (int, error) {
	text := r.URL.Query().Get("n")
	if text == "" {
		return unset, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		return 0, errPageInvalid
	}
	return min(n, maxPage), nil
}

// linkNext points to the page after last.
func linkNext(w http.ResponseWriter, path string, n int, last string) {
	link(w, path, url.Values{"n": {strconv.Itoa(n)}, "last": {last}})
}

// link points to the next page: RFC 8288, and the specification's section
// "Listing Tags".
func link(w http.ResponseWriter, path string, query url.Values) {
	w.Header().Set("Link", "<"+path+"?"+query.Encode()+`>; rel="next"`)
}

func writeJSON(w http.ResponseWriter, r *http.Request, v any) error {
	return writeJSONAs(w, r, "application/json", v)
}

func writeJSONAs(w http.ResponseWriter, r *http.Request, contentType string, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(http.StatusOK)
	if r.Method != http.MethodHead {
		w.Write(body)
	}
	return nil
}
