package storage

import (
	"context"
	"errors"
	"io/fs"
	"iter"
	"slices"
	"strings"
)

// Repositories yields the names of the repositories that hold a manifest, or have
// held one since garbage was last collected, sorted by component, beginning after
// last. It reads as it goes; the first error ends it.
func (s *Store) Repositories(ctx context.Context, last string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		s.walkRepositories(ctx, "", last, yield)
	}
}

// walkRepositories yields the repository at the path dir, which is empty or ends
// in a slash, and those below it. It returns false when the consumer has had
// enough.
func (s *Store) walkRepositories(ctx context.Context, dir, last string, yield func(string, error) bool) bool {
	entries, err := s.medium.list(ctx, strings.TrimSuffix(repositoriesRoot+dir, "/"))
	if errors.Is(err, fs.ErrNotExist) {
		return true // removed meanwhile
	}
	if err != nil {
		yield("", err)
		return false
	}
	name := strings.TrimSuffix(dir, "/")
	if name != "" && compareNames(name, last) > 0 && slices.Contains(entries, entry{"_manifests", true}) && !yield(name, nil) {
		return false
	}
	for _, e := range entries {
		name := dir + e.name
		if !e.folder || !ValidName(name) {
			continue
		}
		inside := strings.HasPrefix(last, name+"/")
		if !inside && compareNames(name, last) < 0 {
			continue // everything below sorts before last, too
		}
		if !s.walkRepositories(ctx, name+"/", last, yield) {
			return false
		}
	}
	return true
}

// compareNames orders names by component, which is the order in which a walk of
// sorted directories meets them.
func compareNames(a, b string) int {
	return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
}

// ValidName reports whether name is a repository name: components of lower case
// letters and digits, joined inside by one period, one or two underscores, or
// hyphens, and between them by slashes.
func ValidName(name string) bool {
	if name == "" || len(name) > maxNameLength {
		return false
	}
	for component := range strings.SplitSeq(name, "/") {
		if !validComponent(component) {
			return false
		}
	}
	return true
}

func validComponent(c string) bool {
	separator := 0 // where the run of separators that ends here began, plus one
	for i := range len(c) {
		switch b := c[i]; {
		case 'a' <= b && b <= 'z', '0' <= b && b <= '9':
			if separator > 0 && !validSeparator(c[separator-1:i]) {
				return false
			}
			separator = 0
		case b == '.', b == '_', b == '-':
			if i == 0 {
				return false
			}
			if separator == 0 {
				separator = i + 1
			}
		default:
			return false
		}
	}
	return c != "" && separator == 0
}

func validSeparator(s string) bool {
	return s == "." || s == "_" || s == "__" || strings.Trim(s, "-") == ""
}

// ValidTag reports whether tag is a tag: up to 128 letters, digits,
// underscores, periods and hyphens, the first neither period nor hyphen.
func ValidTag(tag string) bool {
	if tag == "" || len(tag) > maxTagLength || tag[0] == '.' || tag[0] == '-' {
		return false
	}
	for i := range len(tag) {
		switch b := tag[i]; {
		case 'a' <= b && b <= 'z', 'A' <= b && b <= 'Z', '0' <= b && b <= '9', b == '_', b == '.', b == '-':
		default:
			return false
		}
	}
	return true
}
