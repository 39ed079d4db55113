package v1alpha1

import (
	"testing"
	"time"
)

func TestSchedule(t *testing.T) {
	from := time.Date(2026, 1, 31, 23, 59, 30, 0, time.FixedZone("", 2*3600)) // 21:59:30 UTC
	for line, want := range map[string]string{
		"* * * * *":     "2026-01-31T22:00:00Z",
		"*/5 * * * *":   "2026-01-31T22:00:00Z",
		"0 3 * * *":     "2026-02-01T03:00:00Z",
		"0 0 29 2 *":    "2028-02-29T00:00:00Z",
		"30 6 * * MON":  "2026-02-02T06:30:00Z",
		" 0  3 * * 1-5": "2026-02-02T03:00:00Z",
	} {
		s, err := ParseSchedule(line)
		if err != nil {
			t.Errorf("%q: %v", line, err)
			continue
		}
		if got := s.Next(from).Format(time.RFC3339); got != want {
			t.Errorf("%q: next is %s, want %s", line, got, want)
		}
	}
	for _, line := range []string{"", "* * * *", "* * * * * *", "@daily", "@every 1m", "TZ=UTC * * * *", "TZ=0", "CRON_TZ=UTC * * * * *", "60 * * * *", "0 0 30 2 *", "a b c d e"} {
		if _, err := ParseSchedule(line); err == nil {
			t.Errorf("%q is taken", line)
		}
	}
}

func FuzzSchedule(f *testing.F) {
	f.Add("*/5 1-3,7 1 JAN mon")
	f.Add("TZ=0 * * * *")
	f.Fuzz(func(t *testing.T, line string) {
		s, err := ParseSchedule(line)
		if err != nil {
			return
		}
		now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		if next := s.Next(now); !next.After(now) {
			t.Errorf("%q: after %s comes %s", line, now, next)
		}
	})
}

func TestDuration(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"PT1H":         time.Hour,
		"P7D":          7 * 24 * time.Hour,
		"P2W":          14 * 24 * time.Hour,
		"P1DT12H":      36 * time.Hour,
		"P1W2DT3H4M5S": (9*24+3)*time.Hour + 4*time.Minute + 5*time.Second,
		"PT90M":        90 * time.Minute,
		"PT0H1S":       time.Second,
	} {
		if got, err := ParseDuration(s); err != nil || got != want {
			t.Errorf("%q: %s, %v, want %s", s, got, err, want)
		}
	}
	for _, s := range []string{"", "P", "PT", "1H", "PT1", "P1H", "P1M", "P1Y", "PT1D", "P1DT", "P1TH", "PT1M1H", "PTT1H", "PT-1H", "PT1.5H", "P0D", "pt1h", "P99999999999999999999D", "P15250284452471W9D"} {
		if got, err := ParseDuration(s); err == nil {
			t.Errorf("%q is taken for %s", s, got)
		}
	}
}

func FuzzDuration(f *testing.F) {
	f.Add("P1W2DT3H4M5S")
	f.Fuzz(func(t *testing.T, s string) {
		if d, err := ParseDuration(s); err == nil && d <= 0 {
			t.Errorf("%q is %s", s, d)
		}
	})
}
