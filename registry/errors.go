package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strconv"
	"syscall"

	"github.com/connected-registry/connected-registry/storage"
)

// apiError is an answer with an error body: OCI distribution specification,
// section "Error Codes". Handlers return it; writeError writes it. Any other
// error that a handler returns is ours, not the client's: it is logged, and the
// client learns no more than that.
type apiError struct {
	status  int
	code    string
	message string
	detail  any // marshalled as it is; nil leaves it out
}

func (e *apiError) Error() string { return e.code + ": " + e.message }

// Is makes variants of one error, with other messages and details, equal.
func (e *apiError) Is(target error) bool {
	t, ok := target.(*apiError)
	return ok && t.status == e.status && t.code == e.code
}

// with returns the error with a detail.
func (e *apiError) with(detail any) *apiError {
	c := *e
	c.detail = detail
	return &c
}

// because returns the error with a message of its own.
func (e *apiError) because(format string, args ...any) *apiError {
	c := *e
	c.message = fmt.Sprintf(format, args...)
	return &c
}

// The codes of the specification, each with the status that it or, where it
// leaves the choice, distribution gives.
var (
	errBlobUnknown         = &apiError{status: 404, code: "BLOB_UNKNOWN", message: "blob unknown to registry"}
	errBlobUploadInvalid   = &apiError{status: 400, code: "BLOB_UPLOAD_INVALID", message: "blob upload invalid"}
	errBlobUploadUnknown   = &apiError{status: 404, code: "BLOB_UPLOAD_UNKNOWN", message: "blob upload unknown to registry"}
	errDigestInvalid       = &apiError{status: 400, code: "DIGEST_INVALID", message: "provided digest did not match uploaded content"}
	errManifestBlobUnknown = &apiError{status: 400, code: "MANIFEST_BLOB_UNKNOWN", message: "manifest references a manifest or blob unknown to registry"}
	errManifestInvalid     = &apiError{status: 400, code: "MANIFEST_INVALID", message: "manifest invalid"}
	errManifestTooLarge    = &apiError{status: 413, code: "MANIFEST_INVALID", message: "manifest is larger than 4 MiB"}
	errManifestUnknown     = &apiError{status: 404, code: "MANIFEST_UNKNOWN", message: "manifest unknown to registry"}
	errNameInvalid         = &apiError{status: 400, code: "NAME_INVALID", message: "invalid repository name"}
	errTooManyUploads      = &apiError{status: 429, code: "TOOMANYREQUESTS", message: "too many uploads at once: try again"}
	errNameUnknown         = &apiError{status: 404, code: "NAME_UNKNOWN", message: "repository name not known to registry"}
	errNotFound            = &apiError{status: 404, code: "NAME_UNKNOWN", message: "no such endpoint"}
	errPageInvalid         = &apiError{status: 400, code: "PAGINATION_NUMBER_INVALID", message: "n must be a number that is not negative"}
	errRangeInvalid        = &apiError{status: 416, code: "BLOB_UPLOAD_INVALID", message: "chunk does not begin where the upload ends"}
	errSizeInvalid         = &apiError{status: 400, code: "SIZE_INVALID", message: "provided length did not match content length"}
	errTagInvalid          = &apiError{status: 400, code: "TAG_INVALID", message: "invalid tag"}
	errReadOnly            = &apiError{status: 403, code: "DENIED", message: "this connected registry is read-only (spec.mode is ReadOnly) and takes content from its parent alone: push to the parent registry"}
	errUnauthorized        = &apiError{status: 401, code: "UNAUTHORIZED", message: "authentication required"}
	errDenied              = &apiError{status: 403, code: "DENIED", message: "requested access to the resource is denied"}
	errUnsupported         = &apiError{status: 405, code: "UNSUPPORTED", message: "the operation is unsupported"}
	errBacklog             = &apiError{status: 503, code: "UNAVAILABLE", message: "too many changes are waiting to be brought to the parent registry"}
	errFull                = &apiError{status: 507, code: "UNAVAILABLE", message: "the registry's storage is full"}
	errInternal            = &apiError{status: 500, code: "UNKNOWN", message: "the registry met an internal fault; its log says which"}
)

// asAPIError finds what to answer for err. ours is true when err is a fault of
// the registry's, to be logged.
func asAPIError(err error) (answer *apiError, ours bool) {
	if errors.As(err, &answer) {
		return answer, false
	}
	if errors.Is(err, storage.ErrJournalFull) {
		return errBacklog, true
	}
	for _, full := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		if errors.Is(err, full) {
			return errFull, true
		}
	}
	return errInternal, true
}

// writeError answers with the error body.
func writeError(w http.ResponseWriter, r *http.Request, e *apiError) {
	type entry struct {
		Code    string `json:"code"`
		Message string `json:"message"`
		Detail  any    `json:"detail,omitempty"`
	}
	body, err := json.Marshal(struct {
		Errors []entry `json:"errors"`
	}{[]entry{{e.code, e.message, e.detail}}})
	if err != nil {
		body = []byte(`{"errors":[{"code":"UNKNOWN"}]}`)
	}
	body = append(body, '\n')
	h := w.Header()
	for _, name := range []string{"Etag", "Docker-Content-Digest", "Content-Range", "Accept-Ranges"} {
		h.Del(name)
	}
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("X-Content-Type-Options", "nosniff")
	if e.status == http.StatusServiceUnavailable {
		h.Set("Retry-After", "5")
	}
	w.WriteHeader(e.status)
	if r.Method != http.MethodHead {
		w.Write(body)
	}
}

// ifAbsent turns the store's "not there" into the answer for it.
func ifAbsent(err error, answer *apiError) error {
	if errors.Is(err, fs.ErrNotExist) {
		return answer
	}
	return err
}
