package storage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/opencontainers/go-digest"
)

// contents is what a repository holds, condemned or not.
type contents struct {
	repo      Repository
	tags      map[string]digest.Digest
	queued    []digest.Digest // manifests that the parent is still to be sent
	revisions []link
	layers    []link
}

// contents reads what a repository holds. Tags come first: a manifest that is
// tagged behind its back has been used, and its link tells.
func (s *Store) contents(ctx context.Context, r Repository) (contents, error) {
	c := contents{repo: r, tags: make(map[string]digest.Digest)}
	names, _, err := r.Tags(ctx, "", -1)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return c, err
	}
	for _, tag := range names {
		d, err := r.Tag(ctx, tag)
		if err == nil {
			c.tags[tag] = d
		} else if !errors.Is(err, fs.ErrNotExist) {
			return c, err
		}
	}
	if c.revisions, err = s.medium.links(ctx, r.path+"/_manifests/revisions"); err != nil {
		return c, err
	}
	c.layers, err = s.medium.links(ctx, r.path+"/_layers")
	return c, err
}

// references are the digests that a manifest names, of whatever kind it is, and
// its subject. A kind that is not known must not cost what it refers to, so
// every field that any of them has counts.
func references(content []byte) (refs []digest.Digest, subject digest.Digest, err error) {
	type descriptor struct {
		Digest digest.Digest `json:"digest"`
	}
	var m struct {
		Config    *descriptor  `json:"config"`
		Subject   *descriptor  `json:"subject"`
		Layers    []descriptor `json:"layers"`
		Blobs     []descriptor `json:"blobs"`
		Manifests []descriptor `json:"manifests"`
		FSLayers  []struct {
			BlobSum digest.Digest `json:"blobSum"`
		} `json:"fsLayers"`
	}
	if err := json.Unmarshal(content, &m); err != nil {
		return nil, "", err
	}
	for _, one := range []*descriptor{m.Config, m.Subject} {
		if one != nil {
			refs = append(refs, one.Digest)
		}
	}
	for _, list := range [][]descriptor{m.Layers, m.Blobs, m.Manifests} {
		for _, d := range list {
			refs = append(refs, d.Digest)
		}
	}
	for _, l := range m.FSLayers {
		refs = append(refs, l.BlobSum)
	}
	if m.Subject != nil {
		subject = m.Subject.Digest
	}
	return refs, subject, nil
}

// mark returns what of a repository is to be kept: what tags name, what the parent
// is still to be sent, and what has been used since cutoff, all that this refers to, and all that refers to it as
// its subject, again and again. The error says which manifest kept it from
// knowing; nothing of the repository may be collected then.
func (s *Store) mark(ctx context.Context, c contents, cutoff time.Time) (map[digest.Digest]bool, error) {
	m := marker{
		store:      s,
		kept:       make(map[digest.Digest]bool),
		revisions:  make(map[digest.Digest]digest.Digest),
		refs:       make(map[digest.Digest][]digest.Digest),
		referrers:  make(map[digest.Digest][]digest.Digest),
		unreadable: make(map[digest.Digest]error),
	}
	for _, l := range c.revisions {
		m.revisions[l.name] = l.target
	}
	for name := range m.revisions {
		if err := m.read(ctx, name); err != nil {
			return nil, err
		}
	}
	for _, d := range c.tags {
		if _, ok := m.revisions[d]; ok {
			continue
		}
		// What a crash left of a deletion, or damage: if the manifest can still
		// be read it counts, and if not it does not stop anything.
		m.revisions[d] = d
		if err := m.read(ctx, d); err != nil {
			return nil, err
		}
		delete(m.unreadable, d)
	}
	for _, d := range c.tags {
		m.keep(d)
	}
	for _, d := range c.queued {
		m.keep(d)
	}
	for _, l := range c.revisions {
		if l.used.After(cutoff) {
			m.keep(l.name)
		}
	}
	for _, l := range c.layers {
		if l.used.After(cutoff) {
			m.kept[l.name] = true
		}
	}
	for d := range m.kept {
		if err, damaged := m.unreadable[d]; damaged {
			return nil, fmt.Errorf("manifest %s: %w", d, err)
		}
	}
	return m.kept, nil
}

// marker is the state of one marking.
type marker struct {
	store      *Store
	kept       map[digest.Digest]bool
	revisions  map[digest.Digest]digest.Digest   // manifests of the repository, and their blobs
	refs       map[digest.Digest][]digest.Digest // of each manifest
	referrers  map[digest.Digest][]digest.Digest // of each subject
	unreadable map[digest.Digest]error
}

// read finds out what a manifest refers to. What cannot be read is an error only
// if it turns out to be kept.
func (m *marker) read(ctx context.Context, d digest.Digest) error {
	content, err := m.store.medium.peek(ctx, m.revisions[d])
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var subject digest.Digest
	if err == nil {
		m.refs[d], subject, err = references(content)
	}
	switch {
	case err != nil:
		m.unreadable[d] = err
	case subject != "":
		m.referrers[subject] = append(m.referrers[subject], d)
	}
	return nil
}

// keep marks d and everything that hangs on it.
func (m *marker) keep(d digest.Digest) {
	todo := []digest.Digest{d}
	for len(todo) > 0 {
		d, todo = todo[len(todo)-1], todo[:len(todo)-1]
		if m.kept[d] {
			continue
		}
		m.kept[d] = true
		todo = append(append(todo, m.refs[d]...), m.referrers[d]...)
	}
}
