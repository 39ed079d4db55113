package registry

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"

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
	tags, more, err := repo.Tags(r.URL.Query().Get("last"), n)
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
	for name, err := range s.cfg.Store.Repositories(r.URL.Query().Get("last")) {
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

// linkNext points to the next page: RFC 8288, and the specification's section
// "Listing Tags".
func linkNext(w http.ResponseWriter, path string, n int, last string) {
	query := url.Values{"n": {strconv.Itoa(n)}, "last": {last}}
	w.Header().Set("Link", "<"+path+"?"+query.Encode()+`>; rel="next"`)
}

func writeJSON(w http.ResponseWriter, r *http.Request, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(http.StatusOK)
	if r.Method != http.MethodHead {
		w.Write(body)
	}
	return nil
}
