package bucket

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"hash/crc32"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// gcsStore speaks the JSON API of Google Cloud Storage, and its XML API to read,
// since that alone tells the metadata with the contents. Google's own library
// would bring gRPC, xDS and more into every process. What is uploaded carries
// its CRC-32C, which Google verifies.
type gcsStore struct {
	http     *http.Client
	token    *gcsToken
	endpoint string // without a slash at its end
	bucket   string
	scratch
}

const (
	gcsEndpoint = "https://storage.googleapis.com"
	// gcsFields is what is wanted to be told of an object.
	gcsFields = "name,size,updated,generation,metadata"
)

func newGCS(c Config, t transport) (Bucket, error) {
	g := &gcsStore{http: &http.Client{Transport: t, CheckRedirect: stay}, bucket: c.GCS.Bucket, scratch: scratch{folder(c.GCS.Prefix)}}
	g.endpoint = strings.TrimSuffix(c.GCS.Endpoint, "/")
	if g.endpoint == "" {
		g.endpoint = gcsEndpoint
	}
	var err error
	if g.token, err = newGCSToken(c, t); err != nil {
		return nil, err
	}
	return &client{
		store: g, prefix: g.prefix, scratch: scratchFolder,
		name: strings.TrimSuffix("gs://"+g.bucket+"/"+g.prefix, "/"),
		remedies: remedies{
			field:    "gcs.bucket",
			endpoint: g.endpoint,
			rights:   "the role Storage Object User (roles/storage.objectUser)",
			keys:     "credentials.json",
			ambient:  "an identity: GOOGLE_APPLICATION_CREDENTIALS, workload identity, or the service account of the machine",
			region:   "correct gcs.endpoint",
		},
	}, nil
}

// gcsObject is an object as the JSON API describes it.
type gcsObject struct {
	Name       string            `json:"name,omitempty"`
	Size       string            `json:"size,omitempty"`
	Updated    time.Time         `json:"updated,omitzero"`
	Generation string            `json:"generation,omitempty"`
	Metadata   map[string]string `json:"metadata,omitempty"`
	Type       string            `json:"contentType,omitempty"`
	CRC32C     string            `json:"crc32c,omitempty"`
}

func (o gcsObject) attributes() Attributes {
	size, _ := strconv.ParseInt(o.Size, 10, 64) // 0 of what Google never says
	return Attributes{Key: o.Name, Size: size, Modified: o.Updated, Version: o.Generation}
}

// describe is an object to be.
func describe(name string, metadata map[string]string) gcsObject {
	return gcsObject{Name: name, Metadata: metadata, Type: "application/octet-stream"}
}

// url is where an object is in the JSON API.
func (g *gcsStore) url(key string) string {
	return g.endpoint + "/storage/v1/b/" + g.bucket + "/o/" + url.PathEscape(key)
}

func (g *gcsStore) open(ctx context.Context, key string, offset, length int64, version string) (io.ReadCloser, Attributes, error) {
	if length == 0 {
		at, err := g.stat(ctx, key)
		return http.NoBody, at, err
	}
	path := strings.ReplaceAll(url.PathEscape(key), "%2F", "/")
	query := url.Values{}
	if version != "" {
		query.Set("generation", version)
	}
	header := http.Header{}
	if r := byteRange(offset, length); r != "" {
		header.Set("Range", r)
	}
	r, err := g.do(ctx, http.MethodGet, g.endpoint+"/"+g.bucket+"/"+path, query, header, nil, 0)
	if err != nil {
		switch {
		case g.classify(err).kind == outside:
			at, err := g.stat(ctx, key)
			return http.NoBody, at, err
		case version != "" && g.classify(err).kind == missing:
			err = ErrCondition
		}
		return nil, Attributes{}, err
	}
	at := Attributes{Key: key, Size: r.ContentLength, Version: r.Header.Get("X-Goog-Generation"), Metadata: map[string]string{}}
	if r.StatusCode == http.StatusPartialContent {
		if at.Size, err = wholeSize(r.Header.Get("Content-Range")); err != nil {
			r.Body.Close()
			return nil, Attributes{}, err
		}
	}
	at.Modified, _ = http.ParseTime(r.Header.Get("Last-Modified")) // Google says it always
	for name, values := range r.Header {
		if name, ok := strings.CutPrefix(strings.ToLower(name), "x-goog-meta-"); ok {
			at.Metadata[name] = values[0]
		}
	}
	return r.Body, at, nil
}

func (g *gcsStore) stat(ctx context.Context, key string) (Attributes, error) {
	var o gcsObject
	if err := g.ask(ctx, http.MethodGet, g.url(key), url.Values{"fields": {gcsFields}}, nil, &o); err != nil {
		return Attributes{}, err
	}
	at := o.attributes()
	at.Metadata = lower(o.Metadata)
	return at, nil
}

