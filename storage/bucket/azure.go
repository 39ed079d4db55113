package bucket

import (
	"bytes"
	"context"
	"crypto/md5" //nolint:gosec // what Azure verifies uploads by
	"errors"
	"io"
	"net/http"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/streaming"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blockblob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
)

// azureStore speaks to Azure Blob Storage. A blob that is still being copied is
// not there yet. What is uploaded carries its MD5, which Azure verifies.
type azureStore struct {
	login *reloading[azureLogin]
	scratch
}

func newAzure(c Config, t transport) (Bucket, error) {
	login := newAzureLogin(c, t)
	l, err := login.get()
	if err != nil {
		return nil, err
	}
	prefix := folder(c.Azure.Prefix)
	endpoint, _, _ := strings.Cut(l.container.URL(), "?")
	endpoint = strings.TrimSuffix(endpoint, "/"+c.Azure.Container)
	return &client{
		store: &azureStore{login, scratch{prefix}}, prefix: prefix, scratch: scratchFolder,
		name: strings.TrimSuffix("azure://"+c.Azure.Container+"/"+prefix, "/"),
		remedies: remedies{
			field:    "azure.container",
			endpoint: endpoint,
			rights:   "the role Storage Blob Data Contributor",
			keys:     "accountKey, sasToken or connectionString",
			ambient:  "an identity: AZURE_CLIENT_ID and AZURE_CLIENT_SECRET, a workload identity, or a managed identity",
			region:   "set azure.account and azure.endpoint to where the container is",
		},
	}, nil
}

func (a *azureStore) blob(key string) (*blockblob.Client, error) {
	l, err := a.login.get()
	if err != nil {
		return nil, err
	}
	return l.container.NewBlockBlobClient(key), nil
}

func (a *azureStore) open(ctx context.Context, key string, offset, length int64, version string) (io.ReadCloser, Attributes, error) {
	if length == 0 {
		at, err := a.stat(ctx, key)
		return http.NoBody, at, err
	}
	b, err := a.blob(key)
	if err != nil {
		return nil, Attributes{}, err
	}
	o := &blob.DownloadStreamOptions{Range: blob.HTTPRange{Offset: offset, Count: max(0, length)}, AccessConditions: ifMatch(version)}
	out, err := b.DownloadStream(ctx, o)
	if err != nil {
		if a.classify(err).kind == outside {
			at, err := a.stat(ctx, key)
			return http.NoBody, at, err
		}
		return nil, Attributes{}, err
	}
	size := value(out.ContentLength)
	if out.ContentRange != nil {
		size, err = wholeSize(*out.ContentRange)
	}
	if err == nil && !copied(out.CopyStatus) {
		err = errNoObject
	}
	if err != nil {
		out.Body.Close()
		return nil, Attributes{}, err
	}
	return out.Body, Attributes{Key: key, Size: size, Modified: value(out.LastModified), Version: string(value(out.ETag)), Metadata: fromAzure(out.Metadata)}, nil
}

// ifMatch is the condition that a blob is in a version, if that is not empty.
func ifMatch(version string) *blob.AccessConditions {
	if version == "" {
		return nil
	}
	return &blob.AccessConditions{ModifiedAccessConditions: &blob.ModifiedAccessConditions{IfMatch: to.Ptr(azcore.ETag(version))}}
}

// copied says whether a blob is whole: copies come into being empty.
func copied(status *blob.CopyStatusType) bool {
	return status == nil || *status == "" || *status == blob.CopyStatusTypeSuccess
}

func (a *azureStore) stat(ctx context.Context, key string) (Attributes, error) {
	b, err := a.blob(key)
	if err != nil {
		return Attributes{}, err
	}
	out, err := b.GetProperties(ctx, nil)
	if err != nil {
		return Attributes{}, err
	}
	if !copied(out.CopyStatus) {
		return Attributes{}, errNoObject
	}
	return Attributes{
		Key: key, Size: value(out.ContentLength), Modified: value(out.LastModified), Version: string(value(out.ETag)), Metadata: fromAzure(out.Metadata),
	}, nil
}

func (a *azureStore) put(ctx context.Context, key string, content []byte, metadata map[string]string, when Conditions) (Attributes, error) {
	b, err := a.blob(key)
	if err != nil {
		return Attributes{}, err
	}
	sum := md5.Sum(content) //nolint:gosec // against damage, not malice
	o := &blockblob.UploadOptions{
		Metadata: toAzure(metadata), TransactionalValidation: blob.TransferValidationTypeMD5(sum[:]),
		AccessConditions: &blob.AccessConditions{ModifiedAccessConditions: &blob.ModifiedAccessConditions{}},
	}
	if when.Absent {
		o.AccessConditions.ModifiedAccessConditions.IfNoneMatch = to.Ptr(azcore.ETagAny)
	}
	if when.Version != "" {
		o.AccessConditions.ModifiedAccessConditions.IfMatch = to.Ptr(azcore.ETag(when.Version))
	}
	out, err := b.Upload(ctx, streaming.NopCloser(bytes.NewReader(content)), o)
	if err != nil {
		if when.Version != "" && a.classify(err).kind == missing {
			return Attributes{}, ErrCondition
		}
		return Attributes{}, err
	}
	return Attributes{Key: key, Size: int64(len(content)), Modified: value(out.LastModified), Version: string(value(out.ETag))}, nil
}

