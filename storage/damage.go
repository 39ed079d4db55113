package storage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// damagedDir holds an empty file for each blob that was found corrupt and has not
// come back, called by its digest.
const damagedDir = "damaged"

// Damage is a blob that repositories should have, and that was found corrupt.
type Damage struct {
	Digest       digest.Digest
	Since        time.Time
	Repositories []string // that hold it, sorted
}

// Damaged lists the blobs that were found corrupt and have to be fetched or
// pushed again, oldest first. Those that have come back, or that nobody holds any
// more, leave the list by this.
func (s *Store) Damaged(ctx context.Context) ([]Damage, error) {
	marks, err := s.medium.listNotes(ctx, damagedDir)
	if err != nil {
		return nil, fmt.Errorf("listing damaged content: %w", err)
	}
	var list []Damage
	for _, mark := range marks {
		d, ok := parseEntryDigest(mark.name)
		since, err := mark.modified()
		if !ok || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("listing damaged content: %w", err)
		}
		if _, _, err := s.medium.statBlob(ctx, d); err == nil {
			s.repaired(ctx, d)
			continue
		}
		list = append(list, Damage{Digest: d, Since: since})
	}
	if len(list) == 0 {
		return nil, nil
	}
	if err := s.holders(ctx, list); err != nil {
		return nil, err
	}
	list = slices.DeleteFunc(list, func(d Damage) bool {
		if len(d.Repositories) == 0 {
			s.repaired(ctx, d.Digest)
		}
		return len(d.Repositories) == 0
	})
	slices.SortStableFunc(list, func(a, b Damage) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Digest, b.Digest))
	})
	return list, nil
}

// holders finds out which repositories link to what is damaged.
func (s *Store) holders(ctx context.Context, list []Damage) error {
	names, err := s.medium.repositories(ctx)
	if err != nil {
		return fmt.Errorf("listing damaged content: %w", err)
	}
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		for i, d := range list {
			for _, links := range []string{"/_layers/", "/_manifests/revisions/"} {
				_, _, err := s.medium.look(ctx, linkPath(repositoriesRoot+name+links, d.Digest), d.Digest)
				if err == nil {
					list[i].Repositories = append(list[i].Repositories, name)
					break
				}
			}
		}
	}
	for _, d := range list {
		slices.Sort(d.Repositories)
	}
	return nil
}

// damaged notes durably that a blob is wanted again, and since when.
func (s *Store) damaged(ctx context.Context, d digest.Digest) {
	name := damagedDir + "/" + entryName(d)
	_, err := s.medium.readNote(ctx, name)
	if errors.Is(err, fs.ErrNotExist) {
		err = s.medium.writeNote(ctx, name, nil, true)
	}
	if err != nil {
		s.log.Error("corrupt blob cannot be noted for the next synchronisation; resync to have it fetched again", "digest", d, "error", err)
	}
}

func (s *Store) repaired(ctx context.Context, d digest.Digest) {
	_ = s.medium.removeNote(ctx, damagedDir+"/"+entryName(d)) // or next time
}
