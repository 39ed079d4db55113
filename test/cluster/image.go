package cluster

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Busybox returns a small real image made of the host's busybox, with the
// usual applets as links. Its entrypoint is a shell.
func Busybox() (v1.Image, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("finding busybox (Debian: busybox-static): %w", err)
	}
	links := map[string]string{}
	for _, applet := range []string{"sh", "cat", "chmod", "cp", "date", "echo", "env", "false", "grep", "head", "hostname",
		"httpd", "id", "ip", "kill", "ln", "ls", "mkdir", "mount", "mv", "nc", "nslookup", "ping", "ps", "rm", "seq", "sha256sum",
		"sleep", "stat", "tail", "tar", "test", "touch", "trap", "true", "wc", "wget"} {
		links["bin/"+applet] = "busybox"
	}
	return Image(map[string]string{"bin/busybox": path}, links, "/bin/sh")
}

// Image returns an image of one layer for this machine's platform: files maps
// paths in the image, without a leading slash, to executables on the host;
// links maps further paths to what they link to.
func Image(files, links map[string]string, entrypoint ...string) (v1.Image, error) {
	layer, err := pack(files, links)
	if err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer)), nil })
	if err != nil {
		return nil, err
	}
	image, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config.Entrypoint = entrypoint
	config.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	return mutate.ConfigFile(image, config)
}

// withUser returns the image with the numeric user that its programs run as.
func withUser(image v1.Image, user string) (v1.Image, error) {
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config := file.Config
	config.User = user
	return mutate.Config(image, config)
}

func pack(files, links map[string]string) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}); err != nil {
		return nil, err
	}
	for _, path := range slices.Sorted(maps.Keys(files)) {
		data, err := os.ReadFile(files[path])
		if err != nil {
			return nil, err
		}
		if err := w.WriteHeader(&tar.Header{Name: path, Mode: 0o755, Size: int64(len(data))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
	}
	for _, path := range slices.Sorted(maps.Keys(links)) {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: path, Linkname: links[path], Mode: 0o777}); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), w.Close()
}

// WriteImage writes an image as an archive for LoadImage.
func WriteImage(path, ref string, image v1.Image) error {
	tag, err := name.NewTag(ref)
	if err != nil {
		return err
	}
	return tarball.WriteToFile(path, tag, image)
}

// writePause writes the image of the process that holds a pod's namespaces.
func writePause(path, program string) error {
	image, err := Image(map[string]string{"machine": program}, nil, "/machine", "pause")
	if err != nil {
		return err
	}
	return WriteImage(path, pauseRef, image)
}
