package archive

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/connected-registry/connected-registry/storage"
)

// ExportConfig says what to carry.
type ExportConfig struct {
	// Store is where the content is. Required.
	Store *storage.Store
	// File is the archive to write. Until it is whole it is called File.partial;
	// an export that was interrupted goes on where that ends. Required.
	File string
	// Wanted chooses among the tags of the store. nil: all of them.
	Wanted func(repository, tag string) bool
	// Progress is told how many bytes of content are in the archive, of how
	// many. nil: nobody is told.
	Progress func(done, total int64)
}

// ExportResult is what an archive holds.
type ExportResult struct {
	Tags      int
	Referrers int
	Blobs     int
	// Bytes of content, manifests included; Resumed is how many of them were in
	// the file already.
	Bytes, Resumed int64
	// Left are manifests that an index lists and the store does not hold, as
	// after a synchronisation of some platforms only.
	Left int
}

// Export writes the archive. An error names what of the store is missing or
// corrupt; the partial file stays, and the next Export goes on with it.
func Export(ctx context.Context, c ExportConfig) (ExportResult, error) {
	w := &walk{store: c.Store, seen: make(map[string]bool), blobs: make(map[digest.Digest]int64)}
	if err := w.all(ctx, c.Wanted); err != nil {
		return ExportResult{}, err
	}
	if len(w.index) == 0 {
		return ExportResult{}, errors.New("nothing to export: the store holds no tag that is wanted: synchronise first, or name other repositories")
	}
	if err := replaceable(c.File); err != nil {
		return ExportResult{}, err
	}
	out, err := openPartial(ctx, c.File+".partial")
	if err != nil {
		return ExportResult{}, err
	}
	defer out.Close()
	result := w.result
	result.Blobs = len(w.blobs)
	for _, size := range w.blobs {
		result.Bytes += size
	}
	done := int64(0)
	report := func(n int64) {
		if done += n; c.Progress != nil {
			c.Progress(done, result.Bytes)
		}
	}
	for _, d := range w.order {
		if size, ok := out.has[d]; ok && size == w.blobs[d] {
			result.Resumed += size
			report(size)
			continue
		}
		if err := exportBlob(ctx, c.Store, out, d, report); err != nil {
			return ExportResult{}, err
		}
	}
	index, err := json.Marshal(v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageIndex,
		Manifests: w.index,
	})
	if err != nil {
		return ExportResult{}, err
	}
	if len(index) > maxIndex {
		return ExportResult{}, fmt.Errorf("the list of tags takes %d bytes, more than %d: export fewer at once", len(index), maxIndex)
	}
	return result, out.finish(index, c.File)
}

// replaceable refuses a file that is there and is no archive, such as a
// configuration that was named by mistake.
func replaceable(name string) error {
	info, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Mode().IsRegular() && info.Size() == 0 {
		return nil
	}
	var earlier *Archive
	if err == nil && info.Mode().IsRegular() {
		earlier, err = Open(name)
	}
	if earlier == nil || err != nil {
		return fmt.Errorf("%s is there already and is not an archive of ours: remove it or give another name", name)
	}
	return earlier.Close()
}

func exportBlob(ctx context.Context, store *storage.Store, out *partial, d digest.Digest, report func(int64)) error {
	f, err := store.OpenBlob(ctx, d)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is missing: synchronise before exporting", d)
	}
	if err != nil {
		return fmt.Errorf("reading %s: %w", d, err)
	}
	defer f.Close()
	return out.add(ctx, d, f, f.Size, report)
}

// walk finds what hangs on the wanted tags.
type walk struct {
	store  *storage.Store
	index  []v1.Descriptor
	seen   map[string]bool // repository@digest
	blobs  map[digest.Digest]int64
	order  []digest.Digest // the blobs, each after what it refers to
	result ExportResult
}

func (w *walk) all(ctx context.Context, wanted func(repository, tag string) bool) error {
	for name, err := range w.store.Repositories(ctx, "") {
		if err != nil {
			return fmt.Errorf("listing repositories: %w", err)
		}
		repo, err := w.store.Repository(name)
		if err != nil {
			return err
		}
		tags, _, err := repo.Tags(ctx, "", -1)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("listing tags of %s: %w", name, err)
		}
		for _, tag := range tags {
			if wanted != nil && !wanted(name, tag) {
				continue
			}
			if err := w.tag(ctx, repo, tag); err != nil {
				return fmt.Errorf("%s:%s: %w", name, tag, err)
			}
		}
	}
	return nil
}

