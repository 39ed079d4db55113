package bucket

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"
	smithymiddleware "github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// maxCopy is what Amazon copies in one step, and what an object store copies in
// one step while the connection waits for it.
const (
	maxCopy  = 5 << 30
	copyPart = 512 << 20
)

// s3Store speaks the protocol of Amazon S3. What is uploaded is signed with its
// SHA-256, which the object store verifies.
type s3Store struct {
	// clients has a new one for other credentials: a client keeps what it
	// derived from a secret for as long as the name of the key stays.
	clients   *reloading[*s3.Client]
	bucket    string
	copyLimit int64
}

func newS3(ctx context.Context, c Config, t transport) (Bucket, error) {
	o := s3.Options{
		UsePathStyle:                 c.S3.PathStyle,
		HTTPClient:                   &http.Client{Transport: t, CheckRedirect: stay},
		Retryer:                      aws.NopRetryer{},
		RequestChecksumCalculation:   aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation:   aws.ResponseChecksumValidationWhenRequired,
		ContinueHeaderThresholdBytes: -1,
		DisableS3ExpressSessionAuth:  aws.Bool(true),
	}
	endpoint := "Amazon S3"
	if c.S3.Endpoint != "" {
		o.BaseEndpoint, endpoint = aws.String(strings.TrimSuffix(c.S3.Endpoint, "/")), c.S3.Endpoint
	}
	clients, err := s3Clients(ctx, c, t, o)
	if err != nil {
		return nil, err
	}
	s := &s3Store{clients: clients, bucket: c.S3.Bucket, copyLimit: c.S3.CopyLimit}
	if s.copyLimit == 0 {
		s.copyLimit = maxCopy
	}
	prefix := folder(c.S3.Prefix)
	return &client{store: s, name: strings.TrimSuffix("s3://"+c.S3.Bucket+"/"+prefix, "/"), prefix: prefix, remedies: remedies{
		field:    "s3.bucket",
		endpoint: endpoint,
		rights:   "s3:GetObject, PutObject, DeleteObject, ListBucket, AbortMultipartUpload, ListBucketMultipartUploads",
		keys:     "accessKeyID and secretAccessKey",
		ambient:  "an identity: AWS_ACCESS_KEY_ID, a web identity (IRSA), a pod identity, or an instance profile",
		region:   "set s3.region to the bucket's",
	}}, nil
}

// stay leaves redirections to whoever reads the answer: one says where the
// bucket is.
func stay(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// client is whom to ask now. Once there was one, there is always one.
func (s *s3Store) client() *s3.Client {
	api, _ := s.clients.get() // newS3 has seen that there is one
	return api
}

func (s *s3Store) open(ctx context.Context, key string, offset, length int64, version string) (io.ReadCloser, Attributes, error) {
	if length == 0 {
		at, err := s.stat(ctx, key)
		return http.NoBody, at, err
	}
	in := &s3.GetObjectInput{Bucket: &s.bucket, Key: &key, IfMatch: optional(version)}
	if r := byteRange(offset, length); r != "" {
		in.Range = &r
	}
	out, err := s.client().GetObject(ctx, in)
	if err != nil {
		if s.classify(err).kind == outside {
			at, err := s.head(ctx, key)
			return http.NoBody, at, err
		}
		return nil, Attributes{}, err
	}
	size := aws.ToInt64(out.ContentLength)
	if in.Range != nil {
		if size, err = wholeSize(aws.ToString(out.ContentRange)); err != nil {
			out.Body.Close()
			return nil, Attributes{}, err
		}
	}
	return out.Body, Attributes{
		Key: key, Size: size, Modified: aws.ToTime(out.LastModified), Version: aws.ToString(out.ETag), Metadata: lower(out.Metadata),
	}, nil
}

// byteRange is a header of RFC 9110, section 14.2; empty for the whole.
func byteRange(offset, length int64) string {
	switch {
	case length >= 0:
		return fmt.Sprintf("bytes=%d-%d", offset, offset+length-1)
	case offset > 0:
		return fmt.Sprintf("bytes=%d-", offset)
	}
	return ""
}

// wholeSize is the length of what a range was taken from.
func wholeSize(contentRange string) (int64, error) {
	var first, last, size int64
	if _, err := fmt.Sscanf(contentRange, "bytes %d-%d/%d", &first, &last, &size); err != nil {
		return 0, fmt.Errorf("the object store answers a range with Content-Range %q: use one that serves ranges", contentRange)
	}
	return size, nil
}

// stat asks for a byte: unlike the answer to HEAD, an error has a body, which
// tells a missing object from a missing bucket.
func (s *s3Store) stat(ctx context.Context, key string) (Attributes, error) {
	body, at, err := s.open(ctx, key, 0, 1, "")
	if err != nil {
		return Attributes{}, err
	}
	_, err = io.Copy(io.Discard, body)
	body.Close()
	return at, err
}

func (s *s3Store) head(ctx context.Context, key string) (Attributes, error) {
	out, err := s.client().HeadObject(ctx, &s3.HeadObjectInput{Bucket: &s.bucket, Key: &key})
	if err != nil {
		return Attributes{}, err
	}
	return Attributes{
		Key: key, Size: aws.ToInt64(out.ContentLength), Modified: aws.ToTime(out.LastModified), Version: aws.ToString(out.ETag), Metadata: lower(out.Metadata),
	}, nil
}

func (s *s3Store) put(ctx context.Context, key string, content []byte, metadata map[string]string, when Conditions) (Attributes, error) {
	in := &s3.PutObjectInput{
		Bucket: &s.bucket, Key: &key, Body: bytes.NewReader(content), ContentLength: aws.Int64(int64(len(content))),
		ContentType: aws.String("application/octet-stream"), Metadata: metadata, IfMatch: optional(when.Version),
	}
	if when.Absent {
		in.IfNoneMatch = aws.String("*")
	}
	out, err := s.client().PutObject(ctx, in)
	if err != nil {
		if when.Version != "" && s.classify(err).kind == missing {
			return Attributes{}, ErrCondition
		}
		return Attributes{}, err
	}
	return Attributes{Key: key, Size: int64(len(content)), Modified: date(out.ResultMetadata), Version: aws.ToString(out.ETag)}, nil
}

// date is when an answer was given, by the object store's clock.
func date(metadata smithymiddleware.Metadata) time.Time {
	if r, ok := middleware.GetRawResponse(metadata).(*smithyhttp.Response); ok {
		if at, err := http.ParseTime(r.Header.Get("Date")); err == nil {
			return at
		}
	}
	return time.Now().Truncate(time.Second)
}

func (s *s3Store) delete(ctx context.Context, key string) error {
	_, err := s.client().DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &s.bucket, Key: &key})
	return err
}

