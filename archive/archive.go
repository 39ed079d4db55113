package archive

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// Archive is an image layout that is open for reading, in a tar archive or a
// directory. Nothing in it is trusted: whoever reads content checks its digest.
type Archive struct {
	blobs        func(digest.Digest) (blob, error)
	close        func() error
	repositories map[string]*repository
}

// blob is content that is open for reading.
type blob struct {
	*io.SectionReader
	io.Closer
}

type repository struct {
	tags      map[string]v1.Descriptor
	referrers map[digest.Digest][]v1.Descriptor // by subject
}

// Open reads the list of what is in the archive called name. The error says what
// the file is if it is none.
func Open(name string) (*Archive, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, fmt.Errorf("opening the archive: %w: give the file that export wrote, or an image layout's directory", err)
	}
	a := &Archive{close: func() error { return nil }}
	var index []byte
	if info.IsDir() {
		index, err = a.openDirectory(name)
	} else {
		index, err = a.openTar(name)
	}
	if err == nil {
		err = a.readIndex(index)
	}
	if err != nil {
		_ = a.close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return a, nil
}

// Close closes the file. Reads that are under way fail.
func (a *Archive) Close() error { return a.close() }

// Repositories selects everything that the archive has a name for, as the
// repositories of a ConnectedRegistry do. Of an index of which some platforms
// were left behind, the others are selected.
func (a *Archive) Repositories() []v1alpha1.Repository {
	var all []v1alpha1.Repository
	for _, name := range slices.Sorted(maps.Keys(a.repositories)) {
		repo := a.repositories[name]
		whole := v1alpha1.Repository{Name: name}
		for _, tag := range slices.Sorted(maps.Keys(repo.tags)) {
			platforms, some := a.platforms(repo.tags[tag].Digest)
			if !some {
				whole.Tags.Include = append(whole.Tags.Include, tag)
			} else if len(platforms) > 0 {
				all = append(all, v1alpha1.Repository{Name: name, Tags: v1alpha1.Tags{Include: []string{tag}}, Platforms: platforms})
			}
		}
		if len(whole.Tags.Include) > 0 {
			all = append(all, whole)
		}
	}
	return all
}

// platforms are those that an index lists and the archive holds, if it does not
// hold all of them.
func (a *Archive) platforms(index digest.Digest) (held []string, some bool) {
	_, m, err := a.manifest(index)
	if err != nil {
		return nil, false // whoever reads it will say so
	}
	for _, child := range m.Manifests {
		b, err := a.blobs(child.Digest)
		if errors.Is(err, fs.ErrNotExist) {
			some = true
			continue
		}
		if err == nil {
			b.Close()
		}
		// An attestation's platform is "unknown/unknown"; it goes with the image
		// that it attests.
		if p := child.Platform; p != nil && p.OS != "unknown" {
			held = append(held, strings.TrimSuffix(p.OS+"/"+p.Architecture+"/"+p.Variant, "/"))
		}
	}
	slices.Sort(held)
	return slices.Compact(held), some
}

func (a *Archive) openDirectory(name string) ([]byte, error) {
	root, err := os.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	a.close = root.Close
	a.blobs = func(d digest.Digest) (blob, error) {
		f, err := root.Open(filepath.FromSlash(blobName(d)))
		if err != nil {
			return blob{}, err
		}
		info, err := f.Stat()
		if err != nil || !info.Mode().IsRegular() {
			f.Close()
			return blob{}, fs.ErrNotExist
		}
		return blob{io.NewSectionReader(f, 0, info.Size()), f}, nil
	}
	f, err := root.Open(v1.ImageIndexFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("is not an image layout: it has no index.json: give what export wrote")
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readBounded(f)
}

// span is where a file lies in the archive.
type span struct{ offset, size int64 }

func (a *Archive) openTar(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	a.close = f.Close
	spans := make(map[digest.Digest]span)
	a.blobs = func(d digest.Digest) (blob, error) {
		s, ok := spans[d]
		if !ok {
			return blob{}, fs.ErrNotExist
		}
		return blob{io.NewSectionReader(f, s.offset, s.size), io.NopCloser(nil)}, nil
	}
	var index []byte
	r := tar.NewReader(f)
	for {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, notAnArchive(f, err)
		}
		if header.Typeflag != tar.TypeReg {
			continue
		}
		// The reader has read the header and nothing of the content.
		offset, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		if d, ok := blobDigest(header.Name); ok {
			spans[d] = span{offset, header.Size}
		} else if path.Clean(header.Name) == v1.ImageIndexFile {
			if index, err = readBounded(r); err != nil {
				return nil, err
			}
		}
	}
	if index == nil {
		return nil, errors.New("is not an image layout: it has no index.json: give what export wrote, after it has ended")
	}
	return index, nil
}

func notAnArchive(f *os.File, err error) error {
	head := make([]byte, 4)
	if _, e := f.ReadAt(head, 0); e == nil && (bytes.HasPrefix(head, []byte{0x1f, 0x8b}) || bytes.Equal(head, []byte{0x28, 0xb5, 0x2f, 0xfd})) {
		return errors.New("is compressed: unpack it first, for example with gunzip or unzstd")
	}
	return fmt.Errorf("is not a whole tar archive: %w: copy it once more, or give what export wrote", err)
}

func readBounded(r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxIndex+1))
	if err == nil && len(data) > maxIndex {
		err = fmt.Errorf("index.json has more than %d bytes", maxIndex)
	}
	return data, err
}

func (a *Archive) readIndex(data []byte) error {
	var index v1.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return errors.New("index.json is not an image index: give what export wrote")
	}
	a.repositories = make(map[string]*repository)
	unnamed := 0
	for _, d := range index.Manifests {
		if err := d.Digest.Validate(); err != nil {
			return fmt.Errorf("index.json names a digest that is none: %w", err)
		}
		if name, tag, ok := splitName(d.Annotations[NameAnnotation]); ok {
			a.repository(name).tags[tag] = d
			continue
		}
		name, subject := d.Annotations[RepositoryAnnotation], digest.Digest(d.Annotations[SubjectAnnotation])
		if !v1alpha1.ValidRepositoryName(name) || subject.Validate() != nil {
			unnamed++
			continue
		}
		repo := a.repository(name)
		repo.referrers[subject] = append(repo.referrers[subject], d)
	}
	if len(a.repositories) == 0 {
		return fmt.Errorf("names none of its %d images by %s: REPOSITORY:TAG: make it with export", unnamed, NameAnnotation)
	}
	return nil
}

func (a *Archive) repository(name string) *repository {
	r := a.repositories[name]
	if r == nil {
		r = &repository{tags: make(map[string]v1.Descriptor), referrers: make(map[digest.Digest][]v1.Descriptor)}
		a.repositories[name] = r
	}
	return r
}

func splitName(s string) (name, tag string, ok bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return "", "", false
	}
	name, tag = s[:i], s[i+1:]
	return name, tag, v1alpha1.ValidRepositoryName(name) && v1alpha1.ValidTag(tag)
}

// manifest reads a manifest. The error is fs.ErrNotExist when there is none.
func (a *Archive) manifest(d digest.Digest) ([]byte, manifest, error) {
	r, err := a.blobs(d)
	if err != nil {
		return nil, manifest{}, err
	}
	defer r.Close()
	if r.Size() > maxManifest {
		return nil, manifest{}, fs.ErrNotExist
	}
	body, err := io.ReadAll(r)
	if err != nil {
		return nil, manifest{}, err
	}
	m, err := parse(body)
	if err != nil {
		return nil, manifest{}, fs.ErrNotExist
	}
	return body, m, nil
}
