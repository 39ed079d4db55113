package bucket

import (
	"net/http"
	"strconv"
	"time"
)

// byStatus classifies an answer of which no more is known than its status. The
// code is the status in words.
func byStatus(status int, header http.Header) fault {
	f := fault{code: strconv.Itoa(status) + " " + http.StatusText(status)}
	if seconds, err := strconv.Atoi(header.Get("Retry-After")); err == nil {
		f.after = min(time.Duration(max(seconds, 0))*time.Second, longestPause)
	}
	switch {
	case status == http.StatusNotFound:
		f.kind = missing
	case status == http.StatusPreconditionFailed:
		f.kind = condition
	case status == http.StatusRequestedRangeNotSatisfiable:
		f.kind = outside
	case status == http.StatusUnauthorized:
		f.kind = unknown
	case status == http.StatusForbidden:
		f.kind = denied
	case status == http.StatusMovedPermanently, status == http.StatusTemporaryRedirect:
		f.kind = region
	case status == http.StatusRequestTimeout:
		f.kind, f.again = silent, true
	case status == http.StatusTooManyRequests, status == http.StatusServiceUnavailable:
		f.kind, f.again = busy, true
	case status == http.StatusNotImplemented:
		f.kind = unsupported
	case status >= 500:
		f.kind, f.again = broken, true
	}
	return f
}