func (s *s3Store) list(ctx context.Context, prefix, after, delimiter, token string) ([]Attributes, string, error) {
	out, err := s.client().ListObjectsV2(ctx, &s3.ListObjectsV2Input{
		Bucket: &s.bucket, Prefix: &prefix, StartAfter: optional(after), Delimiter: optional(delimiter), ContinuationToken: optional(token),
	})
	if err != nil {
		return nil, "", err
	}
	objects := make([]Attributes, len(out.Contents))
	for i, o := range out.Contents {
		objects[i] = Attributes{Key: aws.ToString(o.Key), Size: aws.ToInt64(o.Size), Modified: aws.ToTime(o.LastModified), Version: aws.ToString(o.ETag)}
	}
	folders := make([]string, len(out.CommonPrefixes))
	for i, p := range out.CommonPrefixes {
		folders[i] = aws.ToString(p.Prefix)
	}
	next := aws.ToString(out.NextContinuationToken)
	if !aws.ToBool(out.IsTruncated) {
		next = ""
	}
	return merge(objects, folders), next, nil
}

// merge puts a page's objects and folders, each in order, into one order.
func merge(objects []Attributes, folders []string) []Attributes {
	if len(folders) == 0 {
		return objects
	}
	all := make([]Attributes, 0, len(objects)+len(folders))
	for len(objects) > 0 || len(folders) > 0 {
		if len(folders) == 0 || len(objects) > 0 && objects[0].Key < folders[0] {
			all, objects = append(all, objects[0]), objects[1:]
		} else {
			all, folders = append(all, Attributes{Key: folders[0]}), folders[1:]
		}
	}
	return all
}

// classify goes by the words of Amazon, which the others use too.
func (s *s3Store) classify(err error) fault {
	if errors.Is(err, ErrCondition) {
		return fault{kind: condition}
	}
	if errors.Is(err, errNoIdentity) {
		return fault{kind: noIdentity, code: err.Error()}
	}
	var (
		api      smithy.APIError
		response *smithyhttp.ResponseError
		status   int
		header   http.Header
	)
	if errors.As(err, &response) && response.Response != nil {
		status, header = response.HTTPStatusCode(), response.Response.Header
	}
	if !errors.As(err, &api) && status == 0 {
		return network(err)
	}
	f := byStatus(status, header)
	if api != nil {
		f.code = api.ErrorCode()
	}
	switch f.code {
	case "NoSuchKey", "NoSuchUpload", "NotFound":
		f.kind = missing
	case "NoSuchBucket":
		f.kind = noBucket
	case "PreconditionFailed":
		f.kind = condition
	case "InvalidRange":
		f.kind = outside
	case "ConditionalRequestConflict", "OperationAborted":
		f.kind, f.again = busy, true
	case "SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded", "ServiceUnavailable", "XMinioServerNotInitialized":
		f.kind, f.again = busy, true
	case "RequestTimeout", "InternalError", "IncompleteBody":
		f.again = true
	case "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired":
		f.kind = unknown
	case "RequestTimeTooSkewed":
		f.kind, f.again = skew, true // the next request goes by the clock of this answer
	case "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "IncorrectEndpoint":
		f.kind = region
		if where := header.Get("X-Amz-Bucket-Region"); where != "" {
			f.code += ", in " + where
		}
	case "BadDigest", "XAmzContentSHA256Mismatch", "InvalidDigest":
		f.again = true // damaged on the way
	}
	if f.kind == other && api != nil && api.ErrorMessage() != "" {
		f.code += ": " + api.ErrorMessage()
	}
	return f
}

func optional(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

// lower is metadata with names in lower case.
func lower(metadata map[string]string) map[string]string {
	m := make(map[string]string, len(metadata))
	for name, value := range metadata {
		m[strings.ToLower(name)] = value
	}
	return m
}
