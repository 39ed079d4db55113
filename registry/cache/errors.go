package cache

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
)

// refusal is an answer without content: a status that makes containerd ask its
// next host (see the package documentation), and why.
type refusal struct {
	status     int
	cause      string // short, for metrics and Cache-Status
	message    string // for people; never a credential
	upstream   bool   // the status is the upstream's own
	challenges []string
	from       *upstream // who challenges
	referral   string    // the peer to ask instead
}

func refuse(status int, cause, message string) *refusal {
	return &refusal{status: status, cause: cause, message: message}
}

func (e *refusal) Error() string {
	return fmt.Sprintf("%s (%d)", e.message, e.status)
}

// unavailable reports that no upstream gave a usable answer, which says nothing
// about whether the content exists or who may read it.
type unavailable struct {
	cause string // short, for metrics
	err   error
}

func (e *unavailable) Error() string { return e.err.Error() }
func (e *unavailable) Unwrap() error { return e.err }

// toRefusal turns any error into what the client is told.
func toRefusal(err error) *refusal {
	var no *refusal
	if errors.As(err, &no) {
		return no
	}
	var down *unavailable
	if errors.As(err, &down) {
		return refuse(http.StatusBadGateway, down.cause, "the upstream is unavailable: "+down.Error())
	}
	return refuse(http.StatusBadGateway, "internal", err.Error())
}

// ociCode is the error code of the distribution spec, "Error Codes".
func (e *refusal) ociCode() string {
	switch e.status {
	case http.StatusUnauthorized:
		return "UNAUTHORIZED"
	case http.StatusForbidden:
		return "DENIED"
	case http.StatusNotFound:
		return "NOT_FOUND"
	case http.StatusMethodNotAllowed:
		return "UNSUPPORTED"
	case http.StatusRequestedRangeNotSatisfiable:
		return "RANGE_INVALID"
	default:
		return "UNAVAILABLE"
	}
}

// write answers with e. Nothing may have been written to w before.
func (e *refusal) write(w http.ResponseWriter) {
	type item struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	body, err := json.Marshal(map[string][]item{"errors": {{e.ociCode(), e.message}}})
	if err != nil {
		body = []byte(`{"errors":[]}`)
	}
	h := w.Header()
	for _, c := range e.challenges {
		h.Add("WWW-Authenticate", c)
	}
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(e.status)
	_, _ = w.Write(body) // a client that has gone needs no answer
}
