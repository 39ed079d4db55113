package cache

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
)

type kind int

const (
	kindPing kind = iota
	kindManifest
	kindBlob
	kindReferrers
)

func (k kind) String() string {
	return [...]string{"ping", "manifest", "blob", "referrers"}[k]
}

// route is what a request asks for. Of tag and digest exactly one is set,
// except for kindPing, which has neither.
type route struct {
	kind   kind
	ns     string // the registry meant; "" if the client did not say
	repo   string
	tag    string
	digest digest.Digest
	filter string // artifactType of kindReferrers
}

// path is the request path of rt, the same at every registry.
func (rt route) path() string {
	ref := rt.tag
	if ref == "" {
		ref = rt.digest.String()
	}
	dir := map[kind]string{kindManifest: "/manifests/", kindBlob: "/blobs/", kindReferrers: "/referrers/"}[rt.kind]
	return "/v2/" + rt.repo + dir + ref
}

// parseRoute reads a request's URL (OCI distribution spec 1.1, "Endpoints").
// The error is a refusal.
func parseRoute(u *url.URL) (route, error) {
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return route{}, refuse(http.StatusNotFound, "query", "the query of the URL cannot be parsed")
	}
	rt := route{}
	if ns := query["ns"]; len(ns) == 1 {
		rt.ns = strings.ToLower(ns[0])
	} else if len(ns) > 1 {
		return route{}, refuse(http.StatusNotFound, "namespace", "ns is given more than once")
	}
	if u.Path == "/v2/" || u.Path == "/v2" {
		return rt, nil
	}
	rest, ok := strings.CutPrefix(u.Path, "/v2/")
	if !ok {
		return route{}, refuse(http.StatusNotFound, "path", "no such endpoint")
	}
	rest, ref, ok := cutLast(rest)
	if !ok {
		return route{}, refuse(http.StatusNotFound, "path", "no such endpoint")
	}
	repo, what, _ := cutLast(rest)
	if !validRepository(repo) {
		return route{}, refuse(http.StatusNotFound, "path", "no such endpoint, or not a valid repository name")
	}
	rt.repo = repo
	switch what {
	case "manifests":
		rt.kind = kindManifest
		if validTag(ref) {
			rt.tag = ref
			return rt, nil
		}
	case "blobs":
		rt.kind = kindBlob
	case "referrers":
		rt.kind = kindReferrers
		rt.filter = query.Get("artifactType")
	default:
		return route{}, refuse(http.StatusNotFound, "path", "no such endpoint")
	}
	rt.digest = digest.Digest(ref)
	if rt.digest.Validate() != nil {
		return route{}, refuse(http.StatusNotFound, "reference", "neither a tag nor a digest of a known algorithm")
	}
	return rt, nil
}

func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return "", s, false
	}
	return s[:i], s[i+1:], true
}

// validRepository implements the grammar of the distribution spec:
// components of [a-z0-9]+ joined by one of ". _ __" or any number of "-",
// separated by slashes.
func validRepository(name string) bool {
	if name == "" || len(name) > 255 {
		return false
	}
	for component := range strings.SplitSeq(name, "/") {
		if !validComponent(component) {
			return false
		}
	}
	return true
}

func validComponent(s string) bool {
	sep := "" // separator since the last letter or digit
	if s == "" || !alphanumeric(s[0]) || !alphanumeric(s[len(s)-1]) {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case alphanumeric(c):
			if sep != "" && sep != "." && sep != "_" && sep != "__" && strings.Trim(sep, "-") != "" {
				return false
			}
			sep = ""
		case c == '.' || c == '_' || c == '-':
			sep += s[i : i+1]
		default:
			return false
		}
	}
	return true
}

func alphanumeric(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }

// validTag implements [a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}.
func validTag(s string) bool {
	if s == "" || len(s) > 128 || s[0] == '.' || s[0] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !alphanumeric(c) && (c < 'A' || c > 'Z') && c != '_' && c != '.' && c != '-' {
			return false
		}
	}
	return true
}

// byteRange is one Range of a request: first to last, both inclusive. The
// zero value is the whole body.
type byteRange struct {
	set    bool
	suffix bool  // the last `first` bytes
	first  int64 // or the length of the suffix
	last   int64 // -1: to the end
}

// parseRange reads a Range header. What it does not understand, several
// ranges among it, means the whole body, as RFC 9110, section 14.2, allows.
func parseRange(header string) byteRange {
	spec, ok := strings.CutPrefix(header, "bytes=")
	if !ok {
		return byteRange{}
	}
	first, last, ok := strings.Cut(strings.TrimSpace(spec), "-")
	if !ok {
		return byteRange{}
	}
	if first == "" {
		n, ok := parseOffset(last)
		return byteRange{set: ok, suffix: ok, first: n, last: -1}
	}
	a, ok := parseOffset(first)
	if !ok {
		return byteRange{}
	}
	if last == "" {
		return byteRange{set: true, first: a, last: -1}
	}
	b, ok := parseOffset(last)
	if !ok || b < a {
		return byteRange{}
	}
	return byteRange{set: true, first: a, last: b}
}

// parseOffset accepts digits only, unlike strconv.
func parseOffset(s string) (int64, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}

// span is the half-open interval [start, end) of a body.
type span struct{ start, end int64 }

func (s span) len() int64 { return s.end - s.start }

// of places r in a body of size bytes; ok is false when no byte of it is there.
func (r byteRange) of(size int64) (s span, ok bool) {
	switch {
	case !r.set:
		return span{0, size}, true
	case r.suffix:
		return span{max(0, size-r.first), size}, r.first > 0 && size > 0
	case r.first >= size:
		return span{}, false
	case r.last < 0 || r.last >= size:
		return span{r.first, size}, true
	default:
		return span{r.first, r.last + 1}, true
	}
}

// parseContentRange reads "bytes first-last/total", all of which must be known.
func parseContentRange(header string) (s span, total int64, ok bool) {
	spec, ok := strings.CutPrefix(header, "bytes ")
	if !ok {
		return span{}, 0, false
	}
	r, size, _ := strings.Cut(spec, "/")
	a, b, _ := strings.Cut(r, "-")
	first, ok1 := parseOffset(a)
	last, ok2 := parseOffset(b)
	total, ok3 := parseOffset(size)
	if !ok1 || !ok2 || !ok3 || first > last || last >= total {
		return span{}, 0, false
	}
	return span{first, last + 1}, total, true
}
