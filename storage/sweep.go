package storage

import (
	"context"
	"path/filepath"
	"time"
)

// Swept says what crashes and clients that gave up had left.
type Swept struct {
	Uploads   int // that nobody went on with
	Temporary int // files
}

// sweep removes uploads and partial content that nobody has written to for
// uploadAge, what has been aside for quarantineAge, and what crashes left.
func (s *Store) sweep(ctx context.Context, uploadAge, quarantineAge time.Duration) (Swept, error) {
	names, err := s.medium.repositories(ctx)
	if err != nil {
		return Swept{}, err
	}
	now := time.Now()
	swept, err := s.medium.sweep(ctx, names, now.Add(-uploadAge), now.Add(-quarantineAge))
	if err != nil || s.root == "" {
		return swept, err
	}
	n, err := sweepFiles(filepath.Join(s.root, partialDir), "", now.Add(-uploadAge))
	swept.Temporary += n
	return swept, err
}
