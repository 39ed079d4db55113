package v1alpha1

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"

	"github.com/Masterminds/semver/v3"
)

// The prefixes of tag patterns that are not globs, none of which has a colon.
const (
	regexPrefix  = "regex:"
	semverPrefix = "semver:"
)

// TagPattern is a pattern for tags. The zero TagPattern matches nothing.
//
// +kubebuilder:object:generate=false
type TagPattern struct {
	pattern  string
	glob     Glob
	re       *regexp.Regexp
	versions *semver.Constraints
}

// ParseTagPattern reads a pattern, which is one of
//
//	1.2.*                a glob; see ParseGlob
//	regex:v[0-9]+        a regular expression (RE2), for the whole of a tag
//	semver:>=1.2 <2      a range of versions, for tags that are versions
//
// A tag is a version if it has one to three numbers, with or without a "v" in
// front and a pre-release behind: 1.2.3, v1.2, 1.2.3-rc.1. A range takes
// pre-releases only if it names one, as in ">=1.2.0-0". Comparisons after a
// space or a comma all hold, of those after "||" one does; "~1.2", "^1.2",
// "1.2.x" and "1.2 - 1.4" are ranges, too.
//
// The error is to be read after the pattern.
func ParseTagPattern(pattern string) (TagPattern, error) {
	if len(pattern) > maxGlob {
		return TagPattern{}, fmt.Errorf("is longer than %d characters", maxGlob)
	}
	if expr, ok := strings.CutPrefix(pattern, regexPrefix); ok {
		return parseRegexPattern(pattern, expr)
	}
	if versions, ok := strings.CutPrefix(pattern, semverPrefix); ok {
		return parseVersionPattern(pattern, versions)
	}
	glob, err := ParseGlob(pattern)
	switch {
	case strings.Contains(pattern, ":"):
		return TagPattern{}, errors.New(`has a colon: only "regex:" and "semver:" may stand in front`)
	case err != nil:
		return TagPattern{}, err
	case strings.Contains(pattern, "/"):
		return TagPattern{}, errors.New("has a slash, which no tag has")
	case glob.Literal() && !ValidTag(pattern):
		return TagPattern{}, errors.New("is not a tag")
	}
	return TagPattern{pattern: pattern, glob: glob}, nil
}

func parseRegexPattern(pattern, expr string) (TagPattern, error) {
	if expr == "" {
		return TagPattern{}, errors.New("has no regular expression")
	}
	// By itself first: what is wrong in it must not be right within more.
	if _, err := regexp.Compile(expr); err != nil {
		why := "it cannot be read"
		if e, ok := errors.AsType[*syntax.Error](err); ok {
			why = e.Code.String()
		}
		return TagPattern{}, fmt.Errorf("is not a regular expression of RE2: %s", why)
	}
	re, err := regexp.Compile(`\A(?:` + expr + `)\z`)
	if err != nil {
		return TagPattern{}, errors.New("is not a regular expression of RE2: it is too large")
	}
	return TagPattern{pattern: pattern, re: re}, nil
}

func parseVersionPattern(pattern, versions string) (TagPattern, error) {
	parsed, err := semver.NewConstraint(versions)
	if err != nil || strings.TrimSpace(versions) == "" {
		return TagPattern{}, errors.New(`is not a range of versions: use for example "semver:>=1.2 <2"`)
	}
	return TagPattern{pattern: pattern, versions: parsed}, nil
}

// Match reports whether the pattern matches a tag.
func (p TagPattern) Match(tag string) bool {
	switch {
	case p.re != nil:
		return p.re.MatchString(tag)
	case p.versions != nil:
		v := tagVersion(tag)
		return v != nil && p.versions.Check(v)
	}
	return p.glob.Match(tag)
}

// Literal reports whether the pattern matches exactly the tag that it is.
func (p TagPattern) Literal() bool { return p.re == nil && p.versions == nil && p.glob.Literal() }

// String is the pattern.
func (p TagPattern) String() string { return p.pattern }

// NewestTags are the n tags with the highest versions, newest first, or all that
// are versions if those are not as many. Precedence is that of Semantic
// Versioning 2.0.0, section 11; of tags for the same version (1.2, v1.2.0) the
// longer counts as newer, then the one that sorts later.
func NewestTags(tags []string, n int) []string {
	type versioned struct {
		tag     string
		version *semver.Version
	}
	var found []versioned
	for _, tag := range tags {
		if v := tagVersion(tag); v != nil {
			found = append(found, versioned{tag, v})
		}
	}
	slices.SortFunc(found, func(a, b versioned) int {
		return cmp.Or(b.version.Compare(a.version), cmp.Compare(len(b.tag), len(a.tag)), cmp.Compare(b.tag, a.tag))
	})
	var newest []string
	for _, v := range found[:min(n, len(found))] {
		newest = append(newest, v.tag)
	}
	return newest
}

// tagVersion is the version that a tag is, nil if it is none.
func tagVersion(tag string) *semver.Version {
	v, err := semver.NewVersion(tag)
	if err != nil {
		return nil
	}
	return v
}

// ParseReferenceGlobs parses REPOSITORY[:TAG] patterns, in which REPOSITORY is a
// Glob and TAG a TagPattern, and returns what any of them matches; with no
// patterns, everything. The error names the pattern.
func ParseReferenceGlobs(patterns []string) (match func(repository, tag string) bool, err error) {
	type pair struct {
		repository Glob
		tag        *TagPattern
	}
	var pairs []pair
	for _, pattern := range patterns {
		name, tag, tagged := strings.Cut(pattern, ":")
		var p pair
		if p.repository, err = ParseGlob(name); err != nil {
			return nil, fmt.Errorf("%q: the repository %w", pattern, err)
		}
		if tagged {
			t, err := ParseTagPattern(tag)
			if err != nil {
				return nil, fmt.Errorf("%q: the tag %w", pattern, err)
			}
			p.tag = &t
		}
		pairs = append(pairs, p)
	}
	return func(repository, tag string) bool {
		return len(pairs) == 0 || slices.ContainsFunc(pairs, func(p pair) bool {
			return p.repository.Match(repository) && (p.tag == nil || p.tag.Match(tag))
		})
	}, nil
}
