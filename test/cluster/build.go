package cluster

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// modulePath is the module that holds this package and, beneath it, the
// modules that pin the programs.
const modulePath = "github.com/connected-registry/connected-registry/test/cluster"

// toolset is a group of programs built together.
type toolset struct {
	name     string
	module   string   // directory in this module; "" is the module itself
	packages []string // "tool" is what go.mod names as tools
	sources  []string // directories whose Go files decide, beside go.mod, what is built
	cgo      bool
	tags     string
	ldflags  string
}

func toolsets() []toolset {
	return []toolset{
		{name: "machine", packages: []string{"./cmd/machine"}, sources: []string{"cmd/machine", "internal"}},
		{name: "cni", module: "tools/cni", packages: []string{"tool"}},
		{name: "runc", module: "tools/runc", packages: []string{"tool"}, cgo: true, tags: "seccomp"},
		{name: "containerd", module: "tools/containerd", packages: []string{"tool"}},
		{name: "containerd17", module: "tools/containerd17", packages: []string{"tool"}},
		{name: "helm", module: "tools/helm", packages: []string{"tool"}},
		{name: "kubernetes", module: "tools/kubernetes", packages: []string{"tool", "./etcd"}, sources: []string{"etcd"}},
		{
			name: "addons", module: "tools/addons", packages: []string{"./coredns", "./cert-manager"},
			sources: []string{"coredns", "cert-manager"},
		},
	}
}

// programs maps a toolset's name to the directory of its executables.
type programs map[string]string

// path returns the path of an executable.
func (p programs) path(toolset, name string) string { return filepath.Join(p[toolset], name) }

// build compiles what the cache does not hold yet. An executable is kept under
// a name made of everything that decides its content, so the cache never needs
// to be emptied by hand for correctness.
func build(ctx context.Context, log *slog.Logger, cache string) (programs, error) {
	source, err := moduleDir(ctx)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(filepath.Join(cache, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	built := programs{}
	for _, set := range toolsets() {
		dir, err := set.build(ctx, log, filepath.Join(source, set.module), cache)
		if err != nil {
			return nil, fmt.Errorf("building %s: %w", set.name, err)
		}
		built[set.name] = dir
	}
	return built, nil
}

// moduleDir finds the sources of this module from wherever the go command
// runs: in the module itself, or in one that replaces it by a directory.
func moduleDir(ctx context.Context) (string, error) {
	out, err := output(exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", modulePath))
	if err != nil {
		return "", fmt.Errorf("finding the module %s: %w", modulePath, err)
	}
	return strings.TrimSpace(string(out)), nil
}

func (s toolset) build(ctx context.Context, log *slog.Logger, source, cache string) (string, error) {
	flags, err := s.flags(source)
	if err != nil {
		return "", err
	}
	key, err := s.key(source, flags)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, s.name+"-"+key)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	log.Info("building, once for this version", "programs", s.name)
	temp, err := os.MkdirTemp(cache, "building-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(temp)
	if err := os.Chmod(temp, 0o755); err != nil {
		return "", err
	}
	args := slices.Concat([]string{"build", "-buildvcs=false", "-trimpath"}, flags, []string{"-o", temp + "/"}, s.packages)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+map[bool]string{true: "1", false: "0"}[s.cgo], "GOWORK=off")
	if _, err := output(cmd); err != nil {
		return "", err
	}
	return dir, os.Rename(temp, dir)
}

// flags returns the flags of go build. Kubernetes and containerd report the
// version that the linker is told.
func (s toolset) flags(source string) ([]string, error) {
	ldflags := "-s -w"
	mod, err := os.ReadFile(filepath.Join(source, "go.mod"))
	if err != nil {
		return nil, err
	}
	switch s.name {
	case "kubernetes":
		v, err := required(mod, "k8s.io/kubernetes")
		if err != nil {
			return nil, err
		}
		const pkg = " -X k8s.io/component-base/version."
		parts := strings.Split(strings.TrimPrefix(v, "v"), ".")
		ldflags += pkg + "gitVersion=" + v + pkg + "gitMajor=" + parts[0] + pkg + "gitMinor=" + parts[1]
	case "containerd":
		v, err := required(mod, "github.com/containerd/containerd/v2")
		if err != nil {
			return nil, err
		}
		ldflags += " -X github.com/containerd/containerd/v2/version.Version=" + v
	case "containerd17":
		v, err := required(mod, "github.com/containerd/containerd")
		if err != nil {
			return nil, err
		}
		ldflags += " -X github.com/containerd/containerd/version.Version=" + v
	}
	flags := []string{"-ldflags=" + ldflags}
	if s.tags != "" {
		flags = append(flags, "-tags="+s.tags)
	}
	return flags, nil
}

// required returns the version at which a go.mod file requires a module.
func required(mod []byte, path string) (string, error) {
	m := regexp.MustCompile(`(?m)^(?:require)?\s+` + regexp.QuoteMeta(path) + ` (v\d+\.\d+\.\S+)`).FindSubmatch(mod)
	if m == nil {
		return "", fmt.Errorf("go.mod does not require %s", path)
	}
	return string(m[1]), nil
}

// key digests what decides the executables.
func (s toolset) key(source string, flags []string) (string, error) {
	files := []string{filepath.Join(source, "go.mod"), filepath.Join(source, "go.sum")}
	for _, dir := range s.sources {
		err := filepath.WalkDir(filepath.Join(source, dir), func(path string, _ fs.DirEntry, err error) error {
			if err == nil && strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			return "", err
		}
	}
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version(), runtime.GOARCH, s.cgo, s.packages, flags)
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(h, file)
		_, err = io.Copy(h, f)
		f.Close()
		if err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:12], nil
}

// lock takes an exclusive lock on a file, waiting for whoever has it.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
	}
}

// output runs a command; its error carries what the command said.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.Bytes(), fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}
