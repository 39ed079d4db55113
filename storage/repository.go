package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/opencontainers/go-digest"
)

// ErrName is wrapped by the error for a repository name or tag outside the
// grammar of the OCI distribution specification, section "Pulling manifests".
var ErrName = errors.New("invalid name")

const (
	repositoriesRoot = "/docker/registry/v2/repositories/"
	maxNameLength    = 255 // what every client accepts, host name aside
	maxTagLength     = 128
)

// Repository is one repository of a Store. It holds no state; the repository
// need not exist.
type Repository struct {
	store *Store
	name  string
	path  string // of the repository, as a driver path
}

// Repository returns the repository of that name, or an error that wraps
// ErrName. A valid name is also a safe path: no component is empty, begins with
// a dot, or begins with the underscore that marks the store's own directories.
func (s *Store) Repository(name string) (Repository, error) {
	if !ValidName(name) {
		return Repository{}, fmt.Errorf("repository %q: %w", name, ErrName)
	}
	return Repository{store: s, name: name, path: repositoriesRoot + name}, nil
}

// Name is the repository's name, without the registry's host.
func (r Repository) Name() string { return r.name }

// Tag returns the digest of the manifest that tag names. The error is
// fs.ErrNotExist when there is no such tag, ErrName when there cannot be one.
func (r Repository) Tag(ctx context.Context, tag string) (digest.Digest, error) {
	if !ValidTag(tag) {
		return "", fmt.Errorf("tag %q: %w", tag, ErrName)
	}
	return r.store.medium.readLink(ctx, r.tagLink(tag))
}

// Tags returns up to n tags in byte order, beginning after last; n < 0 means
// all. more reports whether others follow. The error is fs.ErrNotExist when the
// repository has never held a tag.
func (r Repository) Tags(ctx context.Context, last string, n int) (tags []string, more bool, err error) {
	entries, err := r.store.medium.list(ctx, r.path+"/_manifests/tags")
	if err != nil {
		return nil, false, err
	}
	first, found := slices.BinarySearchFunc(entries, last, func(e entry, last string) int {
		return strings.Compare(e.name, last)
	})
	if found {
		first++
	}
	tags = []string{}
	for _, e := range entries[first:] {
		if !e.folder || !ValidTag(e.name) {
			continue
		}
		if n >= 0 && len(tags) == n {
			return tags, true, nil
		}
		tags = append(tags, e.name)
	}
	return tags, false, nil
}

// OpenManifest opens the manifest d when it belongs to this repository. The
// error is fs.ErrNotExist when it does not, and otherwise as OpenBlob's.
func (r Repository) OpenManifest(ctx context.Context, d digest.Digest) (Content, error) {
	return r.open(ctx, r.path+"/_manifests/revisions/", d)
}

// OpenLayer opens the blob d when it belongs to this repository. The error is
// fs.ErrNotExist when it does not, and otherwise as OpenBlob's.
func (r Repository) OpenLayer(ctx context.Context, d digest.Digest) (Content, error) {
	return r.open(ctx, r.path+"/_layers/", d)
}

// open follows the link that grants the repository the content. The link may
// name the content by another algorithm than the one asked for: distribution
// files an upload under its sha256 whatever digest the client gave.
func (r Repository) open(ctx context.Context, links string, d digest.Digest) (Content, error) {
	if !validDigest(d) {
		return Content{}, fmt.Errorf("digest %q: %w", d, digest.ErrDigestInvalidFormat)
	}
	target, err := r.store.followToRead(ctx, linkPath(links, d), d)
	if err != nil {
		return Content{}, err
	}
	return r.store.OpenBlob(ctx, target)
}

// PutManifest stores a manifest under d, which must be the digest of content in
// any algorithm, makes it part of the repository and a referrer of its subject,
// if it has one, and then points the tags at it. It is durable when PutManifest returns. What the manifest refers to is
// the caller's concern. The error wraps ErrCorrupt when content is not that of
// d, ErrName for an impossible tag; nothing has been stored then.
func (r Repository) PutManifest(ctx context.Context, d digest.Digest, content []byte, tags ...string) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", d, err)
	}
	for _, tag := range tags {
		if !ValidTag(tag) {
			return fmt.Errorf("tag %q: %w", tag, ErrName)
		}
	}
	if d.Algorithm().FromBytes(content) != d {
		return fmt.Errorf("storing manifest: %w: expected %s", ErrCorrupt, d)
	}
	revision := linkPath(r.path+"/_manifests/revisions/", d)
	for attempt := 1; ; attempt++ {
		err := r.putRevision(ctx, revision, d, content)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) || attempt == 10 {
			return err // and else the blob was collected before it was linked to
		}
	}
	if len(tags) == 0 {
		return nil
	}
	for _, tag := range tags {
		// The index remembers every manifest that the tag has named.
		if err := r.link(ctx, linkPath(r.path+"/_manifests/tags/"+tag+"/index/", d), d); err != nil {
			return err
		}
		if err := r.link(ctx, r.tagLink(tag), d); err != nil {
			return err
		}
	}
	// Should the manifest have been deleted in between: a deletion removes this
	// link first and looks for tags after, so that one of the two puts it right.
	return r.link(ctx, revision, d)
}

