package trust

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// Lines of ours around what is put into an operator's file.
const (
	blockBegin = "# connected-registry: begin"
	blockEnd   = "# connected-registry: end"
	mergedHead = Marker + ` It keeps what was in this file before and puts its own
# hosts first. Changes are undone; "connected-registry agent cleanup" restores the former file.
`
	setAside = "# set aside: "
	keptHead = "\n# What was in this file before:\n"
)

func unreadable(err error) string {
	return fmt.Sprintf("the hosts.toml that was there is not one that containerd reads (%v): it is kept as a comment", err)
}

// merge puts ours before what an operator has. Their text stays as it is, in
// order and with its comments, as far as TOML allows: a file whose hosts are
// written inline, or which containerd cannot read, is kept as a comment. notes
// say what of theirs or ours does not take effect.
//
// Their top-level settings (server and what belongs to it) win over ours,
// unless ours are [ServerOnly].
func (h Hosts) merge(f foreign) (merged []byte, notes []string, err error) {
	if err := h.validate(); err != nil {
		return nil, nil, err
	}
	hadTop := f.top
	notes = h.settle(&f)
	if merged, ok := h.insertInto(f, hadTop && !f.top); ok {
		return merged, notes, nil
	}
	merged, err = h.renderWith(f)
	return merged, notes, err
}

// foreign is an operator's configuration of a registry: a hosts.toml, or the
// certificate files of a directory that has none.
type foreign struct {
	text   []byte      // the file; nil if there was none
	mode   fs.FileMode // of the file
	hops   []foreignHop
	server foreignHop
	// top says that there are settings for server, be it without a URL.
	top bool
	// tables is the offset of the first table, len(text) if there is none.
	tables int
	// insertable: all hosts are in their usual form, so that tables of ours
	// may be put at tables.
	insertable bool
	// header: the server's headers are a table, which may be anywhere.
	header bool
}

type foreignHop struct {
	url    string
	fields hopFields
}

// hopFields are containerd's settings of one host, by its documentation and
// hostFileConfig in core/remotes/docker/config. Other keys it ignores.
type hopFields struct {
	Capabilities []string       `toml:"capabilities,omitempty"`
	CA           any            `toml:"ca,omitempty"`
	Client       any            `toml:"client,omitempty"`
	SkipVerify   *bool          `toml:"skip_verify,omitempty"`
	Header       map[string]any `toml:"header,omitempty"`
	OverridePath bool           `toml:"override_path,omitempty"`
	DialTimeout  string         `toml:"dial_timeout,omitempty"`
}

// parseForeign reads a hosts.toml as containerd does, and takes the inline
// spellings of hosts as well, which containerd 1.7 does and 2.3 does not.
func parseForeign(text []byte) (foreign, error) {
	var file struct {
		hopFields
		Server string               `toml:"server"`
		Hosts  map[string]hopFields `toml:"host"`
	}
	if err := toml.Unmarshal(text, &file); err != nil {
		return foreign{}, errors.New("it is not valid TOML")
	}
	f := foreign{text: text, server: foreignHop{file.Server, file.hopFields}}
	order := f.scan()
	for _, u := range order {
		f.hops = append(f.hops, foreignHop{u, file.Hosts[u]})
	}
	if len(f.hops) != len(file.Hosts) {
		return foreign{}, errors.New("its hosts are written in a form that is not known")
	}
	for _, h := range append(slices.Clone(f.hops), f.server) {
		if err := h.check(); err != nil {
			return foreign{}, err
		}
	}
	return f, nil
}