func (g *gcsStore) put(ctx context.Context, key string, content []byte, metadata map[string]string, when Conditions) (Attributes, error) {
	query := url.Values{}
	if when.Absent {
		query.Set("ifGenerationMatch", "0")
	}
	if when.Version != "" {
		if _, err := strconv.ParseInt(when.Version, 10, 64); err != nil {
			return Attributes{}, ErrCondition // never a version of Google's
		}
		query.Set("ifGenerationMatch", when.Version)
	}
	return g.upload(ctx, key, bytes.NewReader(content), int64(len(content)), metadata, query)
}

// upload sends an object in one request: what it is to be, then its contents.
func (g *gcsStore) upload(ctx context.Context, key string, content io.ReadSeeker, size int64, metadata map[string]string, query url.Values) (Attributes, error) {
	sum := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	if _, err := io.Copy(sum, content); err != nil {
		return Attributes{}, err
	}
	if _, err := content.Seek(0, io.SeekStart); err != nil {
		return Attributes{}, err
	}
	o := describe(key, metadata)
	o.CRC32C = base64.StdEncoding.EncodeToString(sum.Sum(nil))
	description, err := json.Marshal(o)
	if err != nil {
		return Attributes{}, err
	}
	boundary := rand.Text() // which no contents can know
	head := "--" + boundary + "\r\nContent-Type: application/json; charset=utf-8\r\n\r\n" + string(description) +
		"\r\n--" + boundary + "\r\nContent-Type: " + o.Type + "\r\n\r\n"
	tail := "\r\n--" + boundary + "--\r\n"
	query.Set("uploadType", "multipart")
	query.Set("fields", gcsFields)
	r, err := g.do(ctx, http.MethodPost, g.endpoint+"/upload/storage/v1/b/"+g.bucket+"/o", query,
		http.Header{"Content-Type": {"multipart/related; boundary=" + boundary}},
		io.MultiReader(strings.NewReader(head), content, strings.NewReader(tail)), int64(len(head)+len(tail))+size)
	if err != nil {
		return Attributes{}, err
	}
	var stored gcsObject
	err = decode(r, &stored)
	return stored.attributes(), err
}

func (g *gcsStore) delete(ctx context.Context, key string) error {
	return g.ask(ctx, http.MethodDelete, g.url(key), nil, nil, nil)
}

// gcsPage is a page of a listing.
type gcsPage struct {
	Items         []gcsObject `json:"items"`
	Prefixes      []string    `json:"prefixes"`
	NextPageToken string      `json:"nextPageToken"`
}

func (g *gcsStore) page(ctx context.Context, prefix, after, delimiter, token string) (gcsPage, error) {
	query := url.Values{"fields": {"items(name,size,updated,generation),prefixes,nextPageToken"}}
	for name, value := range map[string]string{"prefix": prefix, "startOffset": after, "delimiter": delimiter, "pageToken": token} {
		if value != "" {
			query.Set(name, value)
		}
	}
	var page gcsPage
	err := g.ask(ctx, http.MethodGet, g.endpoint+"/storage/v1/b/"+g.bucket+"/o", query, nil, &page)
	return page, err
}

func (g *gcsStore) list(ctx context.Context, prefix, after, delimiter, token string) ([]Attributes, string, error) {
	page, err := g.page(ctx, prefix, after, delimiter, token)
	if err != nil {
		return nil, "", err
	}
	found := make([]Attributes, len(page.Items))
	for i, o := range page.Items {
		found[i] = o.attributes()
	}
	return merge(found, page.Prefixes), page.NextPageToken, nil
}

// ask sends in, and reads the answer into out; either may be nil.
func (g *gcsStore) ask(ctx context.Context, method, address string, query url.Values, in, out any) error {
	var body []byte
	header := http.Header{}
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return err
		}
		header.Set("Content-Type", "application/json; charset=utf-8")
	}
	r, err := g.do(ctx, method, address, query, header, bytes.NewReader(body), int64(len(body)))
	if err != nil {
		return err
	}
	return decode(r, out)
}

// decode reads all of an answer, so that its connection can be used again.
func decode(r *http.Response, out any) error {
	defer r.Body.Close()
	data, err := io.ReadAll(r.Body)
	if err != nil || out == nil {
		return err
	}
	if err := json.Unmarshal(data, out); err != nil {
		return errors.New("the answer is not what Google Cloud Storage says: " + err.Error())
	}
	return nil
}

// do sends a request. An answer that is none of success is an error.
func (g *gcsStore) do(ctx context.Context, method, address string, query url.Values, header http.Header, body io.Reader, size int64) (*http.Response, error) {
	if len(query) > 0 {
		address += "?" + query.Encode()
	}
	if size == 0 {
		body = nil
	}
	r, err := http.NewRequestWithContext(ctx, method, address, body)
	if err != nil {
		return nil, err
	}
	r.Header, r.ContentLength = header, size
	if err := g.token.sign(r); err != nil {
		return nil, err
	}
	answer, err := g.http.Do(r)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode/100 == 2 {
		return answer, nil
	}
	defer answer.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(answer.Body, 16<<10)) // the status says the most
	return nil, newGCSError(answer, text)
}
