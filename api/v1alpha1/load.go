package v1alpha1

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	kjson "sigs.k8s.io/json"
)

const (
	// maxDocument is a little less than what etcd takes.
	maxDocument = 1 << 20
	// maxNodes bounds what aliases can multiply a document to.
	maxNodes = 100_000
)

// Problem is one thing that is wrong with a document.
//
// +kubebuilder:object:generate=false
type Problem struct {
	File string
	// Line counts from 1.
	Line int
	// Field is the path of the field, such as spec.sync.schedule. Empty: the
	// document as a whole.
	Field string
	// Detail says what is wrong and what to do about it.
	Detail string
}

func (p *Problem) Error() string {
	if p.Field == "" {
		return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Detail)
	}
	return fmt.Sprintf("%s:%d: %s: %s", p.File, p.Line, p.Field, p.Detail)
}

// Load reads one ConnectedRegistry from data, the content of the YAML or JSON
// document called file, applies the defaults and validates it. The error joins
// a *Problem for everything that is wrong, in the order of the document:
//
//	FILE:LINE: spec.sync.schedule: "* * *" is not a cron schedule of five fields: use for example "*/5 * * * *"
func Load(file string, data []byte) (*ConnectedRegistry, error) {
	return load[ConnectedRegistry](file, Kind, data)
}

// document is a type that a file can hold.
type document[T any] interface {
	*T
	SetDefaults()
	Validate() field.ErrorList
}

// load reads one document of the kind from data.
func load[T any, D document[T]](file, kind string, data []byte) (D, error) {
	l := &loader{file: file, kind: kind, lines: make(map[string]int)}
	d := read[T, D](l, data)
	if len(l.problems) == 0 {
		return d, nil
	}
	slices.SortStableFunc(l.problems, func(a, b *Problem) int { return cmp.Compare(a.Line, b.Line) })
	errs := make([]error, len(l.problems))
	for i, p := range l.problems {
		errs[i] = p
	}
	return nil, errors.Join(errs...)
}

type loader struct {
	file     string
	kind     string // of the document
	problems []*Problem
	lines    map[string]int // where a field's value, or its key, stands
	nodes    int
}

func (l *loader) problem(line int, path, format string, args ...any) {
	l.problems = append(l.problems, &Problem{l.file, max(line, 1), path, fmt.Sprintf(format, args...)})
}

// read returns nil after reporting a problem.
func read[T any, D document[T]](l *loader, data []byte) D {
	root := l.parse(data)
	if root == nil || !l.isOfKind(root) {
		return nil
	}
	tree := l.value(root, reflect.TypeFor[T](), "")
	if l.nodes > maxNodes {
		l.problems = nil
		l.problem(root.Line, "", "has more than %d values: aliases multiply them", maxNodes)
	}
	if len(l.problems) > 0 {
		return nil
	}
	d := D(new(T))
	if err := decode(tree, d); err != nil {
		l.problem(root.Line, "", "%s", oneLine(err.Error()))
		return nil
	}
	d.SetDefaults()
	for _, e := range d.Validate() {
		l.problem(l.line(e.Field), e.Field, "%s", e.Detail)
	}
	return d
}

// parse returns the one document in data, nil after reporting a problem.
func (l *loader) parse(data []byte) *yaml.Node {
	if len(data) > maxDocument {
		l.problem(1, "", "is larger than %d bytes: is this the right file?", maxDocument)
		return nil
	}
	reader, err := yaml.NewLoader(bytes.NewReader(data))
	if err != nil {
		l.syntax(err)
		return nil
	}
	var doc yaml.Node
	if err := reader.Load(&doc); errors.Is(err, io.EOF) {
		l.problem(1, "", "is empty: write a %s, beginning with \"apiVersion: %s\"", l.kind, APIVersion)
		return nil
	} else if err != nil {
		l.syntax(err)
		return nil
	}
	var second yaml.Node
	if err := reader.Load(&second); err == nil && !emptyDocument(&second) {
		l.problem(content(&second).Line, "", "has a second document: only one %s is read", l.kind)
		return nil
	} else if err != nil && !errors.Is(err, io.EOF) {
		l.syntax(err)
		return nil
	}
	if emptyDocument(&doc) {
		l.problem(1, "", "is empty: write a %s, beginning with \"apiVersion: %s\"", l.kind, APIVersion)
		return nil
	}
	return content(&doc)
}

