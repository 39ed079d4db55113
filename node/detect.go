package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/connected-registry/connected-registry/trust"
)

// Verdict is what a finding means for pulls through the registry.
type Verdict string

// Verdicts, the better first.
const (
	OK      Verdict = "ok"
	Warning Verdict = "warning"
	Fault   Verdict = "fault"
)

func (v Verdict) worse(o Verdict) bool {
	rank := map[Verdict]int{OK: 0, Warning: 1, Fault: 2}
	return rank[v] > rank[o]
}

// Finding is one thing that was found out about a node.
type Finding struct {
	// Name of what was looked at: "configuration", "config_path", …
	Name string `json:"name"`
	// Value that it has, for a person.
	Value   string  `json:"value"`
	Verdict Verdict `json:"verdict"`
	// Evidence is where the value is from.
	Evidence *Evidence `json:"evidence,omitempty"`
	// Remedy is what to do. Empty if nothing is.
	Remedy string `json:"remedy,omitempty"`
}

// Evidence is where something was read: paths are inside the node root.
type Evidence struct {
	File  string `json:"file"`
	Line  int    `json:"line,omitempty"`
	Key   string `json:"key,omitempty"`
	Value string `json:"value,omitempty"`
}

// String is file:line: key = value, as far as known.
func (e Evidence) String() string {
	s := e.File
	if e.Line > 0 {
		s += fmt.Sprintf(":%d", e.Line)
	}
	if e.Key != "" {
		s += ": " + e.Key
	}
	if e.Value != "" {
		s += " = " + e.Value
	}
	return s
}

// Detection is what was found out about a node.
type Detection struct {
	// Distribution of Kubernetes: "K3s", "RKE2", "MicroK8s", "kind", "AKS",
	// "kubeadm" or "plain containerd".
	Distribution string `json:"distribution"`
	// Version of containerd, empty if unknown.
	Version string `json:"version,omitempty"`
	// CertsDir is the hosts directory that containerd reads, or would if it
	// read any, inside the node root.
	CertsDir string `json:"certsDir"`
	// Reserved are registries whose directories the distribution looks after,
	// and that have to be left alone.
	Reserved []string `json:"reserved,omitempty"`
	// Verdict is the worst of the findings'.
	Verdict  Verdict   `json:"verdict"`
	Findings []Finding `json:"findings"`

	layout     layout
	version    Version
	configFile string
	config     *config // nil if it is not understood
	readsHosts bool    // containerd reads CertsDir
}

func (d *Detection) find(f Finding) {
	if f.Verdict.worse(d.Verdict) {
		d.Verdict = f.Verdict
	}
	d.Findings = append(d.Findings, f)
}

// Finding returns the finding of a name, and whether there is one.
func (d *Detection) Finding(name string) (Finding, bool) {
	for _, f := range d.Findings {
		if f.Name == name {
			return f, true
		}
	}
	return Finding{}, false
}

// Detect looks at the node whose file system is at nodeRoot ("/" for the one it
// runs on) and changes nothing. A running runtime is asked for its version. An
// error means that nodeRoot cannot be opened; everything else is a finding.
func Detect(ctx context.Context, nodeRoot string) (Detection, error) {
	root, err := os.OpenRoot(nodeRoot)
	if err != nil {
		return Detection{}, fmt.Errorf("node root %s: %w: give another with --node-root", nodeRoot, err)
	}
	defer root.Close()
	r := rootFiles{root}
	l, marker := findLayout(r)
	v, runtime := findRuntime(ctx, nodeRoot, r, l)
	return describe(r, l, marker, v, runtime), nil
}

// CertsDir returns the hosts directory that containerd reads on a node, as a
// path inside nodeRoot. Errors are those of [Detect].
func CertsDir(ctx context.Context, nodeRoot string) (string, error) {
	d, err := Detect(ctx, nodeRoot)
	return d.CertsDir, err
}

