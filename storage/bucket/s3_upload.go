package bucket

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"golang.org/x/sync/errgroup"
)

func (s *s3Store) begin(ctx context.Context, key string, metadata map[string]string) (string, error) {
	out, err := s.client().CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{
		Bucket: &s.bucket, Key: &key, ContentType: aws.String("application/octet-stream"), Metadata: metadata,
	})
	if err != nil {
		return "", err
	}
	return aws.ToString(out.UploadId), nil
}

func (s *s3Store) part(ctx context.Context, key, upload string, number int, content io.ReadSeeker, size int64) (Part, error) {
	out, err := s.client().UploadPart(at(ctx, steady), &s3.UploadPartInput{
		Bucket: &s.bucket, Key: &key, UploadId: &upload, PartNumber: aws.Int32(int32(number)), Body: content, ContentLength: &size,
	})
	if err != nil {
		return Part{}, err
	}
	return Part{Number: number, Size: size, Tag: aws.ToString(out.ETag)}, nil
}

func (s *s3Store) complete(ctx context.Context, key, upload string, parts []Part, _ map[string]string) error {
	var size int64
	done := make([]types.CompletedPart, len(parts))
	for i, p := range parts {
		size += p.Size
		done[i] = types.CompletedPart{PartNumber: aws.Int32(int32(p.Number)), ETag: aws.String(p.Tag)}
	}
	again := false
	return s.try(ctx, func() error {
		_, err := s.client().CompleteMultipartUpload(at(ctx, lengthy), &s3.CompleteMultipartUploadInput{
			Bucket: &s.bucket, Key: &key, UploadId: &upload, MultipartUpload: &types.CompletedMultipartUpload{Parts: done},
		})
		if err != nil && again && s.classify(err).kind == missing && s.isComplete(ctx, key, size, len(parts)) {
			return nil
		}
		again = true
		return err
	})
}

// isComplete says whether an upload that is gone was completed: an object put
// together of n parts says so in its version.
func (s *s3Store) isComplete(ctx context.Context, key string, size int64, n int) bool {
	at, err := s.stat(ctx, key)
	return err == nil && at.Size == size && strings.HasSuffix(strings.Trim(at.Version, `"`), fmt.Sprintf("-%d", n))
}

func (s *s3Store) abort(ctx context.Context, key, upload string) error {
	_, err := s.client().AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: &s.bucket, Key: &key, UploadId: &upload})
	return err
}

// uploads keeps both markers of the protocol in one token.
func (s *s3Store) uploads(ctx context.Context, prefix, token string) ([]Unfinished, string, error) {
	key, id, _ := strings.Cut(token, "\n")
	out, err := s.client().ListMultipartUploads(ctx, &s3.ListMultipartUploadsInput{
		Bucket: &s.bucket, Prefix: &prefix, KeyMarker: optional(key), UploadIdMarker: optional(id),
	})
	if err != nil {
		return nil, "", err
	}
	page := make([]Unfinished, len(out.Uploads))
	for i, u := range out.Uploads {
		page[i] = Unfinished{Key: aws.ToString(u.Key), Upload: aws.ToString(u.UploadId), Begun: aws.ToTime(u.Initiated)}
	}
	if !aws.ToBool(out.IsTruncated) {
		return page, "", nil
	}
	return page, aws.ToString(out.NextKeyMarker) + "\n" + aws.ToString(out.NextUploadIdMarker), nil
}

func (s *s3Store) copy(ctx context.Context, from, version, to string, metadata map[string]string) error {
	var object Attributes
	err := s.try(ctx, func() (err error) {
		object, err = s.stat(ctx, from)
		return err
	})
	if err != nil {
		return err
	}
	if version != "" && object.Version != version {
		return ErrCondition
	}
	if object.Size > s.copyLimit {
		return s.copyParts(ctx, object, to, metadata)
	}
	return s.try(ctx, func() error {
		_, err := s.client().CopyObject(at(ctx, lengthy), &s3.CopyObjectInput{
			Bucket: &s.bucket, Key: &to, CopySource: s.source(from), CopySourceIfMatch: optional(version),
			MetadataDirective: types.MetadataDirectiveReplace, Metadata: metadata, ContentType: aws.String("application/octet-stream"),
		})
		return err
	})
}

// source names an object for a header, where some take a plus for a space.
func (s *s3Store) source(key string) *string {
	escaped := strings.NewReplacer("%2F", "/", "+", "%2B").Replace(url.PathEscape(key))
	return aws.String(s.bucket + "/" + escaped)
}

// copyParts copies what is too large for one step, of one version.
func (s *s3Store) copyParts(ctx context.Context, from Attributes, to string, metadata map[string]string) (err error) {
	var upload string
	err = s.try(ctx, func() (err error) {
		upload, err = s.begin(ctx, to, metadata)
		return err
	})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			s.abort(context.WithoutCancel(ctx), to, upload) //nolint:errcheck // a sweep of the uploads finds it
		}
	}()
	size := min(copyPart, s.copyLimit)
	size = max(size, (from.Size+9_999)/10_000)
	parts := make([]Part, (from.Size+size-1)/size)
	group, inner := errgroup.WithContext(ctx)
	group.SetLimit(4)
	for i := range parts {
		group.Go(func() error {
			return s.try(inner, func() (err error) {
				parts[i], err = s.copyPart(inner, from, to, upload, i+1, int64(i)*size, size)
				return err
			})
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return s.complete(ctx, to, upload, parts, metadata)
}

func (s *s3Store) copyPart(ctx context.Context, from Attributes, to, upload string, number int, offset, size int64) (Part, error) {
	size = min(size, from.Size-offset)
	out, err := s.client().UploadPartCopy(at(ctx, lengthy), &s3.UploadPartCopyInput{
		Bucket: &s.bucket, Key: &to, UploadId: &upload, PartNumber: aws.Int32(int32(number)),
		CopySource: s.source(from.Key), CopySourceIfMatch: &from.Version, CopySourceRange: aws.String(byteRange(offset, size)),
	})
	if err != nil {
		return Part{}, err
	}
	return Part{Number: number, Size: size, Tag: aws.ToString(out.CopyPartResult.ETag)}, nil
}

func (s *s3Store) try(ctx context.Context, act func() error) error { return try(ctx, s.classify, act) }
