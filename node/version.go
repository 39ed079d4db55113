package node

import (
	"debug/buildinfo"
	"fmt"
	"os"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/connected-registry/connected-registry/trust"
)

// Version is a runtime's. The zero value is an unknown one.
type Version struct {
	// Major is 0, Minor negative, if it is unknown; then the worst of all
	// versions is assumed.
	Major, Minor int
	// Text is how the runtime writes it.
	Text string
}

var versionText = regexp.MustCompile(`(\d+)\.(\d+)(\.\d+)?[-+~.\w]*`)

// parseVersion finds a version in text.
func parseVersion(text string) Version {
	m := versionText.FindStringSubmatch(text)
	if m == nil {
		return Version{}
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	return Version{Major: major, Minor: minor, Text: m[0]}
}

func (v Version) known() bool { return v.Major > 0 }

// since reports whether it is certain that v is that version of containerd 2 or
// a later one.
func (v Version) since(minor int) bool { return v.Major == 2 && v.Minor >= minor || v.Major > 2 }

// mergesPlugins: an imported file overrides value by value.
func (v Version) mergesPlugins() bool { return v.Major >= 2 }

// migratesEachFile: files of different configuration versions go together.
func (v Version) migratesEachFile() bool { return v.since(3) }

// pullsByTransfer: the transfer service is what pulls unless told otherwise.
func (v Version) pullsByTransfer() bool {
	return v.Major != 1 && (v.Major != 2 || v.Minor != 0)
}

// hasDefaultPath: without a config_path, two directories are looked into.
func (v Version) hasDefaultPath() bool { return v.since(2) }

// binaryVersion reads what Go's linker left in an executable; nothing is run.
func binaryVersion(root *os.Root, name string) (Version, string, bool) {
	real, err := trust.ResolvePath(root, name)
	if err != nil {
		return Version{}, "", false
	}
	f, err := root.Open(real)
	if err != nil {
		return Version{}, "", false
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return Version{}, "", false
	}
	info, err := buildinfo.Read(f)
	if err != nil {
		return Version{}, "", false
	}
	v, from := moduleVersion(info)
	return v, from, v.known()
}

// moduleVersion is containerd's in an executable that is containerd or, like
// K3s's, contains it. Distributors build it with the exact version as a flag,
// or not; the module's path tells at least the major one.
func moduleVersion(info *buildinfo.BuildInfo) (v Version, from string) {
	for _, s := range info.Settings {
		const variable = "/version.Version="
		if _, after, ok := strings.Cut(s.Value, variable); ok && s.Key == "-ldflags" && strings.Contains(s.Value, "containerd/containerd") {
			if v := parseVersion(strings.Trim(strings.Fields(after)[0], `'"`)); v.known() {
				return v, s.Key
			}
		}
	}
	for _, m := range append(info.Deps, &info.Main) {
		major := map[string]int{"github.com/containerd/containerd": 1, "github.com/containerd/containerd/v2": 2}[m.Path]
		if major == 0 {
			continue
		}
		for _, m := range []*debug.Module{m.Replace, m} {
			if m == nil {
				continue
			}
			if v := parseVersion(m.Version); v.Major == major {
				return v, "module " + m.Path
			}
		}
		return Version{Major: major, Minor: -1, Text: fmt.Sprintf("%d.x", major)}, "module " + m.Path
	}
	return Version{}, ""
}
