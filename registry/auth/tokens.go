package auth

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
)

// maxTokenFile bounds a token's file. A Secret holds 1 MiB in all.
const maxTokenFile = 1 << 20

// token is a client token ready for use.
type token struct {
	name      string
	passwords []clienttoken.Hash
	scopes    scopeMap
}

// scopeMap says which actions are allowed where.
type scopeMap []scope

type scope struct {
	globs   []v1alpha1.Glob
	actions []v1alpha1.Action
}

// allows reports whether action is allowed on a repository.
func (m scopeMap) allows(repository string, action v1alpha1.Action) bool {
	for _, s := range m {
		if slices.Contains(s.actions, action) && slices.ContainsFunc(s.globs, func(g v1alpha1.Glob) bool { return g.Match(repository) }) {
			return true
		}
	}
	return false
}

// parseToken reads a token's file. Its errors quote no part of a password.
func parseToken(name string, content []byte) (*token, error) {
	var file clienttoken.File
	dec := json.NewDecoder(bytes.NewReader(content))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&file); err != nil {
		return nil, fmt.Errorf("token %s: %w", name, err)
	}
	if dec.More() {
		return nil, fmt.Errorf("token %s: something follows the JSON object", name)
	}
	if len(file.Passwords) > 2 {
		return nil, fmt.Errorf("token %s: passwords: there are %d, two at most are supported", name, len(file.Passwords))
	}
	t := &token{name: name}
	for i, text := range file.Passwords {
		h, err := clienttoken.ParseHash(text)
		if err != nil {
			return nil, fmt.Errorf("token %s: passwords[%d] %w", name, i, err)
		}
		t.passwords = append(t.passwords, h)
	}
	for i, s := range file.ScopeMap {
		parsed, err := parseScope(s)
		if err != nil {
			return nil, fmt.Errorf("token %s: scopeMap[%d].%w", name, i, err)
		}
		t.scopes = append(t.scopes, parsed)
	}
	return t, nil
}

// allActions are the actions that a scope map may name.
var allActions = []v1alpha1.Action{
	v1alpha1.ActionContentRead, v1alpha1.ActionContentWrite, v1alpha1.ActionContentDelete,
	v1alpha1.ActionMetadataRead, v1alpha1.ActionMetadataWrite,
}

func parseScope(s v1alpha1.Scope) (scope, error) {
	var parsed scope
	for _, pattern := range s.Repositories {
		g, err := v1alpha1.ParseGlob(pattern)
		if err != nil {
			return scope{}, fmt.Errorf("repositories: %q %w", pattern, err)
		}
		parsed.globs = append(parsed.globs, g)
	}
	for _, a := range s.Actions {
		if !slices.Contains(allActions, a) {
			return scope{}, fmt.Errorf("actions: %q is none of %v", a, allActions)
		}
		parsed.actions = append(parsed.actions, a)
	}
	return parsed, nil
}

// tokenSet is what the directory held when it was last read.
type tokenSet struct {
	tokens map[string]*token
	sums   map[string][sha256.Size]byte // of the files as they were read
	// unknown stands in for a password that does not exist, so that finding
	// out takes as long as for a wrong one.
	unknown clienttoken.Hash
}

// unknownPassword matches nothing, and takes as long for it as the slowest
// password of any token.
func unknownPassword(tokens map[string]*token) clienttoken.Hash {
	iterations := 0
	for _, t := range tokens {
		for _, p := range t.passwords {
			iterations = max(iterations, p.Iterations())
		}
	}
	return clienttoken.NoPassword(iterations)
}

// readTokens reads the directory. A file that cannot be used leaves the token
// as it was before, if it was there, and adds to the error; so does a directory
// that cannot be read. changed reports whether there was anything new.
func readTokens(dir string, before tokenSet) (now tokenSet, changed bool, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return before, false, fmt.Errorf("reading client tokens: %w", err)
	}
	now = tokenSet{tokens: make(map[string]*token), sums: make(map[string][sha256.Size]byte)}
	var errs []error
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), clienttoken.Extension)
		if !ok || strings.HasPrefix(name, ".") {
			continue // a mounted Secret keeps its own things beside
		}
		content, err := readLimited(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			now.sums[name] = sha256.Sum256(content)
			if now.sums[name] == before.sums[name] {
				if t := before.tokens[name]; t != nil {
					now.tokens[name] = t
				}
				continue
			}
			now.tokens[name], err = parseToken(name, content)
		}
		if err != nil {
			errs = append(errs, err)
			delete(now.tokens, name)
			if t := before.tokens[name]; t != nil {
				now.tokens[name] = t
			}
		}
	}
	now.unknown = unknownPassword(now.tokens)
	return now, !maps.Equal(now.sums, before.sums), errors.Join(errs...)
}

func readLimited(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Size() > maxTokenFile {
		return nil, fmt.Errorf("%s has %d bytes; a token's file has no more than %d", path, fi.Size(), maxTokenFile)
	}
	return os.ReadFile(path)
}
