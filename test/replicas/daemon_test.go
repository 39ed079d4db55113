package replicas

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"text/template"
	"time"

	containerdclient "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/platforms"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// configuration is a containerd with the image service alone.
var configuration = template.Must(template.New("config.toml").Parse(`version = 3
root = '{{.Dir}}/root'
state = '{{.Dir}}/state'
temp = '{{.Dir}}/temp'
imports = []
disabled_plugins = ['io.containerd.differ.v1.erofs', 'io.containerd.image-verifier.v1.bindir', 'io.containerd.internal.v1.opt',
  'io.containerd.internal.v1.tracing', 'io.containerd.monitor.container.v1.restart', 'io.containerd.monitor.task.v1.cgroups',
  'io.containerd.nri.v1.nri', 'io.containerd.snapshotter.v1.blockfile', 'io.containerd.snapshotter.v1.erofs',
  'io.containerd.snapshotter.v1.overlayfs', 'io.containerd.tracing.processor.v1.otlp']
[debug]
level = 'warn'
[grpc]
address = '{{.Socket}}'
[ttrpc]
address = '{{.Socket}}.ttrpc'
[plugins.'io.containerd.cri.v1.images']
snapshotter = 'native'
[plugins.'io.containerd.cri.v1.images'.registry]
config_path = '{{.Dir}}/certs.d'
[plugins.'io.containerd.cri.v1.runtime']
cdi_spec_dirs = []
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ['{{.Dir}}/cni']
conf_dir = '{{.Dir}}/cni'
[plugins.'io.containerd.transfer.v1.local']
concurrent_layer_fetch_buffer = {{.Buffer}}
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
platform = '{{.Platform}}'
snapshotter = 'native'
differ = 'walking'
`))

// node is a real containerd, and the kubelet that asks it for images.
type node struct {
	t       *testing.T
	images  cri.ImageServiceClient
	client  *containerdclient.Client
	patient patience
	pulls   atomic.Int64
}

// startNode starts a containerd that fetches layers in pieces of so many bytes,
// by Range; 0: each with one request.
func startNode(t *testing.T, s *site, buffer int) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctrd-") // short, for a socket's address
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "c.sock")
	file, err := os.Create(filepath.Join(dir, "config.toml"))
	if err == nil {
		err = configuration.Execute(file, map[string]any{"Dir": dir, "Socket": socket, "Platform": platforms.DefaultString(), "Buffer": buffer})
		file.Close()
	}
	if err == nil {
		err = writeHosts(filepath.Join(dir, "certs.d"), s.host, filepath.Join(s.dir, "ca.crt"))
	}
	if err != nil {
		t.Fatal(err)
	}
	log := new(tail)
	cmd := exec.Command(containerdPath, "--config", file.Name())
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = []string{"PATH=/nonexistent"} // no proxy either
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	p, err := start(cmd)
	if err != nil {
		t.Fatalf("starting containerd: %v: it wants root", err)
	}
	t.Cleanup(func() {
		p.terminate(t)
		if t.Failed() {
			t.Logf("containerd's log:\n%s", log)
		}
	})
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	n := &node{t: t, images: cri.NewImageServiceClient(conn)}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := n.images.ListImages(ctx, &cri.ListImagesRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatalf("containerd does not answer: %v\n%s", err, log)
	}
	if n.client, err = containerdclient.New(socket, containerdclient.WithDefaultNamespace("k8s.io")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.client.Close() })
	return n
}

func writeHosts(certs, host, ca string) error {
	dir := filepath.Join(certs, host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), fmt.Appendf(nil, "server = \"https://%[1]s\"\n[host.\"https://%[1]s\"]\nca = %[2]q\n", host, ca), 0o600)
}

// run pulls images, and removes each before it comes again, until ctx ends.
func (n *node) run(ctx context.Context, host string, images map[string]*image) {
	for ctx.Err() == nil {
		for ref, i := range images {
			if err := n.pull(context.WithoutCancel(ctx), host+"/"+ref, i); err != nil {
				n.t.Error(err)
				return
			}
			n.pulls.Add(1)
		}
	}
}

func (n *node) pull(ctx context.Context, ref string, i *image) error {
	err := n.patient.try(ctx, "containerd pulling "+ref, func() error {
		answer, err := n.images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, Auth: &cri.AuthConfig{Username: user, Password: password}})
		if err == nil && answer.ImageRef != i.config.Digest.String() {
			err = fmt.Errorf("containerd pulled %s, pushed was %s", answer.ImageRef, i.config.Digest)
		}
		return err
	})
	if err != nil {
		return err
	}
	if _, err := n.images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		return err
	}
	// A lease that ends synchronously has the garbage collected first.
	manager := n.client.LeasesService()
	lease, err := manager.Create(ctx, leases.WithRandomID())
	if err != nil {
		return err
	}
	return manager.Delete(ctx, lease, leases.SynchronousDelete)
}
