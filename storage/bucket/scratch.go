package bucket

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"strconv"
	"strings"
	"time"
)

// scratchFolder holds, on stores that have no uploads of their own, what is
// uploaded: below a name that says since when, and where to.
const scratchFolder = ".uploads/"

// newUpload names an upload to key.
func newUpload(key string) string {
	return strconv.FormatInt(time.Now().Unix(), 36) + "-" + strings.ToLower(rand.Text()) + "-" + base64.RawURLEncoding.EncodeToString([]byte(key))
}

// parseUpload is the reverse.
func parseUpload(upload string) (key string, begun time.Time, ok bool) {
	since, rest, _ := strings.Cut(upload, "-")
	_, encoded, _ := strings.Cut(rest, "-")
	seconds, err := strconv.ParseInt(since, 36, 64)
	if err != nil {
		return "", time.Time{}, false
	}
	name, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil || len(name) == 0 {
		return "", time.Time{}, false
	}
	return string(name), time.Unix(seconds, 0), true
}

// scratch keeps uploads below the prefix of a bucket.
type scratch struct{ prefix string }

// place is where an upload is kept. A name that is none leads nowhere else.
func (s scratch) place(upload string) string {
	return s.prefix + scratchFolder + strings.ReplaceAll(upload, "/", "_")
}

// find is the reverse of place: the upload that an object, or a folder, belongs
// to, when it goes to a key with the prefix. Keys are whole.
func (s scratch) find(name, prefix string) (Unfinished, bool) {
	upload, _, _ := strings.Cut(strings.TrimPrefix(name, s.prefix+scratchFolder), "/")
	key, begun, ok := parseUpload(upload)
	key = s.prefix + key
	return Unfinished{Key: key, Upload: upload, Begun: begun}, ok && strings.HasPrefix(key, prefix)
}

// begin only names the upload.
func (s scratch) begin(_ context.Context, key string, _ map[string]string) (string, error) { //nolint:unparam // as other stores begin
	return newUpload(strings.TrimPrefix(key, s.prefix)), nil
}
