package bucket

import (
	"context"
	"crypto/md5" //nolint:gosec // what Azure verifies uploads by
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/streaming"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blockblob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
)

// errCopy is of a copy that Azure gave up.
var errCopy = errors.New("the copy was not carried out")

// part stages a block. A blob has one set of blocks not yet committed, and whoever
// commits some throws the others away, so each upload has a blob of its own, which
// complete copies to where it belongs.
func (a *azureStore) part(ctx context.Context, _, upload string, number int, content io.ReadSeeker, size int64) (Part, error) {
	part := Part{Number: number, Size: size}
	b, err := a.blob(a.place(upload))
	if err != nil || size == 0 {
		return part, err // Azure knows no empty block
	}
	sum := md5.New() //nolint:gosec // against damage, not malice
	if _, err := io.Copy(sum, content); err != nil {
		return Part{}, err
	}
	if _, err := content.Seek(0, io.SeekStart); err != nil {
		return Part{}, err
	}
	// The block is named anew each time, so that nobody else's takes its place.
	part.Tag = base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "%06d-%s", number, rand.Text()))
	_, err = b.StageBlock(at(ctx, steady), part.Tag, streaming.NopCloser(content), &blockblob.StageBlockOptions{
		TransactionalValidation: blob.TransferValidationTypeMD5(sum.Sum(nil)),
	})
	return part, err
}

func (a *azureStore) complete(ctx context.Context, key, upload string, parts []Part, metadata map[string]string) error {
	place := a.place(upload)
	ids := make([]string, 0, len(parts))
	for _, p := range parts {
		if p.Size > 0 {
			ids = append(ids, p.Tag)
		}
	}
	err := a.try(ctx, func() error {
		b, err := a.blob(place)
		if err != nil {
			return err
		}
		_, err = b.CommitBlockList(at(ctx, lengthy), ids, &blockblob.CommitBlockListOptions{Metadata: toAzure(metadata)})
		return err
	})
	if err != nil {
		return err
	}
	if err := a.copyTo(ctx, place, "", key, metadata); err != nil {
		return err
	}
	return a.try(ctx, func() error {
		if err := a.delete(ctx, place); err != nil && a.classify(err).kind != missing {
			return err
		}
		return nil
	})
}

// abort commits nothing and deletes that: it is how blocks are thrown away.
func (a *azureStore) abort(ctx context.Context, _, upload string) error {
	b, err := a.blob(a.place(upload))
	if err != nil {
		return err
	}
	if _, err := b.CommitBlockList(ctx, []string{}, nil); err != nil {
		return err
	}
	return a.delete(ctx, a.place(upload))
}

func (a *azureStore) uploads(ctx context.Context, prefix, token string) ([]Unfinished, string, error) {
	l, err := a.login.get()
	if err != nil {
		return nil, "", err
	}
	place := a.place("")
	page, err := l.container.NewListBlobsFlatPager(&container.ListBlobsFlatOptions{
		Prefix: &place, Marker: optional(token), Include: container.ListBlobsInclude{UncommittedBlobs: true},
	}).NextPage(ctx)
	if err != nil {
		return nil, "", err
	}
	var found []Unfinished
	for _, item := range page.Segment.BlobItems {
		if u, ok := a.find(value(item.Name), prefix); ok {
			found = append(found, u)
		}
	}
	return found, value(page.NextMarker), nil
}

// copy changes the metadata alone where that is all there is to do.
func (a *azureStore) copy(ctx context.Context, from, version, to string, metadata map[string]string) error {
	if from != to {
		return a.copyTo(ctx, from, version, to, metadata)
	}
	return a.try(ctx, func() error {
		b, err := a.blob(from)
		if err != nil {
			return err
		}
		_, err = b.SetMetadata(ctx, toAzure(metadata), &blob.SetMetadataOptions{AccessConditions: ifMatch(version)})
		return err
	})
}

// copyTo copies within the account, and waits for it.
func (a *azureStore) copyTo(ctx context.Context, from, version, to string, metadata map[string]string) error {
	var status blob.CopyStatusType
	err := a.try(ctx, func() (err error) {
		status, err = a.startCopy(ctx, from, version, to, metadata)
		return err
	})
	progress, moved := "", time.Now()
	for pause := 50 * time.Millisecond; err == nil && status == blob.CopyStatusTypePending; pause = min(2*pause, 2*time.Second) {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err() // the copy ends by itself; until then the blob is not there
		}
		now := ""
		err = a.try(ctx, func() (err error) {
			status, now, err = a.copyStatus(ctx, to)
			return err
		})
		if now != progress {
			progress, moved = now, time.Now()
		}
		if time.Since(moved) > time.Duration(lengthy) {
			return fmt.Errorf("%w: nothing moved for %v (%s bytes): try again", errCopy, time.Duration(lengthy), progress)
		}
	}
	if err == nil && status != blob.CopyStatusTypeSuccess {
		return fmt.Errorf("%w: it ended as %s: try again", errCopy, status)
	}
	return err
}

func (a *azureStore) startCopy(ctx context.Context, from, version, to string, metadata map[string]string) (blob.CopyStatusType, error) {
	l, err := a.login.get()
	if err != nil {
		return "", err
	}
	// The source's metadata are taken when there are none.
	m := toAzure(metadata)
	if len(m) == 0 {
		m = toAzure(map[string]string{writer: "copy"})
	}
	source := l.container.NewBlobClient(from).URL() // with the signature, where there is one
	o := &blob.StartCopyFromURLOptions{Metadata: m}
	if version != "" {
		tag := azcore.ETag(version)
		o.SourceModifiedAccessConditions = &blob.SourceModifiedAccessConditions{SourceIfMatch: &tag}
	}
	out, err := l.container.NewBlobClient(to).StartCopyFromURL(at(ctx, lengthy), source, o)
	if err != nil {
		return "", err
	}
	return value(out.CopyStatus), nil
}

func (a *azureStore) copyStatus(ctx context.Context, key string) (status blob.CopyStatusType, progress string, err error) {
	b, err := a.blob(key)
	if err != nil {
		return "", "", err
	}
	out, err := b.GetProperties(ctx, nil)
	if err != nil {
		return "", "", err
	}
	return value(out.CopyStatus), value(out.CopyProgress), nil
}

func (a *azureStore) try(ctx context.Context, act func() error) error {
	return try(ctx, a.classify, act)
}
