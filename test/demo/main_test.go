package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestDemo runs what `make demo` runs, on the embedded image and on one of each
// form that DEMO_IMAGE takes.
func TestDemo(t *testing.T) {
	for _, test := range []struct {
		name  string
		image func(t *testing.T) string
	}{
		{"embedded", func(*testing.T) string { return "" }},
		{"OCI layout", ociLayout},
		{"tar of an OCI layout", func(t *testing.T) string { return tarOf(t, ociLayout(t)) }},
		{"docker archive", dockerArchive},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("DEMO_IMAGE", test.image(t))
			t.Setenv("TMPDIR", t.TempDir())
			var out bytes.Buffer
			if err := run(t.Context(), &out); err != nil {
				t.Fatalf("%v\n%s", err, out.String())
			}
			for _, hop := range []string{hopCache, hopRegistry, hopUpstream} {
				if !strings.Contains(out.String(), " "+hop+" ") {
					t.Errorf("no pull was answered by %q", hop)
				}
			}
			if left, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v (%v)", left, err)
			}
		})
	}
}

func TestDemoImageMistakes(t *testing.T) {
	for _, test := range []struct{ file, want string }{
		{filepath.Join(t.TempDir(), "absent"), "DEMO_IMAGE: stat"},
		{"main.go", "DEMO_IMAGE: reading main.go"},
		{t.TempDir(), "DEMO_IMAGE: reading the OCI layout"},
	} {
		_, err := loadImage(test.file, t.TempDir())
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("loadImage(%s): %v, expected %q", test.file, err, test.want)
		}
	}
}

func smallImage(t *testing.T) v1.Image {
	t.Helper()
	img, err := random.Image(1<<16, 3)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	img, err = mutate.ConfigFile(img, config)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func ociLayout(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(smallImage(t)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func dockerArchive(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image.tar")
	tag, err := name.NewTag("app:v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(file, tag, smallImage(t)); err != nil {
		t.Fatal(err)
	}
	return file
}

func tarOf(t *testing.T, dir string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "layout.tar")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	err = fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		return writeEntry(w, name, data)
	})
	if err := errors.Join(err, w.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return file
}
