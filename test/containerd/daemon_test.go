package containerd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"text/template"
	"time"

	containerdclient "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// snapshotter is the one every daemon unpacks with. The native one works on
// any filesystem, an overlay included, and shows an unpacked image as a plain
// directory.
const snapshotter = "native"

// daemonConfig says how a containerd under test pulls.
type daemonConfig struct {
	// CertsDir is registry.config_path: the one directory of host
	// configuration. Required, absolute.
	CertsDir string
	// FetchBuffer is concurrent_layer_fetch_buffer in bytes. Zero, containerd's
	// own default, fetches each layer with one request; anything else fetches
	// it in chunks of that size, three at a time, by Range requests.
	FetchBuffer int
	// LocalPull pulls inside the CRI plugin instead of through the transfer
	// service, which is the default since containerd 2.1. The two read the
	// host configuration with different code.
	LocalPull bool
}

// daemon is a running containerd.
type daemon struct {
	images cri.ImageServiceClient
	client *containerdclient.Client
	socket string

	logPath string
	logSeen int64 // offset in the log up to which exchanges has read
}

// configuration is a containerd with the image service alone: no NRI, no
// monitors, nothing outside its own directories. The CRI plugin registers the
// image service together with the runtime service, which loads without runc
// and without a network plugin as long as nobody starts a pod.
var configuration = template.Must(template.New("config.toml").Parse(`version = 3
root = '{{.Dir}}/root'
state = '{{.Dir}}/state'
temp = '{{.Dir}}/temp'
imports = []
disabled_plugins = [
  'io.containerd.differ.v1.erofs',
  'io.containerd.image-verifier.v1.bindir',
  'io.containerd.internal.v1.opt',
  'io.containerd.internal.v1.tracing',
  'io.containerd.monitor.container.v1.restart',
  'io.containerd.monitor.task.v1.cgroups',
  'io.containerd.nri.v1.nri',
  'io.containerd.snapshotter.v1.blockfile',
  'io.containerd.snapshotter.v1.erofs',
  'io.containerd.snapshotter.v1.overlayfs',
  'io.containerd.tracing.processor.v1.otlp',
]

[debug]
level = 'debug'
format = 'json'

[grpc]
address = '{{.Socket}}'

[ttrpc]
address = '{{.Socket}}.ttrpc'

[plugins.'io.containerd.cri.v1.images']
snapshotter = '{{.Snapshotter}}'
concurrent_layer_fetch_buffer = {{.Config.FetchBuffer}}
use_local_image_pull = {{.Config.LocalPull}}

[plugins.'io.containerd.cri.v1.images'.registry]
config_path = '{{.Config.CertsDir}}'

[plugins.'io.containerd.cri.v1.runtime']
cdi_spec_dirs = []

[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ['{{.Dir}}/cni']
conf_dir = '{{.Dir}}/cni'

[plugins.'io.containerd.transfer.v1.local']
concurrent_layer_fetch_buffer = {{.Config.FetchBuffer}}

[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
platform = '{{.Platform}}'
snapshotter = '{{.Snapshotter}}'
differ = 'walking'
`))

// startContainerd starts a containerd with nothing in its store and returns
// when its image service answers. It is stopped when the test ends; a daemon
// that does not stop on SIGTERM fails the test.
func startContainerd(t *testing.T, config daemonConfig) *daemon {
	t.Helper()
	dir := t.TempDir()
	socket := filepath.Join(socketDir(t), "c.sock")
	writeConfiguration(t, filepath.Join(dir, "config.toml"), map[string]any{
		"Dir":         dir,
		"Socket":      socket,
		"Snapshotter": snapshotter,
		"Platform":    platforms.DefaultString(),
		"Config":      config,
	})

	d := &daemon{logPath: filepath.Join(dir, "log"), socket: socket}
	stopped := d.run(t, exec.Command(daemonPath, "--config", filepath.Join(dir, "config.toml")))
	d.connect(t, socket, stopped)
	return d
}