// socketPath is where a node's runtime is reached from here.
func socketPath(nodeRoot string, r rootFiles, l layout) (name string, ok bool) {
	for _, s := range l.sockets {
		real, err := trust.ResolvePath(r.root, s)
		if err == nil && r.exists(s) {
			return filepath.Join(nodeRoot, real), true
		}
	}
	return "", false
}

// findRuntime finds the version: by asking, by the executable, or not at all.
func findRuntime(ctx context.Context, nodeRoot string, r rootFiles, l layout) (Version, Finding) {
	if socket, ok := socketPath(nodeRoot, r, l); ok {
		if name, v, err := askRuntime(ctx, socket); err == nil {
			return v, Finding{Name: "runtime", Value: name + " " + v.Text, Verdict: OK, Evidence: &Evidence{File: l.sockets[0], Key: "answer"}}
		}
	}
	for _, b := range l.binaries {
		if v, from, ok := binaryVersion(r.root, b); ok {
			return v, Finding{Name: "runtime", Value: "containerd " + v.Text + ", not running or out of reach", Verdict: OK, Evidence: &Evidence{File: b, Key: from}}
		}
	}
	return Version{}, Finding{Name: "runtime", Value: "unknown version", Verdict: Warning,
		Remedy: "the worst of all versions is assumed: mount " + path.Dir(l.sockets[0]) + " of the node to have the runtime asked"}
}

func askRuntime(ctx context.Context, socket string) (string, Version, error) {
	rt, err := Connect(socket)
	if err != nil {
		return "", Version{}, err
	}
	defer rt.Close()
	name, v, err := rt.Version(ctx)
	if err == nil && name != "containerd" {
		err = fmt.Errorf("the runtime is %s", name)
	}
	return name, v, err
}

// describe is all of Detect that depends on files alone.
func describe(r rootFiles, l layout, marker string, v Version, runtime Finding) Detection {
	d := Detection{Distribution: l.name, Version: v.Text, CertsDir: l.certsDir, Verdict: OK, layout: l, version: v}
	distribution := Finding{Name: "distribution", Value: l.name, Verdict: OK}
	if marker != "" {
		distribution.Evidence = &Evidence{File: marker}
	}
	d.find(distribution)
	if !isWhole(r) {
		d.find(Finding{Name: "node root", Value: "only part of the node's file system", Verdict: Warning,
			Remedy: "mount the node's whole root to have all of it looked at"})
	}
	d.findSystem(r)
	d.find(runtime)
	d.findConfiguration(r)
	d.findReserved(r)
	d.findRegistries(r)
	return d
}

// isWhole reports whether the root is all of a node's file system, and not some
// directories of it.
func isWhole(r rootFiles) bool { return r.exists("/usr") }

func (d *Detection) findSystem(r rootFiles) {
	name, from, store, program := findSystem(r)
	if name == "" {
		name, from = "unknown", ""
	}
	f := Finding{Name: "operating system", Value: name, Verdict: OK}
	if from != "" {
		f.Evidence = &Evidence{File: from}
	}
	d.find(f)
	if store == "" {
		d.find(Finding{Name: "system trust store", Value: "none that is known", Verdict: Warning,
			Remedy: "pulls do not need it; give other programs on the node the CA by other means"})
		return
	}
	d.find(Finding{Name: "system trust store", Value: store, Verdict: OK, Evidence: &Evidence{File: program}})
}

