package v1alpha1

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
)

// Schedule says when something recurs.
//
// +kubebuilder:object:generate=false
type Schedule interface {
	// Next is the first time after t.
	Next(t time.Time) time.Time
}

// ParseSchedule reads a cron line of five fields (minute, hour, day of month,
// month, day of week) in UTC. A schedule that never comes, such as the 30th of
// February, is an error.
func ParseSchedule(s string) (Schedule, error) {
	bad := fmt.Errorf(`%q is not a cron schedule of five fields: use for example "*/5 * * * *"`, s)
	if len(strings.Fields(s)) != 5 {
		return nil, bad
	}
	// Five fields alone do not rule out a time zone in front, which would make
	// them four.
	if strings.Contains(s, "TZ=") {
		return nil, bad
	}
	parsed, err := cron.NewParser(cron.Minute | cron.Hour | cron.Dom | cron.Month | cron.Dow).Parse(s)
	if err != nil {
		return nil, bad
	}
	if parsed.Next(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)).IsZero() {
		return nil, fmt.Errorf("%q never comes: there is no such day in such a month", s)
	}
	return utcSchedule{parsed}, nil
}

// utcSchedule reads a schedule's fields in UTC, whatever the host's time zone.
type utcSchedule struct{ cron.Schedule }

func (s utcSchedule) Next(t time.Time) time.Time { return s.Schedule.Next(t.UTC()) }

// ParseDuration reads an ISO 8601 duration of whole weeks, days, hours, minutes
// and seconds: "PT3H", "P1DT12H", "P2W". Years and months are not read, since
// how long they are depends on when. The zero duration is an error.
func ParseDuration(s string) (time.Duration, error) {
	bad := fmt.Errorf(`%q is not an ISO 8601 duration of weeks, days, hours, minutes and seconds: use for example "PT3H"`, s)
	rest, ok := strings.CutPrefix(s, "P")
	if !ok {
		return 0, bad
	}
	date, clock, timed := strings.Cut(rest, "T")
	if timed && clock == "" {
		return 0, bad
	}
	days, err := durationParts(date, "WD")
	if err != nil {
		return 0, bad
	}
	hours, err := durationParts(clock, "HMS")
	if err != nil || days > math.MaxInt64-hours || days+hours == 0 {
		return 0, bad
	}
	return days + hours, nil
}

// durationParts adds up numbers, each followed by one of units, which occur in
// their order and once at most.
func durationParts(s, units string) (total time.Duration, err error) {
	for s != "" {
		digits := len(s) - len(strings.TrimLeft(s, "0123456789"))
		if digits == len(s) {
			return 0, errors.New("number without a unit")
		}
		at := strings.IndexByte(units, s[digits])
		if at < 0 {
			return 0, errors.New("unknown unit, or one out of order")
		}
		part, err := durationPart(s[:digits], units[at])
		if err != nil {
			return 0, err
		}
		if total > math.MaxInt64-part {
			return 0, errors.New("too long")
		}
		total += part
		units, s = units[at+1:], s[digits+1:]
	}
	return total, nil
}

// durationPart is number times the unit.
func durationPart(number string, unit byte) (time.Duration, error) {
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil {
		return 0, err
	}
	length := map[byte]time.Duration{
		'W': 7 * 24 * time.Hour, 'D': 24 * time.Hour, 'H': time.Hour, 'M': time.Minute, 'S': time.Second,
	}[unit]
	if n > math.MaxInt64/int64(length) {
		return 0, errors.New("too long")
	}
	return time.Duration(n) * length, nil
}
