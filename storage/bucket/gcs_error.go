package bucket

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"net/http"
	"strings"
)

// gcsError is an answer of Google Cloud Storage, in JSON or XML.
type gcsError struct {
	status          int
	header          http.Header
	reason, message string
}

func (e *gcsError) Error() string { return e.reason + ": " + e.message }

func newGCSError(r *http.Response, text []byte) error {
	e := &gcsError{status: r.StatusCode, header: r.Header}
	var j struct {
		Error struct {
			Message string `json:"message"`
			Errors  []struct {
				Reason string `json:"reason"`
			} `json:"errors"`
		} `json:"error"`
	}
	var x struct {
		Code    string `xml:"Code"`
		Message string `xml:"Message"`
		Details string `xml:"Details"`
	}
	switch {
	case json.Unmarshal(text, &j) == nil:
		e.message = j.Error.Message
		if len(j.Error.Errors) > 0 {
			e.reason = j.Error.Errors[0].Reason
		}
	case xml.Unmarshal(text, &x) == nil:
		e.reason, e.message = x.Code, x.Message
		if x.Details != "" {
			e.message += " " + x.Details
		}
	}
	return e
}

// classify goes by Google's words, of its tables of statuses and error codes.
func (g *gcsStore) classify(err error) fault {
	switch {
	case errors.Is(err, ErrCondition):
		return fault{kind: condition}
	case errors.Is(err, errNoIdentity):
		f := network(err)
		return fault{kind: noIdentity, code: err.Error(), again: f.again}
	}
	var e *gcsError
	if !errors.As(err, &e) {
		return network(err)
	}
	f := byStatus(e.status, e.header)
	if e.reason != "" {
		f.code = e.reason
	}
	switch {
	case e.status == http.StatusNotFound && (e.reason == "NoSuchBucket" || strings.Contains(e.message, "bucket does not exist")):
		f.kind = noBucket
	case e.reason == "rateLimitExceeded", e.reason == "userRateLimitExceeded":
		f.kind, f.again = busy, true
	case e.reason == "accountDisabled", e.reason == "UserProjectAccountProblem", e.reason == "userProjectMissing":
		f.kind, f.code = denied, e.reason+": "+e.message
	case f.kind == other && e.message != "":
		f.code += ": " + e.message
	}
	if e.status == http.StatusBadRequest && strings.Contains(strings.ToLower(e.message), "crc32c") {
		f.again = true // damaged on the way
	}
	return f
}
