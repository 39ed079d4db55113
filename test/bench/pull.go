package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
)

// snapshotter is what nodes unpack with, unless they are told otherwise.
const snapshotter = "overlayfs"

// mostCold is how much longer a cold pull may take through the cache.
const mostCold = 1.05

// coldPull compares how long containerd takes to pull an image that neither it
// nor the cache has, through the cache and without it: as the kubelet has it
// pulled, unpacked as it comes. It tells as well how long it takes without the
// unpacking, which nobody waits for alone but which shows the cache's own cost
// best, and what of the processor the cache takes for that.
//
// perSecond is what the network to the registry carries, in bytes; 0: as much as
// the processors do, which registry, cache and containerd then share.
func (b *benchmark) coldPull(perSecond float64) ([]line, error) {
	made, err := b.seedPull()
	if err != nil {
		return nil, err
	}
	from := b.standalone.addr
	if perSecond > 0 {
		w, err := startWire(from, perSecond)
		if err != nil {
			return nil, err
		}
		defer w.stop()
		from = w.addr
	}
	b.upstream = "https://" + from
	defer func() { b.upstream = "" }()
	d, err := b.startContainerd(made.size + pullLayers*pullLayer)
	if err != nil {
		return nil, err
	}
	defer d.stop()
	pulled, _, err := b.pulls(d, true)
	if err != nil {
		return nil, err
	}
	fetched, busy, err := b.pulls(d, false)
	if err != nil {
		return nil, err
	}
	whole := pulled.line("s", bound{most: mostCold})
	worst := line{unit: "s worst", ours: slices.Max(pulled.ours), theirs: slices.Max(pulled.theirs)}
	worst.ratio = worst.ours / worst.theirs
	return []line{
		whole, worst,
		fetched.line("s fetch", bound{}),
		{unit: "CPU s/GB", ours: median(busy) / (float64(made.size) / 1e9)},
	}, nil
}

// pulls has both sides pull in turns, until it is sure on which side of the bound
// they are. busy is the processor time that the cache took for each pull.
func (b *benchmark) pulls(d *containerdProcess, unpack bool) (took samples, busy []float64, err error) {
	turn := func(ours bool) (float64, error) {
		if err := b.restartCache(func() error { return os.RemoveAll(b.cacheDir) }); err != nil {
			return 0, err
		}
		var hosts string
		if ours {
			hosts = fmt.Sprintf("[host.'http://%s']\n", b.cache.addr)
		}
		hosts += fmt.Sprintf("[host.'%s']\n  ca = %q\n", b.upstream, b.caFile())
		syscall.Sync() // what was written before is not this pull's to wait for
		if err := warmMemory(pullMemory); err != nil {
			return 0, err
		}
		return d.pull(hosts, unpack)
	}
	if _, err := turn(true); err != nil { // the first is slower than all others
		return took, nil, err
	}
	enough := func() bool { return took.decided(mostCold) || !unpack }
	err = turnsUntil(b.rounds+2, 4*b.rounds, enough, func(ours bool) error {
		seconds, err := turn(ours)
		if err != nil {
			return err
		}
		took.add(ours, seconds)
		if ours {
			cpu, err := b.cache.cpu()
			busy = append(busy, cpu.Seconds())
			return err
		}
		return nil
	})
	return took, busy, err
}

// pullMemory is more than what a pull through the cache takes of the kernel's
// memory, in bytes.
const pullMemory = 2 << 30

// warmMemory has the machine hold so much memory, and sets it free. A hypervisor
// may take back what has been free for some seconds, and who uses it next waits
// some microseconds for each page: that is no matter of either side, but a pull
// through the cache, which keeps what it fetches, uses more pages.
func warmMemory(size int) error {
	memory, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON|syscall.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("taking %d bytes of memory: %w", size, err)
	}
	return syscall.Munmap(memory)
}

// containerdProcess is a containerd that pulls images, and no more.
type containerdProcess struct {
	*process
	client *containerd.Client
	dir    string // all that it keeps
	hosts  string // hosts.toml of cachedHost
}

