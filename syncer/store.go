package syncer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"syscall"

	"github.com/distribution/distribution/v3"
	dstorage "github.com/distribution/distribution/v3/registry/storage"
	"github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/connected-registry/connected-registry/storage"
)

// store is this registry's content as a synchronisation reads and writes it.
// Its errors are about the storage, not about the parent.
type store struct {
	namespace distribution.Namespace
	content   *storage.Store
}

func (s *store) repository(ctx context.Context, name string) (distribution.Repository, error) {
	named, err := reference.WithName(name)
	if err != nil {
		return nil, fmt.Errorf("repository %s: %w", name, err)
	}
	return s.namespace.Repository(ctx, named)
}

// errSize reports a descriptor whose size is not that of the content it names.
// A runtime that believes it would refuse the content.
type errSize struct {
	digest         digest.Digest
	says, actually int64
}

func (e errSize) Error() string {
	return fmt.Sprintf("a manifest says that %s has %d bytes, and it has %d", e.digest, e.says, e.actually)
}

// storing says that content could not be stored.
func storing(repository string, d digest.Digest, err error) error {
	return writing(fmt.Sprintf("storing %s@%s", repository, d), err)
}

// writing says that the storage could not take something. Of a full disk it
// names the data directory and the remedy, rather than the file that was being
// written, which nobody outside knows.
func writing(what string, err error) error {
	detail := err
	if e, ok := errors.AsType[driver.Error](err); ok {
		detail = e.Detail // it hides what is inside from errors.Is
	}
	for _, full := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		if errors.Is(detail, full) {
			return fmt.Errorf("%s%s: %w: free space on the volume of the data directory, or choose another with --data", what, inDirectory(detail), full)
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}

// inDirectory is " in DIRECTORY", the one that holds the registry's tree, or ""
// if the error does not name a file of that.
func inDirectory(err error) string {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		for _, inside := range []string{"/docker/registry/v2/", "/partial/"} {
			if root, _, ok := strings.Cut(e.Path, inside); ok {
				return " in " + root
			}
		}
	}
	return ""
}

// hasBlob reports whether a repository has a blob, whole.
func (s *store) hasBlob(ctx context.Context, repository string, desc v1.Descriptor) (bool, error) {
	repo, err := s.content.Repository(repository)
	if err != nil {
		return false, err
	}
	size, err := repo.UseLayer(ctx, desc.Digest)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("looking for %s: %w", desc.Digest, err)
	}
	if size != desc.Size {
		return false, errSize{desc.Digest, desc.Size, size}
	}
	return true, nil
}

func present(stat v1.Descriptor, err error, desc v1.Descriptor) (bool, error) {
	switch {
	case errors.Is(err, distribution.ErrBlobUnknown):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("looking for %s: %w", desc.Digest, err)
	case stat.Size != desc.Size:
		return false, errSize{desc.Digest, desc.Size, stat.Size}
	}
	return true, nil
}

// hasAnywhere reports whether a blob is here for any repository.
func (s *store) hasAnywhere(ctx context.Context, desc v1.Descriptor) (bool, error) {
	stat, err := s.namespace.BlobStatter().Stat(ctx, desc.Digest)
	return present(stat, err, desc)
}

// link gives a repository a blob that is here for another, and reports whether
// there is one.
func (s *store) link(ctx context.Context, repository string, desc v1.Descriptor) (bool, error) {
	if ok, err := s.hasAnywhere(ctx, desc); !ok {
		return false, err
	}
	repo, err := s.repository(ctx, repository)
	if err != nil {
		return false, err
	}
	w, err := repo.Blobs(ctx).Create(ctx, linkOption{repo.Named(), desc})
	if _, ok := errors.AsType[distribution.ErrBlobMounted](err); ok {
		return true, nil
	}
	if err == nil {
		err = errors.Join(errors.New("the link was not made"), w.Cancel(ctx))
	}
	return false, writing(fmt.Sprintf("linking %s into %s", desc.Digest, repository), err)
}

// linkOption mounts a blob into a repository without asking any other whether it
// has it: that the blob exists has just been seen, and the manifest that wants
// it is the parent's word that the repository may have it.
type linkOption struct {
	name reference.Named
	blob v1.Descriptor
}

func (o linkOption) Apply(v any) error {
	opts, ok := v.(*distribution.CreateOptions)
	if !ok {
		return fmt.Errorf("unexpected options %T", v)
	}
	from, err := reference.WithDigest(o.name, o.blob.Digest)
	if err != nil {
		return err
	}
	opts.Mount.ShouldMount = true
	opts.Mount.From = from
	opts.Mount.Stat = &o.blob
	return nil
}