// content is what a document holds.
func content(doc *yaml.Node) *yaml.Node {
	if doc.Kind == yaml.DocumentNode && len(doc.Content) == 1 {
		return doc.Content[0]
	}
	return doc
}

func emptyDocument(doc *yaml.Node) bool {
	n := content(doc)
	return n.Kind == 0 || n.Kind == yaml.DocumentNode || n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

// syntax reports an error of the YAML parser. Its message can quote the name
// of an alias, which is what a password that begins with '*' looks like.
func (l *loader) syntax(err error) {
	line, message := 1, "is not YAML"
	if e, ok := errors.AsType[*yaml.LoadError](err); ok {
		line = e.Mark.Line
		message += ": " + oneLine(e.Message)
	}
	if strings.Contains(message, "anchor") {
		message = "is not YAML: an alias refers to nothing: put a value that begins with '*' or '&' in quotes"
	}
	l.problem(line, "", "%s", message)
}

// isOfKind checks what the document says it is, before anything else
// in it is looked at.
func (l *loader) isOfKind(root *yaml.Node) bool {
	if root.Kind != yaml.MappingNode {
		l.problem(root.Line, "", "is not a %s: it must begin with \"apiVersion: %s\"", l.kind, APIVersion)
		return false
	}
	for _, want := range []struct{ field, value string }{{"apiVersion", APIVersion}, {"kind", l.kind}} {
		node := child(root, want.field)
		switch {
		case node == nil:
			l.problem(root.Line, want.field, "is required: write \"%s: %s\"", want.field, want.value)
		case node.Kind != yaml.ScalarNode || node.Value != want.value:
			l.problem(node.Line, want.field, "must be %s", want.value)
		}
	}
	return len(l.problems) == 0
}

func child(mapping *yaml.Node, key string) *yaml.Node {
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		if mapping.Content[i].Value == key {
			return mapping.Content[i+1]
		}
	}
	return nil
}

// value checks a node against the type that it is to become, and returns it as
// encoding/json would decode it.
func (l *loader) value(n *yaml.Node, t reflect.Type, path string) any {
	if l.nodes++; l.nodes > maxNodes {
		return nil
	}
	if _, ok := l.lines[path]; !ok {
		l.lines[path] = n.Line
	}
	if n.Kind == yaml.AliasNode {
		return l.value(n.Alias, t, path)
	}
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" {
		return nil
	}
	if reflect.PointerTo(t).Implements(reflect.TypeFor[json.Unmarshaler]()) {
		return l.custom(n, t, path)
	}
	switch t.Kind() {
	case reflect.Struct:
		return l.object(n, t, path)
	case reflect.Map:
		return l.dictionary(n, t, path)
	case reflect.Slice:
		return l.list(n, t, path)
	default:
		return l.scalar(n, t, path)
	}
}

func (l *loader) object(n *yaml.Node, t reflect.Type, path string) any {
	if n.Kind != yaml.MappingNode {
		l.problem(n.Line, path, "must be a mapping with the fields %s", strings.Join(slices.Sorted(maps.Keys(fieldsOf(t))), ", "))
		return nil
	}
	fields := fieldsOf(t)
	out := make(map[string]any)
	l.pairs(n, path, func(key, value *yaml.Node) {
		ft, ok := fields[key.Value]
		if !ok {
			l.problem(key.Line, join(path, printable(key.Value)), "unknown field%s", suggestion(key.Value, path, fields))
			return
		}
		l.lines[join(path, key.Value)] = key.Line
		out[key.Value] = l.value(value, ft, join(path, key.Value))
	})
	return out
}

