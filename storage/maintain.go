package storage

import (
	"cmp"
	"context"
	"time"
)

// Maintenance says how a store is looked after. The zero value is what a store
// in use should have.
type Maintenance struct {
	// MinAge is for how long content that nothing refers to stays after it was
	// last used: pushed, pulled, or named by a tag. An hour at most comes on
	// top. 0: 24 hours.
	MinAge time.Duration
	// Grace is for how long what is to be deleted can still be had by whoever
	// asks for it. It must be longer than the volume's clients cache names (a
	// minute for NFS, unless it was mounted otherwise). 0: 10 minutes.
	Grace time.Duration
	// UploadAge is for how long an unfinished upload stays after it was last
	// written to. 0: 7 days.
	UploadAge time.Duration
	// QuarantineAge is for how long corrupt files stay to be looked at. 0: 30
	// days.
	QuarantineAge time.Duration
	// ScrubRate is the most that scrubbing reads, in bytes per second. 0: 16
	// MiB. Negative: nothing is scrubbed.
	ScrubRate int64
	// ScrubTime is for how long it may go on at a time; the next call goes on
	// from there. 0: 4 hours.
	ScrubTime time.Duration
}

// Maintained says what Maintain did.
type Maintained struct {
	Swept     Swept
	Collected Collected
	Usage     Usage
	Scrubbed  Scrubbed
	Damaged   []Damage // after scrubbing
}

// Maintain removes what crashes left, collects garbage, counts what is stored,
// and scrubs, while this process and others use the store. It takes as long as
// that takes, twice Grace at least when there is garbage, and ends early with
// ctx, whose cause it returns; the next call goes on. One process at a time
// should call it: two lose nothing, but do the work twice.
//
// What it reports is true also beside an error.
func (s *Store) Maintain(ctx context.Context, m Maintenance) (Maintained, error) {
	did, err := s.maintain(ctx, m)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return did, err
}

func (s *Store) maintain(ctx context.Context, m Maintenance) (Maintained, error) {
	var did Maintained
	var err error
	began := time.Now()
	if did.Swept, err = s.sweep(ctx, cmp.Or(m.UploadAge, 7*24*time.Hour), cmp.Or(m.QuarantineAge, 30*24*time.Hour)); err != nil {
		return did, err
	}
	if did.Collected, err = s.collect(ctx, cmp.Or(m.MinAge, 24*time.Hour), cmp.Or(m.Grace, 10*time.Minute)); err != nil {
		return did, err
	}
	if did.Usage, err = s.recount(ctx); err != nil {
		return did, err
	}
	s.log.Info("garbage collected", "manifests", did.Collected.Manifests, "layers", did.Collected.Layers,
		"blobs", did.Collected.Blobs, "bytes", did.Collected.Bytes, "uploads", did.Swept.Uploads,
		"temporary", did.Swept.Temporary, "skipped", len(did.Collected.Skipped), "stored", did.Usage.Total, "took", time.Since(began))
	if m.ScrubRate < 0 {
		return did, nil
	}
	limited, cancel := context.WithTimeout(ctx, cmp.Or(m.ScrubTime, 4*time.Hour))
	defer cancel()
	began = time.Now()
	did.Scrubbed, err = s.scrub(limited, cmp.Or(m.ScrubRate, 16<<20))
	s.log.Info("stored content scrubbed", "blobs", did.Scrubbed.Blobs, "bytes", did.Scrubbed.Bytes, "corrupt", did.Scrubbed.Corrupt,
		"finished", did.Scrubbed.Finished, "took", time.Since(began))
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return did, err
	}
	did.Damaged, err = s.Damaged(ctx)
	return did, err
}
