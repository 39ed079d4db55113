package daemon

import (
	"errors"
	"fmt"
	"time"

	"github.com/connected-registry/connected-registry/trust"
)

// source is what one CA Secret has brought so far.
type source struct {
	// looked: the API server has been asked.
	looked bool
	// bundle is the last good content; empty if there never was any, or it is
	// gone for good.
	bundle trust.Bundle
	// fault says why the Secret's present content is not used. Empty: it is.
	fault string
	// refused says the same of content that is there but no good.
	refused bool
	// lapses is when the certificates of a Secret that is gone go too. Zero: the
	// Secret is there, or there are none.
	lapses time.Time
	// lapsed: they went.
	lapsed bool
	notes  []string
	uid    string
}

// take judges the Secret as it is now. Whatever is no good leaves the bundle
// alone.
func (s *source) take(now seen, at time.Time, grace time.Duration) {
	s.looked, s.refused, s.notes, s.uid = true, false, nil, now.uid
	if !now.present {
		s.fault = "does not exist: create it, or take it out of the configuration"
		if !s.bundle.Empty() && s.lapses.IsZero() {
			s.lapses = at.Add(grace)
		}
		return
	}
	s.lapses = time.Time{}
	if now.ca == nil {
		s.refuse(errors.New("has no key ca.crt: put the CA certificates there"))
		return
	}
	b, notes, err := trust.ParseBundle(now.ca, at)
	if err != nil {
		s.refuse(fmt.Errorf("ca.crt: %w", err))
		return
	}
	s.bundle, s.notes, s.fault, s.lapsed = b, notes, "", false
}

func (s *source) refuse(err error) {
	s.fault, s.refused = err.Error(), true
	if !s.bundle.Empty() {
		s.fault += "; the last good certificates stay trusted"
	}
}

// age drops what time has ended: the certificates of a Secret that is gone, and
// those that have expired while others remain.
func (s *source) age(at time.Time) {
	if !s.lapses.IsZero() && !at.Before(s.lapses) {
		s.bundle, s.lapses, s.lapsed = trust.Bundle{}, time.Time{}, true
	}
	if end := s.bundle.NotAfter(); !end.IsZero() && at.After(end) {
		if b, notes, err := trust.ParseBundle(s.bundle.PEM(), at); err == nil {
			s.bundle, s.notes = b, notes
		}
	}
}