// socketDir returns a new directory whose path leaves room for a socket's
// name: a Unix socket's address holds 108 bytes, which t.TempDir may exceed.
func socketDir(t *testing.T) string {
	t.Helper()
	const longest = 80
	parent := os.TempDir()
	if len(parent) > longest {
		parent = "/tmp"
	}
	dir, err := os.MkdirTemp(parent, "ctrd-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func writeConfiguration(t *testing.T, path string, data any) {
	t.Helper()
	var b bytes.Buffer
	if err := configuration.Execute(&b, data); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}

// run starts the daemon, has it stopped at the end of the test, and returns a
// channel that is closed when it has exited.
func (d *daemon) run(t *testing.T, cmd *exec.Cmd) <-chan struct{} {
	t.Helper()
	log, err := os.Create(d.logPath)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	// Nothing is inherited: a proxy from the environment would be asked in
	// place of the hosts under test.
	cmd.Env = []string{"PATH=/nonexistent"}
	cmd.SysProcAttr = isolation()
	stopped, err := startProcess(cmd)
	if err != nil {
		t.Fatalf("starting containerd: %v: it needs a mount namespace, so run the test as root with CAP_SYS_ADMIN or as a user who may create user namespaces", err)
	}
	t.Cleanup(func() { d.stop(t, cmd.Process, stopped) })
	return stopped
}

// isolation gives the daemon a mount namespace of its own, so that it leaves
// no mount behind however it ends, and, for an ordinary user, a user namespace
// in which it may mount at all.
func isolation() *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	if uid := os.Geteuid(); uid != 0 {
		attr.Cloneflags = syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	return attr
}

func (d *daemon) stop(t *testing.T, process *os.Process, stopped <-chan struct{}) {
	const patience = 15 * time.Second
	_ = process.Signal(syscall.SIGTERM)
	select {
	case <-stopped:
	case <-time.After(patience):
		_ = process.Kill()
		<-stopped
		t.Errorf("containerd (pid %d) did not stop within %v of SIGTERM", process.Pid, patience)
	}
	if t.Failed() {
		t.Logf("containerd's log:\n%s", d.logExcerpt())
	}
}

// connect waits until the image service answers.
func (d *daemon) connect(t *testing.T, socket string, stopped <-chan struct{}) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	d.images = cri.NewImageServiceClient(conn)

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	go func() {
		select {
		case <-stopped:
			cancel()
		case <-ctx.Done():
		}
	}()
	if _, err := d.images.ListImages(ctx, &cri.ListImagesRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatalf("waiting for containerd's image service: %v\n%s", err, d.logExcerpt())
	}

	d.client, err = containerdclient.New(socket, containerdclient.WithDefaultNamespace("k8s.io"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.client.Close() })
}

// pull has containerd pull ref and returns the image's identifier, which is
// the digest of its configuration.
func (d *daemon) pull(ctx context.Context, ref string) (string, error) {
	return d.pullAs(ctx, ref, nil)
}

// pullAs is pull with a pull secret.
func (d *daemon) pullAs(ctx context.Context, ref string, secret *cri.AuthConfig) (string, error) {
	resp, err := d.images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, Auth: secret})
	if err != nil {
		return "", err
	}
	return resp.ImageRef, nil
}