func (l *loader) dictionary(n *yaml.Node, t reflect.Type, path string) any {
	if n.Kind != yaml.MappingNode {
		l.problem(n.Line, path, "must be a mapping")
		return nil
	}
	out := make(map[string]any)
	l.pairs(n, path, func(key, value *yaml.Node) {
		out[key.Value] = l.value(value, t.Elem(), path+"["+printable(key.Value)+"]")
	})
	return out
}

// pairs calls f for every pair of a mapping whose key is a string that does not
// occur twice.
func (l *loader) pairs(n *yaml.Node, path string, f func(key, value *yaml.Node)) {
	seen := make(map[string]int)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		switch {
		case key.Kind == yaml.ScalarNode && key.ShortTag() == "!!merge":
			l.problem(key.Line, join(path, "<<"), "merge keys are not read: write the fields out")
		case key.Kind != yaml.ScalarNode || key.ShortTag() != "!!str":
			l.problem(key.Line, path, "has a key that is not a string: put it in quotes")
		case seen[key.Value] > 0:
			l.problem(key.Line, join(path, printable(key.Value)), "occurs twice: it is in line %d already", seen[key.Value])
		default:
			seen[key.Value] = key.Line
			f(key, value)
		}
	}
}

func (l *loader) list(n *yaml.Node, t reflect.Type, path string) any {
	if n.Kind != yaml.SequenceNode {
		l.problem(n.Line, path, `must be a list: begin each entry with "- "`)
		return nil
	}
	out := make([]any, 0, len(n.Content))
	for i, item := range n.Content {
		itemPath := path + "[" + strconv.Itoa(i) + "]"
		if resolved(item).Kind == yaml.ScalarNode && resolved(item).ShortTag() == "!!null" {
			l.problem(item.Line, itemPath, "is empty")
			continue
		}
		out = append(out, l.value(item, t.Elem(), itemPath))
	}
	return out
}

func resolved(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func (l *loader) scalar(n *yaml.Node, t reflect.Type, path string) any {
	if n.Kind != yaml.ScalarNode {
		l.problem(n.Line, path, "must be %s", kindName(t))
		return nil
	}
	switch t.Kind() {
	case reflect.String:
		if n.ShortTag() == "!!str" {
			return n.Value
		}
		l.problem(n.Line, path, "must be a string: put %s in quotes", quotable(n.Value, path))
	case reflect.Bool:
		var b bool
		if n.ShortTag() == "!!bool" && n.Decode(&b) == nil {
			return b
		}
		l.problem(n.Line, path, "must be true or false")
	default:
		i := reflect.New(t)
		if n.ShortTag() == "!!int" && n.Decode(i.Interface()) == nil {
			return i.Elem().Interface()
		}
		l.problem(n.Line, path, "must be %s", kindName(t))
	}
	return nil
}

// custom lets a type that reads its own JSON say what it takes.
func (l *loader) custom(n *yaml.Node, t reflect.Type, path string) any {
	v := l.plain(n)
	if data, err := json.Marshal(v); err == nil && json.Unmarshal(data, reflect.New(t).Interface()) == nil {
		return v
	}
	switch {
	case n.Kind == yaml.ScalarNode && t == reflect.TypeFor[resource.Quantity]():
		l.problem(n.Line, path, `%q is not a quantity: use for example "20Gi"`, n.Value)
	case n.Kind == yaml.ScalarNode && t == reflect.TypeFor[metav1.Time]():
		l.problem(n.Line, path, `%q is not a time: use for example "2026-01-31T12:00:00Z"`, n.Value)
	default:
		l.problem(n.Line, path, "must be %s", kindName(t))
	}
	return nil
}

// plain is a node as encoding/json would decode it, whatever it is to become.
func (l *loader) plain(n *yaml.Node) any {
	if l.nodes++; l.nodes > maxNodes {
		return nil
	}
	switch n.Kind {
	case yaml.AliasNode:
		return l.plain(n.Alias)
	case yaml.MappingNode:
		out := make(map[string]any)
		for i := 0; i+1 < len(n.Content); i += 2 {
			out[n.Content[i].Value] = l.plain(n.Content[i+1])
		}
		return out
	case yaml.SequenceNode:
		out := make([]any, len(n.Content))
		for i, item := range n.Content {
			out[i] = l.plain(item)
		}
		return out
	}
	var v any = n.Value
	switch n.ShortTag() {
	case "!!null":
		return nil
	case "!!bool":
		v = n.Value == "true"
	case "!!int", "!!float":
		if number := json.Number(n.Value); json.Valid([]byte(number)) {
			v = number
		}
	}
	return v
}

func kindName(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[resource.Quantity]():
		return `a quantity, for example "20Gi"`
	case t == reflect.TypeFor[metav1.Time]():
		return `a time, for example "2026-01-31T12:00:00Z"`
	}
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int32, reflect.Int64:
		return "a whole number"
	}
	return "something else: see the documentation of this field"
}

