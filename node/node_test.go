package node

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
)

var update = flag.Bool("update", false, "write the golden files")

// fixture is a node laid out in a directory.
type fixture struct {
	name    string
	dir     string
	version Version
	files   []txtar.File
}

// fixtures are the nodes in testdata/nodes.
func fixtures(t testing.TB) []fixture {
	t.Helper()
	names, err := filepath.Glob("testdata/nodes/*.txtar")
	if err != nil || len(names) == 0 {
		t.Fatal("no fixtures", err)
	}
	var all []fixture
	for _, name := range names {
		archive, err := txtar.ParseFile(name)
		if err != nil {
			t.Fatal(err)
		}
		first, _, _ := strings.Cut(string(archive.Comment), "\n")
		version, ok := strings.CutPrefix(first, "containerd: ")
		if !ok {
			t.Fatalf("%s: the first line does not say which containerd", name)
		}
		all = append(all, fixture{name: strings.TrimSuffix(filepath.Base(name), ".txtar"), version: parseVersion(version), files: archive.Files})
	}
	return all
}

// lay writes the files of a node.
func (f *fixture) lay(t testing.TB) {
	t.Helper()
	f.dir = t.TempDir()
	for _, file := range f.files {
		name := filepath.Join(f.dir, file.Name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, file.Data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// look describes the node as it is now.
func (f *fixture) look(t testing.TB) (Detection, Plan) {
	t.Helper()
	root, err := os.OpenRoot(f.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	r := rootFiles{root}
	l, marker := findLayout(r)
	runtime := Finding{Name: "runtime", Value: "containerd " + f.version.Text, Verdict: OK}
	if !f.version.known() {
		runtime = Finding{Name: "runtime", Value: "unknown version", Verdict: Warning}
	}
	d := describe(r, l, marker, f.version, runtime)
	return d, plan(r, d)
}

func (f *fixture) tree(t testing.TB) map[string]string {
	t.Helper()
	tree := map[string]string{}
	err := filepath.WalkDir(f.dir, func(name string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		data, err := os.ReadFile(name)
		rel, _ := filepath.Rel(f.dir, name)
		tree["/"+rel] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// TestNodes compares what is found out and planned for each node with its
// golden file, and carries the plan out: then there is nothing left to plan.
func TestNodes(t *testing.T) {
	for _, f := range fixtures(t) {
		t.Run(f.name, func(t *testing.T) {
			f.lay(t)
			before := f.tree(t)
			d, p := f.look(t)
			if diff := cmp.Diff(before, f.tree(t)); diff != "" {
				t.Errorf("looking changed the node (-before +after):\n%s", diff)
			}
			golden(t, filepath.Join("testdata/golden", f.name+".txt"), report(t, d, p, before))
			if p.File == "" {
				return
			}
			name := filepath.Join(f.dir, p.File)
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, p.Data, 0o644); err != nil {
				t.Fatal(err)
			}
			if d, p := f.look(t); !d.readsHosts || p.File != "" || len(p.Steps) > 0 {
				t.Errorf("after the plan: %+v\n%+v", d.Findings, p)
			}
		})
	}
}

// report is what a golden file holds: the findings, the steps, and the lines of
// the file that change.
func report(t testing.TB, d Detection, p Plan, before map[string]string) string {
	t.Helper()
	var b strings.Builder
	for _, f := range d.Findings {
		fmt.Fprintf(&b, "%-8s %s: %s\n", f.Verdict, f.Name, f.Value)
		if f.Evidence != nil {
			fmt.Fprintf(&b, "         from %s\n", f.Evidence)
		}
		if f.Remedy != "" {
			fmt.Fprintf(&b, "         %s\n", f.Remedy)
		}
	}
	fmt.Fprintf(&b, "certs.d: %s\n", d.CertsDir)
	for _, s := range p.Steps {
		fmt.Fprintf(&b, "step: %s\n", s)
	}
	if p.File != "" {
		fmt.Fprintf(&b, "write: %s\n%s", p.File, lineDiff(before[p.File], string(p.Data)))
	}
	encoded, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	if len(encoded) > 4096 {
		t.Errorf("%d bytes of JSON are too many for an annotation", len(encoded))
	}
	return b.String()
}

// lineDiff shows the lines that are only in one of two texts of which one or a
// few lines differ.
func lineDiff(before, after string) string {
	a, b := strings.SplitAfter(before, "\n"), strings.SplitAfter(after, "\n")
	for len(a) > 0 && len(b) > 0 && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && a[len(a)-1] == b[len(b)-1] {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	var out strings.Builder
	write(&out, "-", a)
	write(&out, "+", b)
	return out.String()
}

func write(out *strings.Builder, sign string, lines []string) {
	for _, l := range slices.DeleteFunc(lines, func(l string) bool { return l == "" }) {
		fmt.Fprintf(out, "%s%s\n", sign, strings.TrimSuffix(l, "\n"))
	}
}

func golden(t testing.TB, name, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}