func (d *Detection) findConfiguration(r rootFiles) {
	var found bool
	d.configFile, found = firstOf(r, d.layout.configs)
	if !found {
		d.findNoConfiguration(r)
		return
	}
	c, err := loadConfig(r, d.configFile, d.version)
	if err != nil {
		// containerd takes no part of a configuration of which it cannot read all.
		d.find(Finding{Name: "configuration", Value: err.Error(), Verdict: Fault, Evidence: &Evidence{File: d.configFile},
			Remedy: "containerd does not start with it: put it right by hand"})
		return
	}
	if why := c.unclear(); why != "" {
		d.find(Finding{Name: "configuration", Value: "not understood", Verdict: Fault, Evidence: &Evidence{File: d.configFile}, Remedy: why})
		return
	}
	d.config = c
	names := make([]string, len(c.files))
	for i, f := range c.files {
		names[i] = f.name
	}
	d.find(Finding{Name: "configuration", Value: fmt.Sprintf("version %d: %s", max(c.version(), 1), strings.Join(names, ", ")), Verdict: OK,
		Evidence: &Evidence{File: d.configFile, Line: c.files[0].leaves["version"].line, Key: "version"}})
	d.findHosts()
}

// findNoConfiguration: a distribution that writes its own has not started yet;
// otherwise containerd runs by its defaults.
func (d *Detection) findNoConfiguration(r rootFiles) {
	if d.layout.generated != "" {
		d.readsHosts = true
		d.find(Finding{Name: "configuration", Value: "not written yet", Verdict: OK, Evidence: &Evidence{File: d.configFile},
			Remedy: d.layout.name + " writes it at its first start, with its own hosts directory"})
		return
	}
	if !isWhole(r) {
		d.find(Finding{Name: "configuration", Value: "none in sight", Verdict: Fault, Evidence: &Evidence{File: d.configFile},
			Remedy: "mount the node's whole root, or the directory in which its distribution keeps containerd's configuration (the chart's agent.containerdPath)"})
		return
	}
	if _, ok := firstOf(r, slices.Concat(d.layout.sockets, d.layout.binaries)); !ok && !d.version.known() {
		d.find(Finding{Name: "configuration", Value: "no containerd on this node", Verdict: Fault,
			Remedy: "only containerd reads what is written here: other runtimes have to be told of the registry by their own means"})
		return
	}
	d.config = &config{v: d.version}
	d.find(Finding{Name: "configuration", Value: "none: containerd's defaults", Verdict: OK, Evidence: &Evidence{File: d.configFile}})
	d.findHosts()
}

func (d *Detection) findReserved(r rootFiles) {
	for _, registry := range d.layout.reserved {
		dir := path.Join(d.CertsDir, registry)
		if !r.exists(dir) {
			continue
		}
		if text, err := r.read(path.Join(dir, "hosts.toml")); err == nil && strings.HasPrefix(string(text), trust.Marker) {
			continue
		}
		d.Reserved = append(d.Reserved, registry)
		d.find(Finding{Name: "reserved", Value: registry, Verdict: OK, Evidence: &Evidence{File: dir},
			Remedy: d.layout.name + " looks after this registry's directory: it is left alone"})
	}
}

// findRegistries tells of the mirrors that K3s and RKE2 write at every start.
func (d *Detection) findRegistries(r rootFiles) {
	name := d.layout.registriesFile()
	if name == "" {
		return
	}
	data, err := r.read(name)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	hosts, err2 := registryHosts(data)
	if err = errors.Join(err, err2); err != nil {
		d.find(Finding{Name: "registries", Value: err.Error(), Verdict: Warning, Evidence: &Evidence{File: name}, Remedy: "put it right: " + d.layout.name + " does not start with it"})
		return
	}
	d.find(Finding{Name: "registries", Value: strings.Join(hosts, ", "), Verdict: OK, Evidence: &Evidence{File: name},
		Remedy: d.layout.name + " writes these directories anew at every start; the agent then adds what is missing, and keeps the rest"})
}

// registryHosts are the registries that a registries.yaml names, sorted.
func registryHosts(data []byte) ([]string, error) {
	var doc struct {
		Mirrors map[string]yaml.Node `yaml:"mirrors"`
		Configs map[string]yaml.Node `yaml:"configs"`
	}
	if err := yaml.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	return unionOfKeys(doc.Mirrors, doc.Configs), nil
}