// scan walks over the expressions of a valid file. It returns the hosts in
// their order, and finds out where tables begin and whether tables of ours
// may be put there.
func (f *foreign) scan() (order []string) {
	var p unstable.Parser
	p.Reset(f.text)
	f.tables, f.insertable = len(f.text), true
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		parts, offset := keyParts(e)
		if e.Kind == unstable.KeyValue {
			parts = slices.Concat(table, parts)
			if len(table) < 2 && parts[0] == "host" {
				f.insertable = false
			}
		} else {
			if len(table) == 0 {
				f.tables = min(f.tables, lineStart(f.text, offset))
			}
			table = parts
		}
		f.top = f.top || slices.ContainsFunc(serverKeys, func(k string) bool { return strings.EqualFold(k, parts[0]) })
		if parts[0] == "header" && e.Kind != unstable.KeyValue {
			f.header = true
		}
		if parts[0] != "host" {
			continue
		}
		urls := parts[1:min(2, len(parts))]
		if len(parts) == 1 && e.Kind == unstable.KeyValue {
			urls = inlineKeys(e.Value())
		}
		for _, u := range urls {
			if !slices.Contains(order, u) {
				order = append(order, u)
			}
		}
	}
	return order
}

// serverKeys are the top-level settings. go-toml takes them in any case.
var serverKeys = []string{"server", "capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout"}

func keyParts(e *unstable.Node) (parts []string, offset int) {
	offset = -1
	for it := e.Key(); it.Next(); {
		n := it.Node()
		if offset < 0 {
			offset = int(n.Raw.Offset)
		}
		parts = append(parts, string(n.Data))
	}
	return parts, offset
}

// inlineKeys are the first parts of the keys in an inline table.
func inlineKeys(value *unstable.Node) (keys []string) {
	if value.Kind != unstable.InlineTable {
		return nil
	}
	for it := value.Children(); it.Next(); {
		if parts, _ := keyParts(it.Node()); len(parts) > 0 {
			keys = append(keys, parts[0])
		}
	}
	return keys
}

func lineStart(text []byte, offset int) int {
	return bytes.LastIndexByte(text[:offset], '\n') + 1
}

// check refuses what makes containerd refuse the whole file.
func (h foreignHop) check() error {
	if h.url != "" {
		s := h.url
		if !strings.HasPrefix(s, "http") {
			s = "https://" + s
		}
		if _, err := url.Parse(s); err != nil {
			return errors.New("one of its URLs does not parse")
		}
	}
	for _, c := range h.fields.Capabilities {
		if !slices.Contains([]string{Pull, Resolve, Push, "referrers"}, strings.ToLower(c)) {
			return fmt.Errorf("it has the unknown capability %.40q", c)
		}
	}
	if _, err := h.fields.caFiles(); err != nil {
		return err
	}
	if _, err := h.fields.clientPairs(); err != nil {
		return err
	}
	for _, v := range h.fields.Header {
		if _, err := stringList(v); err != nil {
			return errors.New("one of its headers is neither text nor a list of texts")
		}
	}
	if h.fields.DialTimeout != "" {
		if _, err := time.ParseDuration(h.fields.DialTimeout); err != nil {
			return errors.New("one of its dial timeouts does not parse")
		}
	}
	return nil
}

// caFiles are the paths in "ca", relative ones as they are.
func (f hopFields) caFiles() ([]string, error) {
	if f.CA == nil {
		return nil, nil
	}
	files, err := stringList(f.CA)
	if err != nil {
		return nil, errors.New(`one of its "ca" settings is neither a path nor a list of paths`)
	}
	return files, nil
}

// clientPairs are the paths in "client"; the second is empty where one file
// holds certificate and key.
func (f hopFields) clientPairs() ([][2]string, error) {
	bad := errors.New(`one of its "client" settings is not of a form that containerd takes`)
	switch c := f.Client.(type) {
	case nil:
		return nil, nil
	case string:
		return [][2]string{{c}}, nil
	case []any:
		var pairs [][2]string
		for _, v := range c {
			if s, ok := v.(string); ok {
				pairs = append(pairs, [2]string{s})
				continue
			}
			l, err := stringList(v)
			if err != nil || len(l) != 2 {
				return nil, bad
			}
			pairs = append(pairs, [2]string{l[0], l[1]})
		}
		return pairs, nil
	}
	return nil, bad
}

func stringList(v any) ([]string, error) {
	switch v := v.(type) {
	case string:
		return []string{v}, nil
	case []any:
		list := make([]string, len(v))
		for i, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, errors.New("not a text")
			}
			list[i] = s
		}
		return list, nil
	}
	return nil, errors.New("neither a text nor a list")
}