// maxStored bounds a manifest that is read from the storage. Larger ones are not
// stored.
const maxStored = 4 << 20

// manifest reads a manifest that a repository has. ok is false when it has not.
func (s *store) manifest(ctx context.Context, repository string, d digest.Digest) (m manifest, ok bool, err error) {
	repo, err := s.content.Repository(repository)
	if err != nil {
		return manifest{}, false, err
	}
	f, err := repo.OpenManifest(ctx, d)
	if errors.Is(err, fs.ErrNotExist) {
		return manifest{}, false, nil
	}
	if err != nil {
		return manifest{}, false, fmt.Errorf("reading %s@%s: %w", repository, d, err)
	}
	defer f.Close()
	if f.Size > maxStored {
		return manifest{}, false, nil
	}
	body := make([]byte, f.Size)
	if _, err := io.ReadFull(f, body); err != nil {
		return manifest{}, false, fmt.Errorf("reading %s@%s: %w", repository, d, err)
	}
	// What does not parse was stored by someone who is less strict: the parent is
	// asked again, and what is wrong with its answer is what a person gets to see.
	m, err = parseManifest("", body)
	return m, err == nil, nil
}

// putManifest stores a manifest. The caller has seen to it that everything it
// needs is in the repository, which storage is therefore not asked to check: it
// would insist on children that were not selected.
func (s *store) putManifest(ctx context.Context, repository string, m manifest) error {
	d := digest.FromBytes(m.body)
	parsed, _, err := distribution.UnmarshalManifest(m.mediaType, m.body)
	if err != nil {
		return storing(repository, d, err)
	}
	repo, err := s.repository(ctx, repository)
	if err != nil {
		return err
	}
	manifests, err := repo.Manifests(ctx, dstorage.SkipLayerVerification())
	if err != nil {
		return storing(repository, d, err)
	}
	stored, err := manifests.Put(ctx, parsed)
	if err == nil && stored != d {
		err = fmt.Errorf("it was stored as %s", stored)
	}
	if err != nil {
		return storing(repository, d, err)
	}
	return nil
}

// tag is what a tag stands for here, "" when there is no such tag.
func (s *store) tag(ctx context.Context, repository, tag string) (digest.Digest, error) {
	repo, err := s.content.Repository(repository)
	if err != nil {
		return "", err
	}
	d, err := repo.Tag(ctx, tag)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("reading tag %s:%s: %w", repository, tag, err)
	}
	return d, nil
}

func (s *store) setTag(ctx context.Context, repository, tag string, d digest.Digest) error {
	repo, err := s.repository(ctx, repository)
	if err != nil {
		return err
	}
	if err := repo.Tags(ctx).Tag(ctx, tag, v1.Descriptor{Digest: d}); err != nil {
		return writing(fmt.Sprintf("writing tag %s:%s", repository, tag), err)
	}
	return nil
}

// tags are the tags of a repository, sorted.
func (s *store) tags(ctx context.Context, repository string) ([]string, error) {
	repo, err := s.repository(ctx, repository)
	if err != nil {
		return nil, err
	}
	tags, err := repo.Tags(ctx).All(ctx)
	if _, unknown := errors.AsType[distribution.ErrRepositoryUnknown](err); unknown {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing the tags of %s: %w", repository, err)
	}
	return tags, nil
}

// untag removes a tag. What it stood for stays.
func (s *store) untag(ctx context.Context, repository, tag string) error {
	repo, err := s.repository(ctx, repository)
	if err != nil {
		return err
	}
	if err := repo.Tags(ctx).Untag(ctx, tag); err != nil && !isPathNotFound(err) {
		return writing(fmt.Sprintf("removing tag %s:%s", repository, tag), err)
	}
	return nil
}

// repositories are the names of all repositories that are here.
func (s *store) repositories(ctx context.Context) ([]string, error) {
	enumerator, ok := s.namespace.(distribution.RepositoryEnumerator)
	if !ok {
		return nil, errors.New("the storage does not list its repositories")
	}
	var names []string
	err := enumerator.Enumerate(ctx, func(name string) error {
		names = append(names, name)
		return nil
	})
	if err != nil && !isPathNotFound(err) {
		return nil, fmt.Errorf("listing the repositories that are here: %w", err)
	}
	return names, nil
}

func isPathNotFound(err error) bool {
	_, ok := errors.AsType[driver.PathNotFoundError](err)
	return ok
}