// startContainerd starts one that has room for size bytes. It keeps them in memory
// where there is enough of it: how long a file system takes to create the files
// of an image is not of interest, and varies.
func (b *benchmark) startContainerd(size int64) (_ *containerdProcess, err error) {
	program, err := containerdProgram()
	if err != nil {
		return nil, err
	}
	dir, err := b.roomFor(size)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dir)
		}
	}()
	d := &containerdProcess{dir: dir, hosts: filepath.Join(dir, "certs.d", cachedHost, "hosts.toml")}
	if err := os.MkdirAll(filepath.Dir(d.hosts), 0o755); err != nil {
		return nil, err
	}
	addr, err := freeAddress()
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "socket")
	config := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `version = 3
root = '%[1]s/root'
state = '%[1]s/state'
temp = '%[1]s/temp'
imports = []
disabled_plugins = [
  'io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime', 'io.containerd.grpc.v1.cri',
  'io.containerd.internal.v1.opt', 'io.containerd.internal.v1.tracing', 'io.containerd.tracing.processor.v1.otlp',
  'io.containerd.monitor.container.v1.restart', 'io.containerd.monitor.task.v1.cgroups', 'io.containerd.nri.v1.nri',
  'io.containerd.snapshotter.v1.blockfile', 'io.containerd.snapshotter.v1.erofs', 'io.containerd.differ.v1.erofs',
]
[grpc]
address = '%[2]s'
[ttrpc]
address = '%[2]s.ttrpc'
[metrics]
address = '%[3]s'
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
platform = 'linux'
snapshotter = '%[4]s'
differ = 'walking'
`, dir, socket, addr, snapshotter), 0o600); err != nil {
		return nil, err
	}
	// What it mounts while it unpacks ends with it.
	if d.process, err = start(addr, filepath.Join(b.dir, "containerd.log"), "unshare", "--mount", program, "--config", config); err != nil {
		return nil, err
	}
	d.client, err = containerd.New(socket, containerd.WithDefaultNamespace("k8s.io"), containerd.WithTimeout(startTime))
	if err != nil {
		d.process.stop()
		return nil, d.died(err)
	}
	return d, nil
}

// containerdProgram is the containerd that the tests pull with.
func containerdProgram() (string, error) {
	cmd := exec.Command("go", "tool", "-n", "containerd")
	cmd.Dir = filepath.Join("..", "containerd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0",
		"GOFLAGS=-tags=no_btrfs,no_devmapper,no_zfs,no_tracing,urfave_cli_no_docs,osusergo,netgo")
	var said bytes.Buffer
	cmd.Stderr = &said
	path, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("building containerd: %w: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	return strings.TrimSpace(string(path)), nil
}

func (d *containerdProcess) stop() {
	_ = d.client.Close()
	d.process.stop()
	os.RemoveAll(d.dir)
}

// pull takes the image out that was pulled before, pulls it by a hosts.toml, and
// returns how many seconds the pull took.
func (d *containerdProcess) pull(hosts string, unpack bool) (float64, error) {
	const ref = cachedHost + "/" + pullName + ":latest"
	if err := os.WriteFile(d.hosts, []byte(hosts), 0o644); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	source, err := registry.NewOCIRegistry(ctx, ref, registry.WithHostDir(filepath.Dir(filepath.Dir(d.hosts))))
	if err != nil {
		return 0, err
	}
	if err := d.remove(ctx, ref); err != nil {
		return 0, err
	}
	var opts []image.StoreOpt
	if unpack {
		opts = append(opts, image.WithUnpack(platforms.DefaultSpec(), snapshotter))
	}
	begun := time.Now()
	if err := d.client.Transfer(ctx, source, image.NewStore(ref, opts...)); err != nil {
		return 0, fmt.Errorf("containerd pulls %s: %w", ref, err)
	}
	took := time.Since(begun)
	return took.Seconds(), d.check(ctx, ref, unpack)
}

// remove takes an image out, if it is there, with all that it consists of. A pull
// that follows at once gets the memory that this sets free; see warmMemory.
func (d *containerdProcess) remove(ctx context.Context, ref string) error {
	if err := d.client.ImageService().Delete(ctx, ref); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	// The end of a lease, when waited for, is when the garbage has gone.
	lease, err := d.client.LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		return err
	}
	return d.client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete)
}

// check reports an image that is not unpacked although it should be, or is
// although it should not.
func (d *containerdProcess) check(ctx context.Context, ref string, unpacked bool) error {
	pulled, err := d.client.GetImage(ctx, ref)
	if err != nil {
		return err
	}
	is, err := pulled.IsUnpacked(ctx, snapshotter)
	if err == nil && is != unpacked {
		err = fmt.Errorf("containerd has pulled %s: unpacked %t, want %t", ref, is, unpacked)
	}
	return err
}