// certificateFiles is what containerd makes of a directory without hosts.toml:
// Docker's layout, where *.crt are roots and *.cert with *.key client pairs,
// all for the registry itself.
func certificateFiles(names []string) foreign {
	var ca, client []any
	for _, n := range names {
		switch path.Ext(n) {
		case ".crt":
			ca = append(ca, n)
		case ".cert":
			key := strings.TrimSuffix(n, ".cert") + ".key"
			if slices.Contains(names, key) {
				client = append(client, []any{n, key})
			} else {
				client = append(client, n)
			}
		}
	}
	var f foreign
	if ca != nil {
		f.server.fields.CA, f.top = ca, true
	}
	if client != nil {
		f.server.fields.Client, f.top = client, true
	}
	return f
}

// settle decides between our server and theirs, as [Merge] says, and returns
// the notes about it. Afterwards theirs counts only if f.top is set.
func (h Hosts) settle(f *foreign) (notes []string) {
	if !f.top {
		return nil
	}
	switch {
	case h.Role == ServerOnly:
		f.server, f.top = foreignHop{}, false
		notes = append(notes, "the server in the hosts.toml that was there is set aside, since no fallback is allowed for this registry")
	case h.Role == ServerUpstream && h.Server.URL != "":
		notes = append(notes, fmt.Sprintf("the hosts.toml that was there names where the registry is, so %s is not used", h.Server.URL))
	}
	return notes
}

// beside returns our hops as they are written next to theirs: with the server
// among them if it must be asked and theirs is last, and spelled so that no
// key occurs twice, which would make the whole file invalid.
func (h Hosts) beside(f foreign) Hosts {
	hops := slices.Clone(h.Hops)
	if f.top && h.Role == ServerOwn {
		hops = append(hops, h.Server)
	}
	taken := make(map[string]bool)
	for _, t := range f.hops {
		taken[t.url] = true
	}
	h.Hops = nil
	for _, hop := range hops {
		// containerd appends /v2 where it is missing: the same address.
		if taken[hop.URL] && !strings.HasSuffix(hop.URL, "/v2") {
			hop.URL += "/v2"
		}
		if !taken[hop.URL] {
			h.Hops = append(h.Hops, hop)
		}
		taken[hop.URL] = true
	}
	return h
}

// insertInto puts our tables into their text and reports whether that gives
// what was meant. With aside, their top-level settings become comments.
func (h Hosts) insertInto(f foreign, aside bool) (merged []byte, ok bool) {
	if !f.insertable || aside && f.header {
		return nil, false
	}
	head, comment := cutTrailingComment(string(f.text[:f.tables]))
	if aside {
		head = commentOut(head)
	}
	ours := h.beside(f)

	var b strings.Builder
	b.WriteString(mergedHead)
	b.WriteString(head)
	if head != "" && !strings.HasSuffix(head, "\n") {
		b.WriteString("\n")
	}
	b.WriteString(blockBegin + "\n")
	if !f.top {
		b.WriteString(ours.renderServer())
	}
	b.WriteString(ours.renderHops())
	if len(ours.Hops)+len(f.hops) == 0 {
		b.WriteString("\n[host]\n")
	}
	b.WriteString(blockEnd + "\n")
	b.WriteString(comment)
	b.Write(f.text[f.tables:])
	merged = []byte(b.String())
	return merged, ours.isMerged(merged, f)
}

// isMerged reads a merged file again: our hops, then theirs, and one server.
func (h Hosts) isMerged(merged []byte, theirs foreign) bool {
	got, err := parseForeign(merged)
	if err != nil || len(got.hops) != len(h.Hops)+len(theirs.hops) {
		return false
	}
	for i, hop := range h.Hops {
		if got.hops[i].url != hop.URL {
			return false
		}
	}
	for i, hop := range theirs.hops {
		if got.hops[len(h.Hops)+i].url != hop.url {
			return false
		}
	}
	if theirs.top {
		return got.server.url == theirs.server.url
	}
	return got.server.url == h.Server.URL
}

