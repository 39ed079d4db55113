package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"

	"github.com/connected-registry/connected-registry/storage"
)

const (
	pullName   = "bench/pull"
	pullLayers = 8
	pullLayer  = 128 << 20
	pullRounds = 3
)

// pullImage is an image of 1 GiB in the registry's store.
type pullImage struct {
	manifest digest.Digest
	config   digest.Digest
	layers   []digest.Digest
}

// seedPull writes the image when a case first needs it.
func (b *benchmark) seedPull() (pullImage, error) {
	if b.pullImage.manifest != "" {
		return b.pullImage, nil
	}
	ctx := context.Background()
	root := filepath.Join(b.data(), "registry")
	store, err := storage.Open(ctx, storage.Config{Root: root})
	if err != nil {
		return pullImage{}, err
	}
	defer store.Close()
	repo, err := store.Repository(pullName)
	if err != nil {
		return pullImage{}, err
	}
	var made pullImage
	config := []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`)
	if made.config, err = seedBlob(root, bytes.NewReader(config)); err != nil {
		return pullImage{}, err
	}
	var layers []string
	for i := range pullLayers {
		d, err := seedBlob(root, io.LimitReader(rand.NewChaCha8([32]byte{2, byte(i)}), pullLayer))
		if err != nil {
			return pullImage{}, err
		}
		made.layers = append(made.layers, d)
		layers = append(layers, fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.layer.v1.tar","size":%d,"digest":%q}`, pullLayer, d))
	}
	for _, d := range append(made.layers, made.config) {
		if err := repo.LinkLayer(ctx, d); err != nil {
			return pullImage{}, err
		}
	}
	body := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","size":%d,"digest":%q},"layers":[%s]}`,
		manifestType, len(config), made.config, strings.Join(layers, ","))
	made.manifest = digest.FromBytes(body)
	b.pullImage = made
	return made, repo.PutManifest(ctx, made.manifest, body, "latest")
}

func seedBlob(root string, content io.Reader) (digest.Digest, error) {
	f, err := os.CreateTemp(root, "layer-")
	if err != nil {
		return "", err
	}
	defer f.Close()
	digester := digest.Canonical.Digester()
	if _, err := io.Copy(io.MultiWriter(f, digester.Hash()), content); err != nil {
		return "", err
	}
	_, err = place(root, f, digester.Digest())
	return digester.Digest(), err
}

// coldPull compares how long containerd takes to fetch an image that neither
// it nor the cache has, through the cache and without it. It is not unpacked:
// that would take the same time on either side and hide the difference.
func (b *benchmark) coldPull() ([]line, error) {
	if _, err := b.seedPull(); err != nil {
		return nil, err
	}
	d, err := b.startContainerd()
	if err != nil {
		return nil, err
	}
	defer d.stop()
	var took samples
	err = turns(pullRounds, func(ours bool) error {
		if err := b.restartCache(func() error { return os.RemoveAll(b.cacheDir) }); err != nil {
			return err
		}
		var hosts string
		if ours {
			hosts = fmt.Sprintf("[host.'http://%s']\n", b.cache.addr)
		}
		hosts += fmt.Sprintf("[host.'https://%s']\n  ca = %q\n", b.standalone.addr, b.caFile())
		seconds, err := d.pull(hosts)
		took.add(ours, seconds)
		return err
	})
	if err != nil {
		return nil, err
	}
	return []line{took.line("s", bound{most: 1.05})}, nil
}

// containerdProcess is a containerd that fetches images, and no more.
type containerdProcess struct {
	*process
	client *containerd.Client
	hosts  string // hosts.toml of cachedHost
}

