package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// renewTime is how old the time of a link may be when it is used before it is
// renewed: links in steady use cost one write an hour.
const renewTime = time.Hour

// link is one by which a repository holds a layer or a manifest.
type link struct {
	name   digest.Digest
	path   string // driver path
	target digest.Digest
	used   time.Time
	// condemned is when that happened; the zero time when it has not.
	condemned time.Time
}

// linkPath is the driver path of the link to d in a directory of links.
func linkPath(links string, d digest.Digest) string {
	return links + d.Algorithm().String() + "/" + d.Encoded() + "/link"
}

// follow returns what the link at a driver path names, for whoever relies on it,
// and renews it: a link that is used is not old. The error is fs.ErrNotExist when
// there is none, or one that holds no digest.
func (s *Store) follow(ctx context.Context, link string, d digest.Digest) (digest.Digest, error) {
	target, unrenewed, err := s.find(ctx, link, d)
	if err == nil && unrenewed != nil {
		return "", fmt.Errorf("relying on %s: %w", d, unrenewed)
	}
	return target, err
}

// followToRead is follow for whoever wants the content now and nothing later: he
// gets it also while nothing can be written.
func (s *Store) followToRead(ctx context.Context, link string, d digest.Digest) (digest.Digest, error) {
	target, _, err := s.find(ctx, link, d)
	return target, err
}

func (s *Store) find(ctx context.Context, link string, d digest.Digest) (target digest.Digest, unrenewed, err error) {
	used, target, err := s.medium.look(ctx, link, d)
	if errors.Is(err, fs.ErrNotExist) && s.medium.rescue(ctx, link) {
		used, target, err = s.medium.look(ctx, link, d)
	}
	if err == nil && time.Since(used) > s.renewAfter {
		unrenewed = s.medium.renew(ctx, link)
		if errors.Is(unrenewed, fs.ErrNotExist) {
			err = unrenewed
		}
	}
	if err != nil {
		return "", nil, err
	}
	return target, unrenewed, nil
}

// isLink recognises the driver path of the link by which a repository holds a
// layer or a manifest.
func isLink(driverPath string) (d digest.Digest, ok bool) {
	rest, ok := strings.CutSuffix(driverPath, "/link")
	if !ok || !strings.HasPrefix(rest, repositoriesRoot) {
		return "", false
	}
	rest, hex := path.Split(rest)
	rest, alg := path.Split(strings.TrimSuffix(rest, "/"))
	if !strings.HasSuffix(rest, "/_layers/") && !strings.HasSuffix(rest, "/_manifests/revisions/") {
		return "", false
	}
	d = digest.Digest(alg + ":" + hex)
	return d, d.Validate() == nil
}

// require makes sure that a blob which has just been linked to is there, and
// returns its size. The collector looks for links after it has condemned, and
// this looks for the blob after it was linked, so that one of the two sees the
// other.
func (s *Store) require(ctx context.Context, d digest.Digest) (size int64, err error) {
	if !validDigest(d) {
		return 0, nil // damaged, and so as good as absent
	}
	if size, err = s.medium.requireBlob(ctx, d); err != nil {
		return 0, fmt.Errorf("linking to %s: %w", d, err)
	}
	return size, nil
}

// parseTagPath recognises the driver path of the link that says what a tag
// names.
func (s *Store) parseTagPath(driverPath string) (r Repository, ok bool) {
	rest, ok := strings.CutSuffix(driverPath, "/current/link")
	if !ok || !strings.HasPrefix(rest, repositoriesRoot) {
		return Repository{}, false
	}
	tags, ok := strings.CutSuffix(path.Dir(rest), "/_manifests/tags")
	if !ok {
		return Repository{}, false
	}
	r, err := s.Repository(strings.TrimPrefix(tags, repositoriesRoot))
	return r, err == nil
}

// releaseTag is called before a tag moves or goes. The manifest that it names is
// kept for as long from then on as one that has just been pushed.
func (r Repository) releaseTag(ctx context.Context, tagLink string) {
	d, err := r.store.medium.readLink(ctx, tagLink)
	if err != nil {
		return
	}
	_ = r.store.medium.renew(ctx, linkPath(r.path+"/_manifests/revisions/", d)) // it may be gone already
}