// cutTrailingComment separates the comment lines right above the first table,
// which belong to it, from what comes before.
func cutTrailingComment(head string) (before, comment string) {
	cut := len(head)
	for cut > 0 {
		start := strings.LastIndexByte(head[:cut-1], '\n') + 1
		if !strings.HasPrefix(strings.TrimSpace(head[start:cut]), "#") {
			break
		}
		cut = start
	}
	return head[:cut], head[cut:]
}

// commentOut makes comments of all lines that are not.
func commentOut(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if trimmed := strings.TrimSpace(line); trimmed != "" && !strings.HasPrefix(trimmed, "#") {
			b.WriteString(setAside)
		}
		b.WriteString(line)
	}
	return b.String()
}

// renderWith writes a file anew from ours and theirs, with their text, if there
// is one, as a comment at the end. settle must have been called on f.
func (h Hosts) renderWith(f foreign) ([]byte, error) {
	ours := h.beside(f)
	var b bytes.Buffer
	b.WriteString(header)
	if f.top {
		b.WriteString("\n")
		if err := f.server.render(&b, ""); err != nil {
			return nil, err
		}
	} else {
		b.WriteString(ours.renderServer())
	}
	if len(ours.Hops)+len(f.hops) == 0 {
		b.WriteString("\n[host]\n")
	}
	b.WriteString(ours.renderHops())
	for _, hop := range f.hops {
		table := "host." + quoteKey(hop.url)
		fmt.Fprintf(&b, "\n[%s]\n", table)
		if err := hop.render(&b, table+"."); err != nil {
			return nil, err
		}
	}
	if len(f.text) > 0 {
		b.WriteString(keptHead)
		for line := range strings.Lines(string(f.text)) {
			b.WriteString("# " + plainLine(line) + "\n")
		}
	}
	if !ours.isMerged(b.Bytes(), f) {
		return nil, errors.New("the hosts.toml that was there cannot be merged: simplify it, or remove it")
	}
	return b.Bytes(), nil
}

// render writes the settings of a table whose subtables are named prefix + key;
// at the top level, with the empty prefix, the server's URL as well.
func (h foreignHop) render(b *bytes.Buffer, prefix string) error {
	if prefix == "" && h.url != "" {
		fmt.Fprintf(b, "server = %s\n", quoteKey(h.url))
	}
	flat := h.fields
	flat.Header = nil
	out, err := toml.Marshal(flat)
	if err != nil {
		return err
	}
	b.Write(out)
	if len(h.fields.Header) == 0 {
		return nil
	}
	fmt.Fprintf(b, "[%sheader]\n", prefix)
	for _, k := range slices.Sorted(maps.Keys(h.fields.Header)) {
		out, err := toml.Marshal(map[string]any{k: h.fields.Header[k]})
		if err != nil {
			return err
		}
		b.Write(out)
	}
	return nil
}

// quoteKey writes any text as a TOML basic string.
func quoteKey(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// plainLine makes a line fit for a TOML comment, which takes no control
// characters but the tab.
func plainLine(line string) string {
	return strings.Map(func(r rune) rune {
		if r != '\t' && unicode.IsControl(r) || r == unicode.ReplacementChar {
			return '?'
		}
		return r
	}, strings.TrimRight(line, "\r\n"))
}

// unmerge takes our lines out of a merged file, for when the record of what was
// there is lost. It is empty for a file that was wholly ours.
func unmerge(text []byte) []byte {
	if _, kept, ok := bytes.Cut(text, []byte(keptHead)); ok {
		var b bytes.Buffer
		for line := range bytes.Lines(kept) {
			b.Write(bytes.TrimPrefix(line, []byte("# ")))
		}
		return b.Bytes()
	}
	rest, ok := bytes.CutPrefix(text, []byte(mergedHead))
	if !ok {
		return nil
	}
	before, rest, ok := bytes.Cut(rest, []byte(blockBegin+"\n"))
	if !ok {
		return nil
	}
	_, after, ok := bytes.Cut(rest, []byte(blockEnd+"\n"))
	if !ok {
		return nil
	}
	return slices.Concat(bytes.ReplaceAll(before, []byte(setAside), nil), after)
}

// bearsMarker reports whether a file was written by us, be it changed since.
func bearsMarker(text []byte) bool { return bytes.HasPrefix(text, []byte(Marker)) }