// CreateTag points a tag that does not exist yet at d, which must be a manifest of
// the repository. Of several who try at the same time one succeeds. The error is
// fs.ErrExist when the tag names another manifest, which it goes on to do.
func (r Repository) CreateTag(ctx context.Context, tag string, d digest.Digest) error {
	if !ValidTag(tag) {
		return fmt.Errorf("tag %q: %w", tag, ErrName)
	}
	if err := r.link(ctx, linkPath(r.path+"/_manifests/tags/"+tag+"/index/", d), d); err != nil {
		return err
	}
	file := r.tagLink(tag)
	for range 10 {
		err := r.store.medium.createFile(ctx, file, []byte(d))
		if errors.Is(err, fs.ErrNotExist) {
			continue // somebody took the directory away
		}
		if !errors.Is(err, fs.ErrExist) {
			return err
		}
		now, err := r.Tag(ctx, tag)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			// Deleted in between, or damaged: then it is as good as absent.
			if err := ignoreAbsent(r.store.medium.remove(ctx, file)); err != nil {
				return err
			}
		case err != nil:
			return err
		case now != d:
			return fmt.Errorf("tag %s of %s names %s: %w", tag, r.name, now, fs.ErrExist)
		default:
			return nil
		}
	}
	return fmt.Errorf("tag %s of %s: it comes and goes", tag, r.name)
}

// putRevision stores a manifest and makes it part of the repository.
func (r Repository) putRevision(ctx context.Context, revision string, d digest.Digest, content []byte) error {
	drv := r.store.driver
	if _, err := drv.Stat(ctx, blobPath(d)); err != nil {
		if err := drv.PutContent(ctx, blobPath(d), content); err != nil {
			return err
		}
	}
	// Even if it is linked already: content from before referrers were indexed
	// becomes one by being pushed again.
	if err := r.indexReferrer(ctx, d, content); err != nil {
		return err
	}
	if there, err := r.linked(ctx, revision, d); there {
		return err
	}
	return drv.putLink(ctx, revision, d) // PutContent would read the manifest, to index it again
}

// UseManifest tells the collector that the manifest d, which need not be there,
// is about to be relied on. The error says that this cannot be told.
func (r Repository) UseManifest(ctx context.Context, d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", d, err)
	}
	_, err := r.store.follow(ctx, linkPath(r.path+"/_manifests/revisions/", d), d)
	return ignoreAbsent(err)
}

// UseLayer tells the collector that the blob d is about to be relied on, and
// returns its size in bytes. The error is fs.ErrNotExist when it is not part of
// the repository, and otherwise as OpenBlob's.
func (r Repository) UseLayer(ctx context.Context, d digest.Digest) (size int64, err error) {
	if !validDigest(d) {
		return 0, fmt.Errorf("digest %q: %w", d, digest.ErrDigestInvalidFormat)
	}
	target, err := r.store.follow(ctx, linkPath(r.path+"/_layers/", d), d)
	if err != nil {
		return 0, err
	}
	c, err := r.store.OpenBlob(ctx, target)
	if err != nil {
		return 0, err
	}
	return c.Size, c.Close()
}

// LinkLayer makes the blob d, which must be stored, part of the repository. The
// error is fs.ErrNotExist when it is not stored.
func (r Repository) LinkLayer(ctx context.Context, d digest.Digest) error {
	f, err := r.store.OpenBlob(ctx, d)
	if err != nil {
		return err
	}
	f.Close()
	return r.link(ctx, linkPath(r.path+"/_layers/", d), d)
}

// MountLayer makes the blob d of another repository part of this one. The error
// is fs.ErrNotExist when it is not part of that one.
func (r Repository) MountLayer(ctx context.Context, from Repository, d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", d, err)
	}
	target, err := r.store.follow(ctx, linkPath(from.path+"/_layers/", d), d)
	if err != nil {
		return err
	}
	if err := r.LinkLayer(ctx, target); err != nil {
		return err
	}
	return r.link(ctx, linkPath(r.path+"/_layers/", d), target)
}

// HasLayer reports whether the blob d is part of the repository. It does not
// look at the blob.
func (r Repository) HasLayer(ctx context.Context, d digest.Digest) bool {
	if d.Validate() != nil {
		return false
	}
	_, err := r.store.medium.readLink(ctx, linkPath(r.path+"/_layers/", d))
	return err == nil
}