func (w *walk) tag(ctx context.Context, repo storage.Repository, tag string) error {
	d, err := repo.Tag(ctx, tag)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // gone since it was listed
	}
	if err != nil {
		return err
	}
	desc, err := w.manifest(ctx, repo, d)
	if err != nil {
		return err
	}
	desc.Annotations = map[string]string{NameAnnotation: repo.Name() + ":" + tag}
	w.index = append(w.index, desc)
	w.result.Tags++
	return nil
}

// manifest adds a manifest with everything under it and everything that refers
// to it.
func (w *walk) manifest(ctx context.Context, repo storage.Repository, d digest.Digest) (v1.Descriptor, error) {
	body, err := readManifest(ctx, repo, d)
	if err != nil {
		return v1.Descriptor{}, err
	}
	m, err := parse(body)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("manifest %s: %w", d, err)
	}
	desc := v1.Descriptor{MediaType: m.mediaType(), Digest: d, Size: int64(len(body))}
	key := repo.Name() + "@" + d.String()
	if w.seen[key] {
		return desc, nil
	}
	w.seen[key] = true
	for _, child := range m.Manifests {
		switch _, err := w.manifest(ctx, repo, child.Digest); {
		case errors.Is(err, fs.ErrNotExist):
			w.result.Left++
		case err != nil:
			return v1.Descriptor{}, err
		}
	}
	for _, blob := range m.blobs() {
		if len(blob.URLs) > 0 && !repo.HasLayer(ctx, blob.Digest) {
			continue // fetched from elsewhere, by whoever pulls
		}
		w.blob(blob.Digest, blob.Size)
	}
	w.blob(d, desc.Size)
	return desc, w.referrers(ctx, repo, d)
}

func (w *walk) referrers(ctx context.Context, repo storage.Repository, subject digest.Digest) error {
	for referrer, err := range repo.Referrers(ctx, subject, "") {
		if err != nil {
			return fmt.Errorf("listing what refers to %s: %w", subject, err)
		}
		if w.seen[repo.Name()+"@"+referrer.Digest.String()] {
			continue
		}
		if _, err := w.manifest(ctx, repo, referrer.Digest); err != nil {
			return err
		}
		annotations := map[string]string{}
		for k, v := range referrer.Annotations {
			annotations[k] = v
		}
		delete(annotations, NameAnnotation)
		annotations[RepositoryAnnotation], annotations[SubjectAnnotation] = repo.Name(), subject.String()
		referrer.Annotations = annotations
		w.index = append(w.index, referrer)
		w.result.Referrers++
	}
	return nil
}

func (w *walk) blob(d digest.Digest, size int64) {
	if _, ok := w.blobs[d]; !ok {
		w.blobs[d] = size
		w.order = append(w.order, d)
	}
}

func readManifest(ctx context.Context, repo storage.Repository, d digest.Digest) ([]byte, error) {
	f, err := repo.OpenManifest(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d, err)
	}
	defer f.Close()
	if f.Size > maxManifest {
		return nil, fmt.Errorf("manifest %s has %d bytes, more than %d", d, f.Size, maxManifest)
	}
	body, err := io.ReadAll(f)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d, err)
	}
	return body, nil
}

// manifest is what an image manifest, an index, and their like in Docker's
// schema 2 have in common.
type manifest struct {
	MediaType    string            `json:"mediaType"`
	ArtifactType string            `json:"artifactType"`
	Config       *v1.Descriptor    `json:"config"`
	Layers       []v1.Descriptor   `json:"layers"`
	Manifests    []v1.Descriptor   `json:"manifests"`
	Annotations  map[string]string `json:"annotations"`
}

func parse(body []byte) (manifest, error) {
	var m manifest
	if err := json.Unmarshal(body, &m); err != nil {
		return manifest{}, errors.New("is not a manifest in JSON")
	}
	if m.Config == nil && m.Manifests == nil {
		return manifest{}, errors.New("is neither an image nor an index")
	}
	for _, d := range slices.Concat(m.Manifests, m.blobs()) {
		if err := d.Digest.Validate(); err != nil {
			return manifest{}, fmt.Errorf("names a digest that is none: %w", err)
		}
	}
	return m, nil
}

// mediaType is what the manifest says it is, or what it looks like: the field is
// optional in OCI manifests.
func (m manifest) mediaType() string {
	switch {
	case m.MediaType != "":
		return m.MediaType
	case m.Manifests != nil:
		return v1.MediaTypeImageIndex
	default:
		return v1.MediaTypeImageManifest
	}
}

func (m manifest) blobs() []v1.Descriptor {
	if m.Config == nil {
		return m.Layers
	}
	return append([]v1.Descriptor{*m.Config}, m.Layers...)
}
