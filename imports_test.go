package connectedregistry

import (
	"go/build"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/connected-registry/connected-registry/"

// mayImport says which packages of this module each package may import, tests
// aside. A package that is missing here may be imported by none and import all.
var mayImport = map[string][]string{
	"api/v1alpha1":               {},
	"clienttoken":                {"api/v1alpha1"},
	"trust":                      {},
	"node":                       {"trust"},
	"archive":                    {"storage", "api/v1alpha1"},
	"storage":                    {"storage/bucket"},
	"storage/bucket":             {},
	"storage/bucket/buckettest":  {"storage/bucket"},
	"storage/internal/membucket": {"storage/bucket"},
	"agent":                      {"trust"},
	"agent/daemon":               {"agent", "trust", "api/v1alpha1"},
	"registry":                   {"trust", "api/v1alpha1", "storage", "registry/auth"},
	"registry/auth":              {"api/v1alpha1", "clienttoken"},
	"registry/cache":             {"trust", "api/v1alpha1", "storage"},
	"syncer":                     {"trust", "api/v1alpha1", "storage", "syncer/notify"},
	"syncer/certificates":        {"trust", "api/v1alpha1"},
	"syncer/notify":              {"api/v1alpha1"},
	"syncer/controller":          {"api/v1alpha1", "clienttoken", "trust", "storage", "storage/bucket", "syncer", "syncer/certificates"},
	"standalone":                 {"archive", "clienttoken", "trust", "api/v1alpha1", "storage", "storage/bucket", "agent", "registry", "registry/auth", "registry/cache", "syncer"},
}

// TestImports holds the packages to the picture in ARCHITECTURE.md.
func TestImports(t *testing.T) {
	for pkg, allowed := range mayImport {
		p, err := build.ImportDir(pkg, 0)
		if err != nil {
			t.Errorf("%s: %v", pkg, err)
			continue
		}
		for _, imported := range p.Imports {
			ours, ok := strings.CutPrefix(imported, module)
			if ok && !slices.Contains(allowed, ours) {
				t.Errorf("%s imports %s, which it may not: see ARCHITECTURE.md", pkg, ours)
			}
		}
	}
}

// TestPackagesAreListed finds packages that the rules forgot.
func TestPackagesAreListed(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		if strings.HasPrefix(d.Name(), ".") && path != "." || slices.Contains([]string{"cmd", "test", "testdata", "tools", "bin", "dist"}, d.Name()) {
			return fs.SkipDir
		}
		p, err := build.ImportDir(path, 0)
		if err != nil || len(p.GoFiles) == 0 {
			return nil //nolint:nilerr // no package here
		}
		if _, ok := mayImport[path]; !ok {
			t.Errorf("package %s has no import rule", path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