// DeleteTag removes a tag. The manifest stays. The error is fs.ErrNotExist when
// there is no such tag.
func (r Repository) DeleteTag(ctx context.Context, tag string) error {
	if _, err := r.Tag(ctx, tag); err != nil {
		return err
	}
	return r.delete(ctx, r.path+"/_manifests/tags/"+tag)
}

// DeleteManifest takes the manifest d, and every tag that names it, out of the
// repository. Its bytes stay until garbage collection. The error is
// fs.ErrNotExist when it is not part of the repository.
func (r Repository) DeleteManifest(ctx context.Context, d digest.Digest) error {
	gone := r.unlink(ctx, r.path+"/_manifests/revisions/", d)
	if ignoreAbsent(gone) != nil {
		return gone
	}
	// Also when it is gone already: a deletion may have ended half way.
	tags, err := r.tagsOf(ctx, d)
	if err != nil {
		return err
	}
	if len(tags) == 0 {
		return gone
	}
	for _, tag := range tags {
		if err := r.DeleteTag(ctx, tag); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// DeleteLayer takes the blob d out of the repository. Its bytes stay until
// garbage collection. The error is fs.ErrNotExist when it is not part of the
// repository.
func (r Repository) DeleteLayer(ctx context.Context, d digest.Digest) error {
	return r.unlink(ctx, r.path+"/_layers/", d)
}

// DeleteRepository removes the repository with everything in it, but not those
// whose names begin with its name. Bytes that no other repository holds stay until
// garbage collection. The error is fs.ErrNotExist when there is no such
// repository.
func (r Repository) DeleteRepository(ctx context.Context) error {
	used, _, err := r.store.Used(ctx, r.name)
	if err != nil {
		return err
	}
	found := false
	// Layers first: a push that goes on meanwhile looks for them when it has
	// linked its manifest, and is not acknowledged without.
	for _, dir := range []string{"/_layers", "/_manifests", "/_referrers", "/_uploads"} {
		err := r.store.medium.remove(ctx, r.path+dir)
		if ignoreAbsent(err) != nil {
			return err
		}
		found = found || err == nil
	}
	if !found {
		return &fs.PathError{Op: "delete", Path: r.path, Err: fs.ErrNotExist}
	}
	r.store.usage.add(ctx, r.name, -used)
	return r.store.medium.prune(ctx, r.path, false)
}

// DeleteUpload throws away what an unfinished upload has stored. id must not
// come from outside unchecked; deleting what is not there is no error.
func (r Repository) DeleteUpload(ctx context.Context, id string) error {
	return r.store.medium.removeUpload(ctx, r.path+"/_uploads/"+path.Base(id))
}

// ReadUpload reads what an upload has stored, from offset on. id must not come from
// outside unchecked.
func (r Repository) ReadUpload(ctx context.Context, id string, offset int64) (io.ReadCloser, error) {
	return r.store.driver.Reader(ctx, r.path+"/_uploads/"+path.Base(id)+"/data", offset)
}

// tagsOf returns the tags that name d.
func (r Repository) tagsOf(ctx context.Context, d digest.Digest) ([]string, error) {
	all, _, err := r.Tags(ctx, "", -1)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var tags []string
	for _, tag := range all {
		target, err := r.Tag(ctx, tag)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if target == d {
			tags = append(tags, tag)
		}
	}
	return tags, nil
}

func (r Repository) tagLink(tag string) string {
	return r.path + "/_manifests/tags/" + tag + "/current/link"
}

// link writes a link file unless it is there already.
func (r Repository) link(ctx context.Context, path string, target digest.Digest) error {
	if there, err := r.linked(ctx, path, target); there {
		return err
	}
	return r.store.driver.PutContent(ctx, path, []byte(target))
}

// linked reports whether a link file is there already, and makes sure, if the
// repository holds something by it, that this is there, too, and stays.
func (r Repository) linked(ctx context.Context, path string, target digest.Digest) (there bool, err error) {
	d, holds := isLink(path)
	if !holds {
		now, err := r.store.medium.readLink(ctx, path)
		return err == nil && now == target, nil
	}
	if now, err := r.store.follow(ctx, path, d); err != nil || now != target {
		return false, nil //nolint:nilerr // it is made anew
	}
	_, err = r.store.require(ctx, target)
	return true, err
}

func (r Repository) unlink(ctx context.Context, links string, d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", d, err)
	}
	link := linkPath(links, d)
	if _, err := r.store.follow(ctx, link, d); err != nil {
		return err
	}
	return r.delete(ctx, path.Dir(link))
}

// delete is the driver's, with an error that is fs.ErrNotExist for what is not
// there.
func (r Repository) delete(ctx context.Context, driverPath string) error {
	err := r.store.driver.Delete(ctx, driverPath)
	var absent storagedriver.PathNotFoundError
	if errors.As(err, &absent) {
		return &fs.PathError{Op: "delete", Path: driverPath, Err: fs.ErrNotExist}
	}
	return err
}