func (a *azureStore) delete(ctx context.Context, key string) error {
	b, err := a.blob(key)
	if err != nil {
		return err
	}
	_, err = b.Delete(ctx, &blob.DeleteOptions{DeleteSnapshots: to.Ptr(blob.DeleteSnapshotsOptionTypeInclude)})
	return err
}

// list begins with the prefix, whatever comes after: Azure knows no other start.
func (a *azureStore) list(ctx context.Context, prefix, _, delimiter, token string) ([]Attributes, string, error) {
	l, err := a.login.get()
	if err != nil {
		return nil, "", err
	}
	if delimiter == "" {
		page, err := l.container.NewListBlobsFlatPager(&container.ListBlobsFlatOptions{
			Prefix: &prefix, Marker: optional(token), Include: container.ListBlobsInclude{Copy: true},
		}).NextPage(ctx)
		if err != nil {
			return nil, "", err
		}
		return fromItems(page.Segment.BlobItems), value(page.NextMarker), nil
	}
	page, err := l.container.NewListBlobsHierarchyPager(delimiter, &container.ListBlobsHierarchyOptions{
		Prefix: &prefix, Marker: optional(token), Include: container.ListBlobsInclude{Copy: true},
	}).NextPage(ctx)
	if err != nil {
		return nil, "", err
	}
	folders := make([]string, len(page.Segment.BlobPrefixes))
	for i, p := range page.Segment.BlobPrefixes {
		folders[i] = value(p.Name)
	}
	return merge(fromItems(page.Segment.BlobItems), folders), value(page.NextMarker), nil
}

func fromItems(items []*container.BlobItem) []Attributes {
	found := make([]Attributes, 0, len(items))
	for _, item := range items {
		if p := item.Properties; p != nil && copied(p.CopyStatus) {
			// In a listing the version has no quotes.
			version := `"` + strings.Trim(string(value(p.ETag)), `"`) + `"`
			found = append(found, Attributes{Key: value(item.Name), Size: value(p.ContentLength), Modified: value(p.LastModified), Version: version})
		}
	}
	return found
}

// classify goes by Azure's own words, of its table of error codes.
func (a *azureStore) classify(err error) fault {
	switch {
	case errors.Is(err, ErrCondition):
		return fault{kind: condition}
	case errors.Is(err, errNoObject):
		return fault{kind: missing}
	case errors.Is(err, errCopy):
		return fault{code: err.Error()}
	case errors.Is(err, errNoIdentity):
		return fault{kind: noIdentity, code: err.Error()}
	}
	var response *azcore.ResponseError
	if !errors.As(err, &response) {
		return network(err)
	}
	header := http.Header{}
	if response.RawResponse != nil {
		header = response.RawResponse.Header
	}
	f := byStatus(response.StatusCode, header)
	if response.ErrorCode != "" {
		f.code = response.ErrorCode
	}
	switch response.ErrorCode {
	case "BlobNotFound", "InvalidBlockList":
		f.kind = missing
	case "ContainerNotFound", "ContainerDisabled", "ResourceNotFound":
		f.kind = noBucket
	case "BlobAlreadyExists":
		f.kind = condition
	case "LeaseIdMissing", "LeaseIdMismatchWithBlobOperation":
		f.kind, f.code = denied, f.code+", the blob is leased"
	case "PendingCopyOperation", "ContainerBeingDeleted", "ServerBusy":
		f.kind, f.again = busy, true
	case "OperationTimedOut", "Md5Mismatch":
		f.again = true
	case "AuthenticationFailed", "NoAuthenticationInformation", "InvalidAuthenticationInfo", "AccountIsDisabled":
		f.kind = unknown
		if strings.Contains(response.Error(), "Request date header too old") {
			f.kind = skew
		}
	}
	return f
}

// errNoObject is of an object that is not whole yet.
var errNoObject = errors.New("no such object")

func value[T any](p *T) T {
	if p == nil {
		var none T
		return none
	}
	return *p
}

func toAzure(metadata map[string]string) map[string]*string {
	m := make(map[string]*string, len(metadata))
	for name, v := range metadata {
		m[name] = &v
	}
	return m
}

func fromAzure(metadata map[string]*string) map[string]string {
	m := make(map[string]string, len(metadata))
	for name, v := range metadata {
		m[strings.ToLower(name)] = value(v)
	}
	return m
}