func (b *benchmark) startContainerd() (*containerdProcess, error) {
	program, err := containerdProgram()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(b.dir, "containerd")
	d := &containerdProcess{hosts: filepath.Join(dir, "certs.d", cachedHost, "hosts.toml")}
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
snapshotter = 'native'
differ = 'walking'
`, dir, socket, addr), 0o600); err != nil {
		return nil, err
	}
	if d.process, err = start(addr, filepath.Join(b.dir, "containerd.log"), program, "--config", config); err != nil {
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
}

// pull fetches the image by a hosts.toml, takes it out again, and returns how
// many seconds the fetch took.
func (d *containerdProcess) pull(hosts string) (float64, error) {
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
	begun := time.Now()
	if err := d.client.Transfer(ctx, source, image.NewStore(ref)); err != nil {
		return 0, fmt.Errorf("containerd fetches %s: %w", ref, err)
	}
	took := time.Since(begun)
	if err := d.client.ImageService().Delete(ctx, ref); err != nil {
		return 0, err
	}
	// The end of a lease, when waited for, is when the garbage has gone.
	lease, err := d.client.LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		return 0, err
	}
	return took.Seconds(), d.client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete)
}

const (
	waveClients = 16
	waveRate    = 100 << 20 // bytes per second of the link to the registry
)

// wave has 16 clients pull the image at the same time through an empty cache,
// from a registry behind a link of a fixed rate: without one, all that is
// measured is how many processors there are. It compares with one client.
func (b *benchmark) wave() ([]line, error) {
	made, err := b.seedPull()
	if err != nil {
		return nil, err
	}
	link, err := startLink("https://"+b.standalone.addr, &http.Transport{TLSClientConfig: b.tls})
	if err != nil {
		return nil, err
	}
	defer link.stop()
	b.upstream = "http://" + link.addr
	defer func() { b.upstream = "" }()
	var took samples
	err = turns(1, func(ours bool) error {
		if err := b.restartCache(func() error { return os.RemoveAll(b.cacheDir) }); err != nil {
			return err
		}
		link.forget()
		clients := 1
		if ours {
			clients = waveClients
		}
		begun := time.Now()
		if err := each(clients, func(*sync.Mutex) error { return b.pullOnce(made) }); err != nil {
			return err
		}
		took.add(ours, time.Since(begun).Seconds())
		return link.once(append(made.layers, made.config, made.manifest))
	})
	if err != nil {
		return nil, err
	}
	if err := b.restartCache(nil); err != nil { // back to the registry itself
		return nil, err
	}
	return []line{took.line("s", bound{most: 1.2})}, nil
}

// pullOnce asks for what a pull asks for, three layers at a time.
func (b *benchmark) pullOnce(made pullImage) error {
	if err := b.fetch("/v2/" + pullName + "/manifests/" + made.manifest.String()); err != nil {
		return err
	}
	next := make(chan digest.Digest, pullLayers+1)
	for _, d := range append(made.layers, made.config) {
		next <- d
	}
	close(next)
	return each(3, func(*sync.Mutex) error {
		for d := range next {
			if err := b.fetch("/v2/" + pullName + "/blobs/" + d.String()); err != nil {
				return err
			}
		}
		return nil
	})
}

// link passes requests on to a registry, at a fixed rate for all together.
type link struct {
	addr   string
	server *http.Server
	limit  *rate.Limiter

	mu    sync.Mutex // guards asked
	asked map[string]int
}

func startLink(to string, transport *http.Transport) (*link, error) {
	u, err := url.Parse(to)
	if err != nil {
		return nil, err
	}
	l := &link{limit: rate.NewLimiter(waveRate, 1<<20), asked: map[string]int{}}
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(u) },
		Transport: transport,
		ModifyResponse: func(r *http.Response) error {
			if r.Request.Method == http.MethodGet {
				l.mu.Lock()
				l.asked[r.Request.URL.Path]++
				l.mu.Unlock()
			}
			r.Body = &limited{r.Body, r.Request.Context(), l.limit}
			return nil
		},
		BufferPool: chunks{},
	}
	if l.addr, err = freeAddress(); err != nil {
		return nil, err
	}
	l.server = &http.Server{Addr: l.addr, Handler: proxy}
	listening := make(chan error, 1)
	go func() { listening <- l.server.ListenAndServe() }()
	for range 100 {
		select {
		case err := <-listening:
			return nil, err
		case <-time.After(10 * time.Millisecond):
		}
		if answer, err := http.Head("http://" + l.addr + "/v2/"); err == nil {
			answer.Body.Close()
			return l, nil
		}
	}
	return nil, errors.New("the link does not listen")
}

func (l *link) stop() { _ = l.server.Close() }

func (l *link) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.asked)
}

// once reports what was not fetched exactly once.
func (l *link) once(want []digest.Digest) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range want {
		n := 0
		for path, times := range l.asked {
			if strings.HasSuffix(path, "/"+d.String()) {
				n += times
			}
		}
		if n != 1 {
			all, _ := json.Marshal(l.asked)
			return fmt.Errorf("%s was fetched %d times: %s", d, n, all)
		}
	}
	return nil
}

type limited struct {
	io.ReadCloser
	ctx   context.Context
	limit *rate.Limiter
}

func (r *limited) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p[:min(len(p), 1<<20)])
	if e := r.limit.WaitN(r.ctx, n); e != nil && err == nil {
		err = e
	}
	return n, err
}

// chunks are the proxy's buffers.
type chunks struct{}

func (chunks) Get() []byte { return make([]byte, 256<<10) }
func (chunks) Put([]byte)  {}
