package node

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
)

// hostsState is whether a configuration makes containerd read a hosts
// directory, and why.
type hostsState struct {
	dir     string // the one that it reads, or names
	reads   bool
	from    setting // what decides
	value   string
	remedy  string
	mirrors bool // mirrors or their like stand in the way
}

// findHosts tells whether containerd reads host configuration at all.
func (d *Detection) findHosts() {
	s := d.config.hosts(d.layout.certsDir)
	f := Finding{Name: "config_path", Value: s.value, Verdict: OK, Remedy: s.remedy}
	if !s.reads {
		f.Verdict = Fault
	}
	if s.from.file != "" {
		f.Evidence = &Evidence{File: s.from.file, Line: s.from.line, Key: dotted(s.from.path), Value: s.from.text()}
	}
	d.readsHosts = s.reads
	if s.dir != "" {
		d.CertsDir = s.dir
	}
	d.find(f)
}

// text is the value for a person. What else a registry's settings hold may be a
// password.
func (s setting) text() string {
	switch v := s.value.(type) {
	case bool, int64:
		return fmt.Sprint(v)
	case string:
		if s.path[len(s.path)-1] == "config_path" {
			return fmt.Sprintf("%q", v)
		}
	}
	return ""
}

// hosts decides what containerd makes of a configuration. certsDir
// is the hosts directory of the distribution.
func (c *config) hosts(certsDir string) hostsState {
	value, from := c.configPath()
	list := filepath.SplitList(snapPath(value))
	if s, done := c.obstacles(value, certsDir); done {
		return s
	}
	local, isLocal := c.localPull()
	isLocal = isLocal || !c.v.pullsByTransfer()
	switch {
	case len(list) == 1:
		return hostsState{dir: list[0], reads: true, from: from, value: list[0]}
	case len(list) > 1 && isLocal:
		return hostsState{dir: list[0], reads: true, from: from, value: value}
	case len(list) > 1:
		return hostsState{from: from, value: value + ", of which containerd makes one name: no directory is read", dir: list[0],
			remedy: fmt.Sprintf("set config_path to one directory, %s", list[0])}
	case c.v.hasDefaultPath() && isLocal:
		return hostsState{dir: defaultCertsDir, reads: true, from: local, value: defaultCertsDir + " by default"}
	}
	return hostsState{from: from, value: "not set: no hosts directory is read", remedy: "set config_path to " + certsDir}
}

// obstacles are what excludes a hosts directory.
func (c *config) obstacles(configPath, certsDir string) (hostsState, bool) {
	s, found := c.below("mirrors")
	what := "mirrors"
	if !found && c.v.Major < 2 {
		s, found = c.clientTLS()
		what = "configs with tls"
	}
	if !found {
		return hostsState{}, false
	}
	state := hostsState{from: s, mirrors: true}
	if configPath != "" {
		state.value = what + " beside config_path: the CRI plugin does not load"
		state.remedy = "move the " + what + " into hosts directories, or take config_path away"
		return state, true
	}
	state.value = what + " in place of a hosts directory: none is read"
	state.remedy = "move the " + what + " into hosts directories, then set config_path to " + certsDir
	return state, true
}

// clientTLS returns a setting of registry.configs."…".tls, if there is any.
func (c *config) clientTLS() (setting, bool) {
	prefix := at("plugins", c.plugin(), "registry", "configs")
	for _, key := range slices.Sorted(maps.Keys(c.values)) {
		if s := c.values[key]; strings.HasPrefix(key, prefix+"\x00") && slices.Contains(s.path[4:], "tls") {
			return s, true
		}
	}
	return setting{}, false
}

// snapPath is a path in a configuration of MicroK8s as its wrapper expands it.
func snapPath(p string) string {
	return strings.NewReplacer("${SNAP_DATA}", "/var/snap/microk8s/current", "${SNAP_COMMON}", "/var/snap/microk8s/common").Replace(p)
}

// unionOfKeys returns the keys of both, sorted.
func unionOfKeys[V any](a, b map[string]V) []string {
	keys := slices.Collect(maps.Keys(a))
	for k := range b {
		if !slices.Contains(keys, k) {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return keys
}
