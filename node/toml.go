package node

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// file is one parsed file of containerd's configuration.
type file struct {
	name    string
	data    []byte
	version int
	imports []string
	// leaves are all values but those inside arrays, by their path.
	leaves map[string]leaf
	// maps are all tables, written out or implied, by their path.
	maps map[string]bool
	// tables are the headers, by their path.
	tables map[string]place
}

// place is where something stands in a file.
type place struct {
	line       int // from 1
	start, end int // bytes, of a value; of a header: end is where its line ends
}

// leaf is one value of a file.
type leaf struct {
	path  []string
	value any // as go-toml decodes it
	place
}

// at is the key of a path in a map.
func at(path ...string) string { return strings.Join(path, "\x00") }

// parse reads a file as containerd does. An error means that containerd would
// not take it either.
func parse(name string, data []byte) (*file, error) {
	var tree map[string]any
	if err := toml.Unmarshal(data, &tree); err != nil {
		if d, ok := errors.AsType[*toml.DecodeError](err); ok {
			line, _ := d.Position()
			return nil, fmt.Errorf("%s:%d: %w", name, line, err)
		}
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	f := &file{name: name, data: data, leaves: map[string]leaf{}, maps: map[string]bool{}, tables: map[string]place{}}
	switch v := tree["version"].(type) {
	case nil:
	case int64:
		f.version = int(v)
	default:
		return nil, fmt.Errorf("%s: version is not a number", name)
	}
	imports, _ := tree["imports"].([]any)
	for _, i := range imports {
		s, ok := i.(string)
		if !ok {
			return nil, fmt.Errorf("%s: imports holds something that is not a path", name)
		}
		f.imports = append(f.imports, s)
	}
	places, err := f.locate()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	f.flatten(nil, tree, places)
	return f, nil
}

// flatten collects the leaves of a tree.
func (f *file) flatten(path []string, tree map[string]any, places map[string]place) {
	for key, value := range tree {
		here := append(slices.Clip(path), key)
		if sub, ok := value.(map[string]any); ok {
			f.maps[at(here...)] = true
			f.flatten(here, sub, places)
			continue
		}
		p := places[at(here...)]
		for up := len(here) - 1; p.line == 0 && up > 0; up-- {
			// Inside an inline table: the line of what holds it.
			p = place{line: places[at(here[:up]...)].line}
		}
		f.leaves[at(here...)] = leaf{path: here, value: value, place: p}
	}
}

// locate finds where keys and tables stand.
func (f *file) locate() (map[string]place, error) {
	places := map[string]place{}
	var p unstable.Parser
	p.Reset(f.data)
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			var start int
			table, start = keys(e)
			if e.Kind == unstable.Table {
				f.tables[at(table...)] = place{line: f.line(start), start: start, end: f.lineEnd(start)}
				continue
			}
			table = append(table, "[]")
		case unstable.KeyValue:
			key, start := keys(e)
			here := place{line: f.line(start)}
			if raw := e.Value().Raw; raw.Length > 0 {
				here.start, here.end = int(raw.Offset), int(raw.Offset+raw.Length)
			}
			places[at(append(slices.Clip(table), key...)...)] = here
		}
	}
	return places, p.Error()
}

// keys are the parts of an expression's key, and the offset of the first.
func keys(e *unstable.Node) (parts []string, start int) {
	for it := e.Key(); it.Next(); {
		if parts == nil {
			start = int(it.Node().Raw.Offset)
		}
		parts = append(parts, string(it.Node().Data))
	}
	return parts, start
}

func (f *file) line(offset int) int { return 1 + bytes.Count(f.data[:offset], []byte("\n")) }

// lineEnd is the offset after the line in which offset lies.
func (f *file) lineEnd(offset int) int {
	if i := bytes.IndexByte(f.data[offset:], '\n'); i >= 0 {
		return offset + i + 1
	}
	return len(f.data)
}

// dotted writes a path as TOML does.
func dotted(path []string) string {
	parts := make([]string, len(path))
	for i, p := range path {
		parts[i] = p
		if strings.ContainsFunc(p, func(r rune) bool {
			return r != '_' && r != '-' && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z')
		}) || p == "" {
			parts[i] = strconv.Quote(p)
		}
	}
	return strings.Join(parts, ".")
}
