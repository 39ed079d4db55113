package syncer

import (
	"context"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxReferring bounds how far what refers to what refers to an image is
// followed: a signature of a bill of materials of an image is at two.
const maxReferring = 4

// bringReferrers brings what refers to each manifest of an image.
func (r *repository) bringReferrers(ctx context.Context, img image, depth int) error {
	var errs []error
	for _, m := range img.manifests {
		if r.claim(m.digest) {
			errs = append(errs, r.bringReferrersOf(ctx, m.digest, depth), r.bringCosign(ctx, m.digest))
		}
	}
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) == 0 {
		return nil
	}
	return errs[0]
}

// claim reports whether the caller is the first to bring the referrers of d.
func (r *repository) claim(d digest.Digest) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := !r.subjects[d]
	r.subjects[d] = true
	return first
}

// bringReferrersOf brings what the parent lists as referring to a manifest. Once
// it is stored, the storage lists it, too.
func (r *repository) bringReferrersOf(ctx context.Context, subject digest.Digest, depth int) error {
	found, err := r.referrersOf(ctx, subject)
	if err != nil {
		return err
	}
	for _, desc := range found {
		img, err := walk(ctx, desc.Digest, nil, r.anywhere)
		if err != nil {
			return err
		}
		m := img.manifests[len(img.manifests)-1]
		if m.subject == nil || m.subject.Digest != subject {
			r.run.log.Debug("the parent lists as a referrer what refers to something else", "repository", r.name, "subject", subject, "manifest", desc.Digest)
			continue
		}
		if err := r.bring(ctx, img); err != nil {
			return err
		}
		if depth < maxReferring {
			if err := r.bringReferrers(ctx, img, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// referrersOf is what the parent lists as referring to a manifest: by its
// referrers API, or by the referrers tag schema if it has none.
func (r *repository) referrersOf(ctx context.Context, subject digest.Digest) ([]v1.Descriptor, error) {
	found, ok, err := r.parent.referrers(ctx, r.remote, subject)
	if ok || err != nil {
		return found, err
	}
	tag := schemaTag(subject)
	d, err := r.resolveListed(ctx, tag)
	if d == "" || err != nil {
		return nil, err
	}
	index, err := r.parent.manifest(ctx, r.remote, d)
	if err != nil {
		return nil, err
	}
	if !index.isIndex() {
		return nil, errContent{fmt.Sprintf("%s:%s is not an index", r.name, tag)}
	}
	return index.children, nil
}

// resolveListed is what a tag stands for at the parent, "" if the parent does
// not list it. A list answers that for all of a repository's images with a few
// requests, where asking for each would take several per image.
func (r *repository) resolveListed(ctx context.Context, tag string) (digest.Digest, error) {
	tags, err := r.tags(ctx)
	if err != nil {
		return "", err
	}
	if _, listed := slices.BinarySearch(tags, tag); !listed {
		return "", nil
	}
	d, err := r.resolve(ctx, tag)
	if isNotFound(err) {
		return "", nil
	}
	return d, err
}

// bringCosign brings the tags by which cosign attaches signatures, attestations
// and bills of materials to a manifest.
func (r *repository) bringCosign(ctx context.Context, subject digest.Digest) error {
	for _, suffix := range cosignSuffixes {
		tag := schemaTag(subject) + suffix
		d, err := r.resolveListed(ctx, tag)
		if err != nil {
			return err
		}
		if d == "" {
			continue
		}
		img, err := walk(ctx, d, nil, r.anywhere)
		if err != nil {
			return err
		}
		if err := r.bring(ctx, img); err != nil {
			return err
		}
		here, err := r.run.store.tag(ctx, r.name, tag)
		if err != nil || here == d {
			return err
		}
		if err := r.run.store.setTag(ctx, r.name, tag, d); err != nil {
			return err
		}
	}
	return nil
}
