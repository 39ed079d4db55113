package node

import (
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// The plugins that pull: the second since configuration version 3, which
// containerd 2 alone knows; it moves what it finds under the first one over to
// the second.
const (
	criPlugin    = "io.containerd.grpc.v1.cri"
	imagesPlugin = "io.containerd.cri.v1.images"
)

// setting is a value in force, and the file that says so.
type setting struct {
	leaf
	file string
}

// config is a runtime's configuration as the runtime puts it together.
type config struct {
	// files are in the order in which each overrides those before.
	files []*file
	// values are the merged leaves, and maps the merged tables, by their path.
	values map[string]setting
	maps   map[string]bool
	// v is who reads it.
	v Version
}

// loadConfig reads a configuration file and all that it imports, the way
// containerd of that version does: breadth first, each file once, the latter
// override.
func loadConfig(fs files, name string, v Version) (*config, error) {
	c := &config{values: map[string]setting{}, maps: map[string]bool{}, v: v}
	seen := map[string]bool{}
	for pending := []string{name}; len(pending) > 0; {
		name, pending = pending[0], pending[1:]
		if seen[name] {
			continue
		}
		seen[name] = true
		data, err := fs.read(name)
		if err != nil {
			return c, err
		}
		f, err := parse(name, data)
		if err != nil {
			return c, err
		}
		c.merge(f)
		imported, err := resolveImports(fs, f)
		if err != nil {
			return c, err
		}
		pending = append(pending, imported...)
	}
	return c, nil
}

func resolveImports(fs files, f *file) ([]string, error) {
	var out []string
	for _, name := range f.imports {
		name = importPath(f.name, name)
		if !isPattern(name) {
			out = append(out, name)
			continue
		}
		matches, err := glob(fs, name)
		if err != nil {
			return nil, fmt.Errorf("%s: imports %q: %w", f.name, name, err)
		}
		out = append(out, matches...)
	}
	return out, nil
}

// importPath is what an import in a file means.
func importPath(from, name string) string {
	name = filepath.Clean(name)
	if !path.IsAbs(name) {
		name = path.Join(path.Dir(from), name)
	}
	return name
}

// merge lets f override what is there. containerd 1 replaces a plugin's table
// as a whole, containerd 2 value by value.
func (c *config) merge(f *file) {
	if !c.v.mergesPlugins() {
		for m := range f.maps {
			if parts := strings.Split(m, "\x00"); len(parts) == 2 && parts[0] == "plugins" {
				inPlugin := func(key string) bool { return key == m || strings.HasPrefix(key, m+"\x00") }
				maps.DeleteFunc(c.values, func(key string, _ setting) bool { return inPlugin(key) })
				maps.DeleteFunc(c.maps, func(key string, _ bool) bool { return inPlugin(key) })
			}
		}
	}
	for key, l := range f.leaves {
		c.values[key] = setting{l, f.name}
	}
	maps.Copy(c.maps, f.maps)
	c.files = append(c.files, f)
}

// version is the one by which containerd reads the configuration.
func (c *config) version() int {
	if len(c.files) == 0 {
		return 0
	}
	return c.files[0].version
}

// plugin returns the name under which this configuration holds the settings
// that decide about pulls.
func (c *config) plugin() string {
	switch {
	case c.v.Major == 1:
		return criPlugin
	case c.version() > 2:
		return imagesPlugin
	}
	for _, p := range []string{criPlugin, imagesPlugin} {
		if c.maps[at("plugins", p, "registry")] {
			return p
		}
	}
	if c.maps[at("plugins", imagesPlugin)] && !c.maps[at("plugins", criPlugin)] {
		return imagesPlugin
	}
	return criPlugin
}

// registry returns one of the settings of how registries are reached.
func (c *config) registry(key string) (setting, bool) {
	s, ok := c.values[at("plugins", c.plugin(), "registry", key)]
	return s, ok
}

// below returns one of the settings in a table of the registry's, the first in
// order; false if the table is empty or not there.
func (c *config) below(table string) (setting, bool) {
	return c.first(at("plugins", c.plugin(), "registry", table))
}

func (c *config) first(prefix string) (setting, bool) {
	for _, key := range slices.Sorted(maps.Keys(c.values)) {
		if strings.HasPrefix(key, prefix+"\x00") {
			return c.values[key], true
		}
	}
	return setting{}, false
}

// configPath is registry.config_path, empty if it is not set.
func (c *config) configPath() (value string, from setting) {
	from, ok := c.registry("config_path")
	if !ok {
		return "", setting{}
	}
	value, _ = from.value.(string)
	return value, from
}

// localPull returns the setting that makes containerd 2.1 and later pull in its
// CRI plugin, and not through the transfer service, which cannot make sense of
// a list of directories.
func (c *config) localPull() (setting, bool) {
	for _, key := range []string{"mirrors", "configs", "auths"} {
		if s, ok := c.below(key); ok {
			return s, true
		}
	}
	is := func(value any) func(any) bool { return func(v any) bool { return v == value } }
	images := []string{"plugins", imagesPlugin}
	for _, trigger := range []struct {
		path []string
		pull func(any) bool
	}{
		{append(images, "use_local_image_pull"), is(true)},
		{append(images, "discard_unpacked_layers"), is(true)},
		{append(images, "disable_snapshot_annotations"), is(false)},
		{append(images, "image_pull_with_sync_fs"), is(true)},
		{append(images, "max_concurrent_downloads"), func(v any) bool { return v != int64(3) }},
	} {
		if s, ok := c.values[at(trigger.path...)]; ok && trigger.pull(s.value) {
			return s, true
		}
	}
	if c.version() > 2 {
		return setting{}, false
	}
	return c.localPullByCRI(is)
}

// localPullByCRI looks where configurations of version 2 have it. containerd
// takes over some of it only together with a table of runtimes.
func (c *config) localPullByCRI(is func(any) func(any) bool) (setting, bool) {
	cri := []string{"plugins", criPlugin}
	hasRuntimes := c.maps[at("plugins", criPlugin, "containerd", "runtimes")]
	for _, trigger := range []struct {
		path []string
		pull func(any) bool
		ok   bool
	}{
		{append(cri, "image_pull_with_sync_fs"), is(true), true},
		{append(cri, "max_concurrent_downloads"), func(v any) bool { return v != int64(3) }, true},
		{append(cri, "containerd", "discard_unpacked_layers"), is(true), hasRuntimes},
		{append(cri, "containerd", "disable_snapshot_annotations"), is(false), hasRuntimes},
	} {
		if s, ok := c.values[at(trigger.path...)]; ok && trigger.ok && trigger.pull(s.value) {
			return s, true
		}
	}
	return setting{}, false
}

// unclear says why a configuration that parses is still not understood; empty
// if it is.
func (c *config) unclear() string {
	v := c.v
	if len(c.files) == 0 {
		return ""
	}
	main := c.files[0]
	switch {
	case c.disabled() != "":
		return fmt.Sprintf("%s disables %s: the kubelet cannot use this containerd", main.name, c.disabled())
	case main.version < 2:
		return fmt.Sprintf("%s is of version %d: have containerd convert it, with \"containerd config migrate\"", main.name, max(main.version, 1))
	case main.version > 4:
		return fmt.Sprintf("%s is of version %d, of which nothing is known here", main.name, main.version)
	case main.version > 2 && v.Major == 1:
		return fmt.Sprintf("%s is of version %d, which containerd 1 does not read", main.name, main.version)
	case main.version > 3 && v.Major == 2 && v.Minor >= 0 && v.Minor < 3:
		return fmt.Sprintf("%s is of version %d, which containerd before 2.3 does not read", main.name, main.version)
	}
	for _, f := range c.files[1:] {
		if f.version != 0 && (f.version > 2) != (main.version > 2) && !v.migratesEachFile() {
			return fmt.Sprintf("%s is of version %d, and %s of version %d: give them the same", main.name, main.version, f.name, f.version)
		}
	}
	return ""
}

// disabled returns the plugin without which no kubelet can pull, if the
// configuration disables it.
func (c *config) disabled() string {
	for _, f := range c.files {
		list, _ := f.leaves["disabled_plugins"].value.([]any)
		for _, p := range list {
			if p == "cri" || p == criPlugin || p == imagesPlugin {
				return fmt.Sprint(p)
			}
		}
	}
	return ""
}
