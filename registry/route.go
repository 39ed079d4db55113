package registry

import (
	"net/http"
	"strings"
)

// endpoint is one of the endpoints of the OCI distribution specification,
// section "Endpoints".
type endpoint int

const (
	endUnknown    endpoint = iota
	endBase                // /v2/
	endCatalog             // /v2/_catalog
	endTags                // /v2/<name>/tags/list
	endManifest            // /v2/<name>/manifests/<reference>
	endBlob                // /v2/<name>/blobs/<digest>
	endUploads             // /v2/<name>/blobs/uploads/
	endUpload              // /v2/<name>/blobs/uploads/<id>
	endReferrers           // /v2/<name>/referrers/<digest>
	endRepository          // /v2/<name>/: ours, to delete it
	endToken               // where bearer tokens are had
)

// String names the endpoint in metrics and logs.
func (e endpoint) String() string {
	return [...]string{"unknown", "base", "catalog", "tags", "manifest", "blob", "uploads", "upload", "referrers", "repository", "token"}[e]
}

// route is a parsed request path. What it holds has the shape of the endpoint
// but is otherwise as the client sent it: name and ref are still to be checked.
type route struct {
	end  endpoint
	name string // repository
	ref  string // tag or digest, digest, or upload, by endpoint
}

// parseRoute reads a path from its end, for a repository name may hold any of
// the words that the endpoints are made of, and a reference may hold no slash.
func parseRoute(path string) route {
	rest, ok := strings.CutPrefix(path, "/v2")
	switch {
	case !ok:
		return route{}
	case rest == "", rest == "/":
		return route{end: endBase}
	case rest == "/_catalog":
		return route{end: endCatalog}
	case rest[0] != '/':
		return route{}
	}
	head, last := cutLast(rest[1:])
	name, word := cutLast(head)
	switch {
	case word == "manifests":
		return route{endManifest, name, last}
	case word == "referrers":
		return route{endReferrers, name, last}
	case word == "tags" && last == "list":
		return route{endTags, name, ""}
	case word == "blobs" && last == "uploads":
		return route{endUploads, name, ""}
	case word == "blobs":
		return route{endBlob, name, last}
	case word == "uploads":
		if name, ok := strings.CutSuffix(name, "/blobs"); ok {
			if last == "" {
				return route{endUploads, name, ""}
			}
			return route{endUpload, name, last}
		}
	case last == "":
		return route{endRepository, head, ""}
	}
	return route{}
}

// cutLast splits s at its last slash.
func cutLast(s string) (before, after string) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return "", s
	}
	return s[:i], s[i+1:]
}

// methods lists what an endpoint can be asked for, as the Allow header has it.
func (e endpoint) methods() string {
	switch e {
	case endManifest:
		return "GET, HEAD, PUT, DELETE"
	case endBlob:
		return "GET, HEAD, DELETE"
	case endUploads:
		return "POST"
	case endRepository:
		return "DELETE"
	case endUpload:
		return "GET, HEAD, PATCH, PUT, DELETE"
	default:
		return "GET, HEAD"
	}
}

// isWrite reports whether a method would change something.
func isWrite(method string) bool {
	return method != http.MethodGet && method != http.MethodHead
}
