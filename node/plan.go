package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"reflect"
	"slices"
	"strconv"
)

// dropIn is the name of our file among those that a configuration imports.
const dropIn = "connected-registry.toml"

// Plan is what makes a runtime read the hosts directory.
type Plan struct {
	// File to write, inside the node root. Empty: there is nothing to do, or
	// nothing that we may do; see Steps.
	File string
	// Data is all of the file as it should be.
	Data []byte
	// Steps say to a person what is to be done. Empty: nothing is.
	Steps []string
}

// NewPlan plans for the node whose file system is at nodeRoot, from what was
// detected there. It changes nothing. A configuration that is not understood is
// never to be written.
func NewPlan(_ context.Context, nodeRoot string, d Detection) (Plan, error) {
	root, err := os.OpenRoot(nodeRoot)
	if err != nil {
		return Plan{}, fmt.Errorf("node root %s: %w", nodeRoot, err)
	}
	defer root.Close()
	return plan(rootFiles{root}, d), nil
}

func plan(files files, d Detection) Plan {
	if d.readsHosts {
		return Plan{}
	}
	report := Plan{Steps: d.remedies()}
	if d.config == nil {
		return report
	}
	state := d.config.hosts(d.layout.certsDir)
	if state.mirrors {
		return report
	}
	if d.layout.generated != "" {
		return Plan{Steps: append(d.remedies(), d.layout.generated)}
	}
	dir := state.dir
	if dir == "" {
		dir = d.layout.certsDir
	}
	for _, c := range candidates(files, d, dir) {
		if c.isSound(files, d, dir) {
			return Plan{File: c.name, Data: c.data, Steps: []string{c.what, "restart " + d.layout.units[0]}}
		}
	}
	return report
}

// remedies are those of the faults.
func (d Detection) remedies() []string {
	var out []string
	for _, f := range d.Findings {
		if f.Verdict == Fault && f.Remedy != "" {
			out = append(out, f.Remedy)
		}
	}
	return out
}

// candidate is one file as it might be written.
type candidate struct {
	name string
	data []byte
	what string
}

// candidates are tried in this order: a file of its own leaves the operator's
// untouched.
func candidates(files files, d Detection, dir string) []candidate {
	c, plugin := d.config, d.config.plugin()
	if len(c.files) == 0 {
		version := 2
		if d.version.Major >= 2 {
			version, plugin = 3, imagesPlugin
		}
		return []candidate{newFile(d.configFile, version, plugin, dir)}
	}
	var out []candidate
	if d.version.mergesPlugins() || !c.maps[at("plugins", plugin)] {
		for _, f := range c.files {
			for _, pattern := range f.imports {
				if pattern = importPath(f.name, pattern); isPattern(pattern) {
					name := path.Join(path.Dir(pattern), dropIn)
					if _, err := files.read(name); errors.Is(err, fs.ErrNotExist) {
						out = append(out, newFile(name, c.version(), plugin, dir))
					}
				}
			}
		}
	}
	return append(out, edit(c.fileOf(plugin), plugin, dir))
}

func newFile(name string, version int, plugin, dir string) candidate {
	text := fmt.Sprintf("# Written by connected-registry, so that containerd reads its hosts directory.\nversion = %d\n\n%s", version, registryTable("", plugin, dir))
	return candidate{name: name, data: []byte(text), what: fmt.Sprintf("write %s:\n%s", name, text)}
}

func registryTable(indent, plugin, dir string) string {
	return fmt.Sprintf("%s[%s]\n%s  config_path = %s\n", indent, dotted([]string{"plugins", plugin, "registry"}), indent, strconv.Quote(dir))
}

// fileOf is the file in which a plugin's registry settings stand, or should.
func (c *config) fileOf(plugin string) *file {
	if s, ok := c.values[at("plugins", plugin, "registry", "config_path")]; ok {
		for _, f := range c.files {
			if f.name == s.file {
				return f
			}
		}
	}
	for _, m := range []string{at("plugins", plugin, "registry"), at("plugins", plugin)} {
		for _, f := range slices.Backward(c.files) {
			if f.maps[m] {
				return f
			}
		}
	}
	return c.files[0]
}

// edit changes one value, or adds one line, or one table; all other bytes stay.
func edit(f *file, plugin, dir string) candidate {
	table := []string{"plugins", plugin, "registry"}
	c := candidate{name: f.name}
	if old, ok := f.leaves[at(append(table, "config_path")...)]; ok {
		c.data = slices.Concat(f.data[:old.start], []byte(strconv.Quote(dir)), f.data[old.end:])
		c.what = fmt.Sprintf("in %s, line %d, set config_path = %q", f.name, old.line, dir)
		if old.end == 0 {
			// Inside an inline table: there is no telling where.
			c.data = f.data
		}
		return c
	}
	if header, ok := f.tables[at(table...)]; ok {
		head := f.data[:header.end]
		line := head[bytes.LastIndexByte(head[:header.start], '\n')+1:]
		indent := line[:len(line)-len(bytes.TrimLeft(line, " \t"))]
		c.data = slices.Concat(endLine(head), indent, []byte("  config_path = "+strconv.Quote(dir)+"\n"), f.data[header.end:])
		c.what = fmt.Sprintf("in %s, after line %d, add config_path = %q", f.name, header.line, dir)
		return c
	}
	c.data = slices.Concat(endLine(f.data), []byte("\n"+registryTable("", plugin, dir)))
	c.what = fmt.Sprintf("at the end of %s, add:\n%s", f.name, registryTable("", plugin, dir))
	return c
}

// endLine makes sure that data ends a line.
func endLine(data []byte) []byte {
	if len(data) > 0 && data[len(data)-1] != '\n' {
		return append(slices.Clone(data), '\n')
	}
	return data
}

// isSound reads the configuration as it would be: containerd must read the
// hosts directory, and nothing else may have changed.
func (c candidate) isSound(files files, d Detection, dir string) bool {
	after, err := loadConfig(overlay{files, c.name, c.data}, d.configFile, d.version)
	if err != nil || after.unclear() != "" {
		return false
	}
	state := after.hosts(d.layout.certsDir)
	return state.reads && state.dir == dir && slices.Equal(changedKeys(d.config, after), []string{at("plugins", after.plugin(), "registry", "config_path")})
}

// changedKeys are the settings that differ, sorted, the version of a file that
// was not there aside.
func changedKeys(before, after *config) []string {
	value := func(c *config, key string) any { return c.values[key].value }
	return slices.DeleteFunc(unionOfKeys(before.values, after.values), func(key string) bool {
		if key == "version" && len(before.files) == 0 {
			return true
		}
		return reflect.DeepEqual(value(before, key), value(after, key))
	})
}
