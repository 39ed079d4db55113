package v1alpha1

import (
	"errors"
	"regexp"
	"strings"

	"github.com/opencontainers/go-digest"
)

// EventPattern chooses events, in the form of Azure's notifications:
//
//	name[:tag][@digest]:(push|delete|*)
//
// in which "*" stands for any characters, also none and also "/". Without a tag,
// or without a digest, it chooses events with any and with none.
//
// +kubebuilder:object:generate=false
type EventPattern struct {
	name, tag, digest *regexp.Regexp // nil: whatever
	action            string         // empty: both
}

// maxEventPattern bounds a pattern, in bytes.
const maxEventPattern = 1024

var errEventPattern = errors.New(`is not a pattern for events: use name[:tag][@digest]:push or :delete, for example "team/*:push"`)

// ParseEventPattern parses a pattern. The error is a sentence part, to be read
// after the pattern.
func ParseEventPattern(pattern string) (EventPattern, error) {
	if len(pattern) > maxEventPattern || strings.Count(pattern, "*") > 16 {
		return EventPattern{}, errEventPattern
	}
	i := strings.LastIndexByte(pattern, ':')
	if i < 0 {
		return EventPattern{}, errEventPattern
	}
	reference, action := pattern[:i], pattern[i+1:]
	var p EventPattern
	switch action {
	case "*":
	case "push", "delete":
		p.action = action
	default:
		return EventPattern{}, errEventPattern
	}
	reference, d, withDigest := strings.Cut(reference, "@")
	name, tag, withTag := strings.Cut(reference, ":")
	if withDigest {
		if !strings.Contains(d, "*") && digest.Digest(d).Validate() != nil {
			return EventPattern{}, errEventPattern
		}
		p.digest = wildcard(d)
	}
	if withTag {
		if !ValidTag(strings.ReplaceAll(tag, "*", "a")) {
			return EventPattern{}, errEventPattern
		}
		p.tag = wildcard(tag)
	}
	if !ValidRepositoryName(strings.ReplaceAll(name, "*", "a")) {
		return EventPattern{}, errEventPattern
	}
	p.name = wildcard(name)
	return p, nil
}

func wildcard(pattern string) *regexp.Regexp {
	return regexp.MustCompile(`\A` + strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, ".*") + `\z`)
}

// Match reports whether the pattern chooses an event. tag and digest may be
// empty; action is push or delete.
func (p EventPattern) Match(name, tag, digest, action string) bool {
	return p.name != nil && p.name.MatchString(name) &&
		(p.tag == nil || p.tag.MatchString(tag)) &&
		(p.digest == nil || p.digest.MatchString(digest)) &&
		(p.action == "" || p.action == action)
}
