package v1alpha1

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// maxGlob bounds a glob's length. Repository names have at most 255 bytes, tags
// 128.
const maxGlob = 512

// Glob is a pattern for repository names or tags. The zero Glob matches
// nothing.
//
// +kubebuilder:object:generate=false
type Glob struct {
	pattern string
	re      *regexp.Regexp // nil for a literal
}

// ParseGlob reads a pattern. It is compared with the whole of a name, which it
// takes as segments between slashes (a tag is a single segment):
//
//   - any number of characters, also none, within a segment
//     ?        one character within a segment
//     [a-c5]   one of these characters; [!a-c5]: one that is not among them
//     {ab,c*}  one of the alternatives, which are not nested
//     **       as a whole segment: any number of segments, also none
//
// Every other character stands for itself and must be one that can occur in a
// name: a letter, a digit, '.', '_' or '-'. So "team/*" matches team/app but not
// team/app/web, "team/**" matches both and also team, "**" matches everything,
// and "1.?" matches 1.4. Matching takes time proportional to the name's length,
// whatever the pattern.
func ParseGlob(pattern string) (Glob, error) {
	if pattern == "" {
		return Glob{}, errors.New("is empty")
	}
	if len(pattern) > maxGlob {
		return Glob{}, fmt.Errorf("is longer than %d characters", maxGlob)
	}
	expr, err := globExpr(strings.Split(pattern, "/"))
	if err != nil {
		return Glob{}, err
	}
	g := Glob{pattern: pattern}
	if !strings.ContainsAny(pattern, "*?[{") {
		return g, nil
	}
	if g.re, err = regexp.Compile(`\A` + expr + `\z`); err != nil {
		return Glob{}, errors.New("is not a glob")
	}
	return g, nil
}

// Match reports whether the glob matches the whole of name.
func (g Glob) Match(name string) bool {
	if g.re == nil {
		return g.pattern != "" && g.pattern == name
	}
	return g.re.MatchString(name)
}

// Literal reports whether the glob has no wildcards: it matches exactly the
// name that it is.
func (g Glob) Literal() bool { return g.re == nil }

// String is the pattern.
func (g Glob) String() string { return g.pattern }

// globExpr is the regular expression for a glob's segments.
func globExpr(segments []string) (string, error) {
	var b strings.Builder
	slash := false // the next segment has one before it
	for i, segment := range segments {
		last := i == len(segments)-1
		if segment == "**" {
			switch {
			case slash:
				b.WriteString(`(?:/[^/]+)*`)
			case last:
				b.WriteString(`.*`)
			default:
				b.WriteString(`(?:[^/]+/)*`)
			}
			continue
		}
		expr, err := segmentExpr(segment)
		if err != nil {
			return "", err
		}
		if slash {
			b.WriteByte('/')
		}
		b.WriteString(expr)
		slash = true
	}
	return b.String(), nil
}

// segmentExpr is the regular expression for what stands between two slashes.
func segmentExpr(segment string) (string, error) {
	if segment == "" {
		return "", errors.New("has an empty segment: a slash at an end, or two in a row")
	}
	var b strings.Builder
	inBraces := false
	for i := 0; i < len(segment); i++ {
		switch c := segment[i]; {
		case c == '*':
			if strings.HasPrefix(segment[i:], "**") {
				return "", errors.New(`has "**" beside other characters: it must be a whole segment between slashes`)
			}
			b.WriteString(`[^/]*`)
		case c == '?':
			b.WriteString(`[^/]`)
		case c == '[':
			end := strings.IndexByte(segment[i:], ']')
			if end < 0 {
				return "", errors.New(`has "[" without "]"`)
			}
			expr, err := classExpr(segment[i+1 : i+end])
			if err != nil {
				return "", err
			}
			b.WriteString(expr)
			i += end
		case c == '{' && !inBraces:
			inBraces = true
			b.WriteString(`(?:`)
		case c == '{':
			return "", errors.New("has braces within braces")
		case c == ',' && inBraces:
			b.WriteByte('|')
		case c == '}' && inBraces:
			inBraces = false
			b.WriteByte(')')
		case nameByte(c):
			b.WriteString(regexp.QuoteMeta(string(c)))
		default:
			return "", badByte(segment[i:])
		}
	}
	if inBraces {
		return "", errors.New(`has "{" without "}"`)
	}
	return b.String(), nil
}

// classExpr is the regular expression for what stands in brackets.
func classExpr(class string) (string, error) {
	body := strings.TrimPrefix(class, "!")
	negated := body != class
	if body == "" {
		return "", errors.New("has empty brackets")
	}
	var b strings.Builder
	b.WriteByte('[')
	if negated {
		b.WriteString(`^/`) // a segment ends at a slash whatever the class says
	}
	for i := 0; i < len(body); i++ {
		if !nameByte(body[i]) {
			return "", badByte(body[i:])
		}
		b.WriteString(regexp.QuoteMeta(string(body[i])))
		if i+2 < len(body) && body[i+1] == '-' {
			if !nameByte(body[i+2]) {
				return "", badByte(body[i+2:])
			}
			if body[i+2] < body[i] {
				return "", fmt.Errorf("has the range %s, which runs backwards", body[i:i+3])
			}
			b.WriteString(`-` + regexp.QuoteMeta(string(body[i+2])))
			i += 2
		} else if body[i] == '-' {
			// A hyphen that is no range, which regexp would take for one.
			s := strings.TrimSuffix(b.String(), "-")
			b.Reset()
			b.WriteString(s + `\-`)
		}
	}
	b.WriteByte(']')
	return b.String(), nil
}

// nameByte reports whether c can occur in a segment of a repository name or in
// a tag.
func nameByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-'
}

func badByte(at string) error {
	return fmt.Errorf("has %q, which cannot occur in a name", []rune(at)[0])
}
