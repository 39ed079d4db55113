package clients

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/layout"
)

// run runs a program with a home of its own, and returns what it prints.
func run(t *testing.T, s *site, l login, program string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	home := s.dockerConfig(t, l)
	cmd.Env = append(os.Environ(), "HOME="+home, "XDG_RUNTIME_DIR="+home, "DOCKER_CONFIG="+home,
		"REGISTRY_AUTH_FILE="+filepath.Join(home, "config.json"), "SSL_CERT_FILE="+s.caFile)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", said(filepath.Base(program), args, err, []byte(stderr.String()))
	}
	return strings.TrimSpace(stdout.String()), nil
}

// imageID is the digest of the configuration of the only image in a layout.
func imageID(dir string) (string, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return "", err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return "", err
	}
	img, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		return "", err
	}
	id, err := img.ConfigName()
	return id.String(), err
}

var crane = client{
	name: "crane",
	push: func(t *testing.T, s *site, l login, layout, ref string) error {
		_, err := run(t, s, l, cranePath, "push", layout, ref)
		return err
	},
	pull: func(t *testing.T, s *site, l login, ref string) (string, error) {
		dir := filepath.Join(t.TempDir(), "pulled")
		if _, err := run(t, s, l, cranePath, "pull", "--format=oci", ref, dir); err != nil {
			return "", err
		}
		if _, err := run(t, s, l, cranePath, "validate", "--remote="+ref); err != nil {
			return "", err
		}
		return imageID(dir)
	},
	tags: func(t *testing.T, s *site, l login, repository string) ([]string, error) {
		out, err := run(t, s, l, cranePath, "ls", repository)
		return strings.Fields(out), err
	},
	remove: func(t *testing.T, s *site, l login, ref string) error {
		_, err := run(t, s, l, cranePath, "delete", ref)
		return err
	},
}

var skopeo = client{
	name: "skopeo",
	push: func(t *testing.T, s *site, l login, layout, ref string) error {
		_, err := run(t, s, l, "skopeo", "copy", "--insecure-policy", "--dest-cert-dir", s.certsDir,
			"--dest-creds", l.user+":"+l.password, "oci:"+layout+":v1", "docker://"+ref)
		return err
	},
	pull: func(t *testing.T, s *site, l login, ref string) (string, error) {
		dir := filepath.Join(t.TempDir(), "pulled")
		if _, err := run(t, s, l, "skopeo", "copy", "--insecure-policy", "--src-cert-dir", s.certsDir,
			"--src-creds", l.user+":"+l.password, "docker://"+ref, "oci:"+dir+":v1"); err != nil {
			return "", err
		}
		return imageID(dir)
	},
	tags: func(t *testing.T, s *site, l login, repository string) ([]string, error) {
		out, err := run(t, s, l, "skopeo", "list-tags", "--cert-dir", s.certsDir, "docker://"+repository)
		if err != nil {
			return nil, err
		}
		var list struct{ Tags []string }
		err = json.Unmarshal([]byte(out), &list)
		return list.Tags, err
	},
	remove: func(t *testing.T, s *site, l login, ref string) error {
		_, err := run(t, s, l, "skopeo", "delete", "--cert-dir", s.certsDir, "--creds", l.user+":"+l.password, "docker://"+ref)
		return err
	},
}

// runPodman runs podman with a storage of its own that needs nothing of the
// machine.
func runPodman(t *testing.T, s *site, l login, root string, args ...string) (string, error) {
	t.Helper()
	global := []string{"--root", filepath.Join(root, "root"), "--runroot", filepath.Join(root, "run"),
		"--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none"}
	return run(t, s, l, "podman", append(global, args...)...)
}

var podman = client{
	name: "podman",
	push: func(t *testing.T, s *site, l login, layout, ref string) error {
		root := t.TempDir()
		id, err := runPodman(t, s, l, root, "pull", "--quiet", "oci:"+layout+":v1")
		if err != nil {
			return err
		}
		_, err = runPodman(t, s, l, root, "push", "--cert-dir", s.certsDir, "--creds", l.user+":"+l.password, id, "docker://"+ref)
		return err
	},
	pull: func(t *testing.T, s *site, l login, ref string) (string, error) {
		id, err := runPodman(t, s, l, t.TempDir(), "pull", "--quiet", "--cert-dir", s.certsDir, "--creds", l.user+":"+l.password, ref)
		return "sha256:" + id, err
	},
	tags: func(t *testing.T, s *site, l login, repository string) ([]string, error) {
		out, err := runPodman(t, s, l, t.TempDir(), "search", "--list-tags", "--format", "json", repository)
		if err != nil {
			return nil, err
		}
		var lists []struct{ Tags []string }
		if err := json.Unmarshal([]byte(out), &lists); err != nil || len(lists) != 1 {
			return nil, errors.Join(err, errors.New(out))
		}
		return lists[0].Tags, nil
	},
}