// fieldsOf gives the types of a struct's fields by their names in JSON.
func fieldsOf(t reflect.Type) map[string]reflect.Type {
	fields := make(map[string]reflect.Type)
	for f := range t.Fields() {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case strings.Contains(options, "inline"):
			maps.Copy(fields, fieldsOf(f.Type))
		case name != "" && name != "-":
			fields[name] = f.Type
		}
	}
	return fields
}

// suggestion points to the field that was probably meant: one with nearly this
// name here, else one with exactly this name elsewhere in the spec.
func suggestion(key, path string, fields map[string]reflect.Type) string {
	if near := nearest(key, slices.Sorted(maps.Keys(fields))); near != "" {
		return fmt.Sprintf(": did you mean %s?", near)
	}
	if where := elsewhere(key, reflect.TypeFor[Spec](), "spec"); where != "" && where != join(path, key) {
		return fmt.Sprintf(": did you mean %s?", where)
	}
	return ": the fields here are " + strings.Join(slices.Sorted(maps.Keys(fields)), ", ")
}

// elsewhere finds a field of t, or below it, by its name.
func elsewhere(key string, t reflect.Type, path string) string {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() == reflect.Slice {
		return elsewhere(key, t.Elem(), path+"[]")
	}
	if t.Kind() != reflect.Struct || t.PkgPath() != reflect.TypeFor[Spec]().PkgPath() {
		return ""
	}
	fields := fieldsOf(t)
	names := slices.Sorted(maps.Keys(fields))
	for _, name := range names {
		if strings.EqualFold(name, key) {
			return join(path, name)
		}
	}
	for _, name := range names {
		if where := elsewhere(key, fields[name], join(path, name)); where != "" {
			return where
		}
	}
	return ""
}

// nearest is the name that key is a likely misspelling of, or "".
func nearest(key string, names []string) string {
	best, least := "", min(len(key)/3, 3)+1
	for _, name := range names {
		if d := editDistance(strings.ToLower(key), strings.ToLower(name)); d < least {
			best, least = name, d
		}
	}
	return best
}

// editDistance counts the insertions, deletions and substitutions that make b
// out of a. Long strings are far from everything.
func editDistance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// line is where a field stands, or the nearest thing around it that is there.
func (l *loader) line(path string) int {
	for path != "" {
		if line, ok := l.lines[path]; ok {
			return line
		}
		path = path[:max(strings.LastIndexAny(path, ".["), 0)]
	}
	return l.lines[""]
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

var plainKey = regexp.MustCompile(`\A[A-Za-z0-9._/-]{1,64}\z`)

// printable is a key as it can stand in a one-line message.
func printable(key string) string {
	if plainKey.MatchString(key) {
		return key
	}
	if len(key) > 32 {
		key = key[:32] + "…"
	}
	return strconv.Quote(key)
}

// quotable is a value as it can stand in a message, unless it could be a secret
// that was written where a Secret's name belongs.
func quotable(value, path string) string {
	if strings.HasSuffix(strings.ToLower(path), "secretref.name") {
		return "it"
	}
	return printable(value)
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// decode makes the resource out of the checked tree. It is strict once more, so
// that a field which the checks do not know cannot pass unnoticed.
func decode(tree, into any) error {
	data, err := json.Marshal(tree)
	if err != nil {
		return err
	}
	strict, err := kjson.UnmarshalStrict(data, into)
	return errors.Join(append(strict, err)...)
}
