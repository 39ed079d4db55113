package registry

import (
	"errors"
	"net/http"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/registry/auth"
)

// caller is who makes a request: auth's answer, or anybody when there is no
// access control.
type caller struct {
	id *auth.Identity // nil: anybody, who may do everything
}

func (c caller) name() string {
	if c.id == nil {
		return ""
	}
	return c.id.Name()
}

// may reports whether the caller may also do action on another repository than
// the one of the request.
func (c caller) may(repository string, action v1alpha1.Action) bool {
	return c.id == nil || c.id.May(repository, action)
}

// sees reports whether a repository is on the caller's catalogue.
func (c caller) sees(repository string) bool { return c.id == nil || c.id.Sees(repository) }

// authorize finds out who makes a request and whether they may.
func (s *Server) authorize(w http.ResponseWriter, r *http.Request, rt route) (caller, error) {
	a := s.cfg.Auth
	if a == nil {
		return caller{}, nil
	}
	var id auth.Identity
	var err error
	switch rt.end {
	case endBase:
		id, err = a.AuthorizeBase(r)
	case endCatalog:
		id, err = a.AuthorizeCatalogue(r)
	default:
		id, err = a.Authorize(r, needs(rt, r.Method)...)
	}
	var challenge *auth.ChallengeError
	var denied *auth.DeniedError
	switch {
	case errors.As(err, &challenge):
		if challenge.Header != "" {
			w.Header().Set("Www-Authenticate", challenge.Header)
		}
		return caller{&id}, errUnauthorized.because("%s", challenge)
	case errors.As(err, &denied):
		return caller{&id}, errDenied.because("%s", denied)
	}
	return caller{&id}, err
}

// needs is the access that a request to one repository needs.
func needs(rt route, method string) []auth.Need {
	all := []auth.Need{{Repository: rt.name, AnyOf: actionsFor(rt.end, method)}}
	if rt.end == endRepository {
		all = append(all, auth.Need{Repository: rt.name, AnyOf: []v1alpha1.Action{v1alpha1.ActionMetadataWrite}})
	}
	return all
}

// actionsFor is the access that a request to one repository needs: any of the
// actions.
func actionsFor(end endpoint, method string) []v1alpha1.Action {
	switch {
	case end == endTags:
		return []v1alpha1.Action{v1alpha1.ActionMetadataRead}
	case end == endReferrers:
		// Whoever pulls an image verifies its signatures.
		return []v1alpha1.Action{v1alpha1.ActionMetadataRead, v1alpha1.ActionContentRead}
	case end == endUploads, end == endUpload:
		return []v1alpha1.Action{v1alpha1.ActionContentWrite}
	case method == http.MethodDelete:
		return []v1alpha1.Action{v1alpha1.ActionContentDelete}
	case isWrite(method):
		return []v1alpha1.Action{v1alpha1.ActionContentWrite}
	default:
		return []v1alpha1.Action{v1alpha1.ActionContentRead}
	}
}