// remove takes ref out of containerd and fails the test unless every byte of
// it has gone, so that the next pull has to fetch everything.
func (d *daemon) remove(t *testing.T, ref string) {
	t.Helper()
	if _, err := d.images.RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Fatalf("removing %s: %v", ref, err)
	}
	d.collectGarbage(t)
	var left []string
	err := d.client.ContentStore().Walk(t.Context(), func(info content.Info) error {
		left = append(left, info.Digest.String())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	err = d.client.SnapshotService(snapshotter).Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
		left = append(left, "snapshot "+info.Name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Fatalf("containerd kept after removing %s: %s", ref, left)
	}
}

// collectGarbage runs containerd's garbage collector to the end: deleting a
// lease synchronously is how a client asks for that.
func (d *daemon) collectGarbage(t *testing.T) {
	t.Helper()
	manager := d.client.LeasesService()
	lease, err := manager.Create(t.Context(), leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	if err := manager.Delete(t.Context(), lease, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
}

// unpacked returns the files of a pulled image as containers would see them:
// the path below the root, without a leading slash, and the digest of the
// content, for regular files only.
func (d *daemon) unpacked(t *testing.T, ref string) map[string]digest.Digest {
	t.Helper()
	// The lease keeps the garbage collector, which runs after every pull and
	// removal, from the view.
	ctx, release, err := d.client.WithLease(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := release(ctx); err != nil {
			t.Errorf("ending the lease: %v", err)
		}
	}()
	image, err := d.client.GetImage(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	diffIDs, err := image.RootFS(ctx)
	if err != nil {
		t.Fatal(err)
	}
	const view = "inspection"
	service := d.client.SnapshotService(snapshotter)
	mounts, err := service.View(ctx, view, chainID(diffIDs))
	if err != nil {
		t.Fatal(err)
	}
	if len(mounts) != 1 || mounts[0].Type != "bind" {
		t.Fatalf("snapshot of %s: mounts %v, want one bind mount", ref, mounts)
	}
	return digestTree(t, mounts[0].Source)
}

func chainID(diffIDs []digest.Digest) string {
	chain := diffIDs[0]
	for _, id := range diffIDs[1:] {
		chain = digest.FromString(chain.String() + " " + id.String())
	}
	return chain.String()
}

func digestTree(t *testing.T, root string) map[string]digest.Digest {
	t.Helper()
	files := map[string]digest.Digest{}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		files[name], err = digest.FromReader(f)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// logEntry is what of a line of the daemon's log says something about a pull.
type logEntry struct {
	Level       string `json:"level"`
	Msg         string `json:"msg"`
	URL         string `json:"url"`
	Method      string `json:"request.method"`
	Range       string `json:"request.header.range"`
	Status      string `json:"response.status"`
	CacheStatus string `json:"response.header.cache-status"`
	Error       string `json:"error"`
}

// The messages of an HTTP exchange's two entries.
const (
	logRequest  = "do request"
	logResponse = "fetch response received"
)

// newLog returns what the daemon has logged since offset, and the offset after
// that. A line still without its end is left for the next call.
func (d *daemon) newLog(offset int64) ([]logEntry, int64, error) {
	data, err := os.ReadFile(d.logPath)
	if err != nil {
		return nil, offset, err
	}
	var entries []logEntry
	for line := range bytes.Lines(data[offset:]) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break
		}
		offset += int64(len(line))
		var entry logEntry
		if json.Unmarshal(line, &entry) != nil {
			entry = logEntry{Level: "error", Msg: string(bytes.TrimSpace(line))}
		}
		entries = append(entries, entry)
	}
	return entries, offset, nil
}

// exchange is one HTTP request of containerd to a registry, or the answer to
// one, from its log. Requests and answers are in their order, and go together
// by Host and Path only.
type exchange struct {
	Host string // host:port
	Path string

	Method string // of a request
	Range  string // a request's Range header

	Status      int    // of an answer, 0 for a request
	CacheStatus string // an answer's Cache-Status header
}

// exchanges returns what went between containerd and registries since the last
// call.
func (d *daemon) exchanges(t *testing.T) trace {
	t.Helper()
	entries, end, err := d.newLog(d.logSeen)
	if err != nil {
		t.Fatal(err)
	}
	d.logSeen = end
	var found trace
	for _, entry := range entries {
		if entry.Msg != logRequest && entry.Msg != logResponse {
			continue
		}
		u, err := url.Parse(entry.URL)
		if err != nil {
			t.Fatalf("containerd's log: %v", err)
		}
		e := exchange{Host: u.Host, Path: u.Path, Method: entry.Method, Range: entry.Range, CacheStatus: entry.CacheStatus}
		if entry.Msg == logResponse {
			if _, err := fmt.Sscan(entry.Status, &e.Status); err != nil {
				t.Fatalf("containerd's log: status %q: %v", entry.Status, err)
			}
		}
		found = append(found, e)
	}
	return found
}

// logExcerpt is what the daemon did for pulls, and what it complained of.
func (d *daemon) logExcerpt() string {
	entries, _, err := d.newLog(0)
	if err != nil {
		return err.Error()
	}
	var b strings.Builder
	for _, e := range entries {
		if e.Msg != logRequest && e.Msg != logResponse && (e.Level == "debug" || e.Level == "info" && !strings.HasPrefix(e.Msg, "PullImage")) {
			continue
		}
		fields := []string{e.Msg, e.Method, e.URL, e.Range, e.Status, e.CacheStatus, e.Error}
		fields = slices.DeleteFunc(fields, func(s string) bool { return s == "" })
		fmt.Fprintln(&b, strings.Join(fields, "  "))
	}
	return b.String()
}
