// Command demo does the project's main job on one machine, without root and
// without a network: an image arrives from a parent registry, is pulled through
// containerd's own resolver by the hosts.toml that was written for it, and goes
// on being pulled while one hop after another is stopped.
//
// DEMO_IMAGE names an image to use instead of the embedded one: an OCI layout
// (a directory or a tar of one) or what `docker save` writes.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	parentregistry "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/standalone"
)

// limit bounds the whole demonstration.
const limit = 2 * time.Minute

const repository = "demo/app"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, limit)
	err := run(ctx, os.Stdout)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer) (err error) {
	start := time.Now()
	dir, err := os.MkdirTemp("", "connected-registry-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	d := &demo{dir: dir, out: out}
	defer d.stopAll()
	for _, step := range []func(context.Context) error{
		d.startParent, d.seed, d.openProduct, d.synchronise, d.checkSignature, d.configureNode, d.pulls,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "\nevery digest verified; done in %s\n", seconds(time.Since(start)))
	return nil
}

// demo is the state of one demonstration.
type demo struct {
	dir string
	out io.Writer

	parent     *server
	parentAddr string
	handler    http.Handler // the parent's content outlives its stops
	index      v1.ImageIndex
	platforms  []string

	product *standalone.Standalone
	parts   map[string]*part // what runs of the product, by hop
	node    *node
}

func (d *demo) startParent(ctx context.Context) (err error) {
	if d.handler == nil {
		blobs := filepath.Join(d.dir, "parent")
		if err := os.Mkdir(blobs, 0o755); err != nil {
			return err
		}
		d.handler = parentregistry.New(parentregistry.WithBlobHandler(parentregistry.NewDiskBlobHandler(blobs)), parentregistry.WithReferrersSupport(true),
			parentregistry.Logger(log.New(io.Discard, "", 0)))
	}
	addr := d.parentAddr
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	if d.parent, err = serve(ctx, addr, d.handler); err != nil {
		return fmt.Errorf("starting the parent registry: %w", err)
	}
	d.parentAddr = d.parent.addr
	return nil
}

// seed pushes the image under two tags and attaches a signature to it.
func (d *demo) seed(ctx context.Context) (err error) {
	if file := os.Getenv("DEMO_IMAGE"); file != "" {
		d.index, err = loadImage(file, d.dir)
	} else {
		d.index, err = machineImage()
	}
	if err != nil {
		return err
	}
	for _, tag := range []string{"v1", "latest"} {
		ref, err := name.ParseReference(d.reference(tag))
		if err != nil {
			return err
		}
		if err := remote.WriteIndex(ref, d.index, remote.WithContext(ctx)); err != nil {
			return fmt.Errorf("seeding the parent: %w", err)
		}
	}
	if err := d.sign(ctx); err != nil {
		return err
	}
	return d.describeImage()
}

func (d *demo) sign(ctx context.Context) error {
	subject, err := partial.Descriptor(d.index)
	if err != nil {
		return err
	}
	sig, err := signature(*subject)
	if err != nil {
		return err
	}
	digest, err := sig.Digest()
	if err != nil {
		return err
	}
	ref, err := name.NewDigest(d.parentAddr + "/" + repository + "@" + digest.String())
	if err != nil {
		return err
	}
	if err := remote.Write(ref, sig, remote.WithContext(ctx)); err != nil {
		return fmt.Errorf("attaching the signature: %w", err)
	}
	return nil
}

func (d *demo) describeImage() error {
	m, err := d.index.IndexManifest()
	if err != nil {
		return err
	}
	layers := map[v1.Hash]int64{}
	for _, child := range m.Manifests {
		if !child.MediaType.IsImage() {
			continue
		}
		img, err := d.index.Image(child.Digest)
		if err != nil {
			return err
		}
		im, err := img.Manifest()
		if err != nil {
			return err
		}
		for _, l := range im.Layers {
			layers[l.Digest] = l.Size
		}
		if p := child.Platform; p != nil && p.OS != "unknown" {
			d.platforms = append(d.platforms, p.OS+"/"+p.Architecture)
		}
	}
	if len(d.platforms) == 0 {
		return errors.New("the image names no platform")
	}
	var size int64
	for _, n := range layers {
		size += n
	}
	d.platforms = slices.Compact(d.platforms)
	fmt.Fprintf(d.out, "parent    %s/%s, tags v1 and latest, %s, %d layers, %s, signed\n",
		d.parentAddr, repository, strings.Join(d.platforms, " and "), len(layers), megabytes(size))
	return nil
}

// resource is what an operator would write.
func (d *demo) resource() (*v1alpha1.ConnectedRegistry, error) {
	return v1alpha1.Load("demo", fmt.Appendf(nil, `
apiVersion: connectedregistry.io/v1alpha1
kind: ConnectedRegistry
metadata:
  name: demo
spec:
  parent:
    endpoint: %s
    insecure: true
  repositories:
    - name: %s
  anonymousPull: true
  logLevel: Error
`, d.parentAddr, repository))
}

func (d *demo) openProduct(ctx context.Context) error {
	r, err := d.resource()
	if err != nil {
		return err
	}
	node := filepath.Join(d.dir, "node")
	if err := os.Mkdir(node, 0o755); err != nil {
		return err
	}
	d.product, err = standalone.Open(ctx, standalone.Config{
		Resource:    r,
		Data:        filepath.Join(d.dir, "data"),
		Listen:      "127.0.0.1:0",
		CacheListen: "127.0.0.1:0",
		NodeRoot:    node,
	})
	if err != nil {
		return err
	}
	d.parts = map[string]*part{
		hopRegistry: start(ctx, d.product.Registry.Run),
		hopCache:    start(ctx, d.product.Cache.Run),
	}
	return nil
}

func (d *demo) synchronise(ctx context.Context) error {
	r, err := d.product.Syncer.Sync(ctx, v1alpha1.SyncTriggerInitial)
	if err != nil {
		return fmt.Errorf("synchronising: %w", err)
	}
	for _, repo := range r.Repositories {
		fmt.Fprintf(d.out, "sync      %s: %d of %d tags complete, %d blobs, %s in %s\n", repo.Name,
			repo.TagsPresent, repo.TagsWanted, r.BlobsFetched, megabytes(r.BytesFetched), seconds(r.End.Sub(r.Start)))
	}
	return nil
}

// checkSignature asks the registry what refers to the image and fetches it.
func (d *demo) checkSignature(ctx context.Context) error {
	roots := x509.NewCertPool()
	pem, err := os.ReadFile(filepath.Join(d.dir, "data", "ca", "ca.crt"))
	if err != nil {
		return err
	}
	roots.AppendCertsFromPEM(pem)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	defer tr.CloseIdleConnections()
	options := []remote.Option{remote.WithContext(ctx), remote.WithTransport(tr)}

	subject, err := d.index.Digest()
	if err != nil {
		return err
	}
	ref, err := name.NewDigest(d.product.LoginServer + "/" + repository + "@" + subject.String())
	if err != nil {
		return err
	}
	index, err := remote.Referrers(ref, options...)
	if err != nil {
		return fmt.Errorf("asking for referrers: %w", err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		return err
	}
	if len(m.Manifests) != 1 {
		return fmt.Errorf("%d referrers of %s at the registry, expected the signature", len(m.Manifests), subject)
	}
	sig, err := remote.Image(ref.Context().Digest(m.Manifests[0].Digest.String()), options...)
	if err != nil {
		return fmt.Errorf("fetching the signature: %w", err)
	}
	if err := validate.Image(sig, validate.Fast); err != nil {
		return fmt.Errorf("fetching the signature: %w", err)
	}
	fmt.Fprintf(d.out, "          its signature came along: %s\n", m.Manifests[0].Digest)
	return nil
}

func (d *demo) configureNode(ctx context.Context) error {
	if _, err := d.product.Agent.Apply(ctx); err != nil {
		return fmt.Errorf("configuring the node: %w", err)
	}
	certs := filepath.Join(d.dir, "node", "etc", "containerd", "certs.d")
	d.node = &node{certsDir: certs, hopOf: map[string]string{
		strings.TrimPrefix(d.product.CacheURL, "http://"): hopCache,
		d.product.LoginServer:                             hopRegistry,
		d.parentAddr:                                      hopUpstream,
	}}
	fmt.Fprintf(d.out, "node      containerd asks: 1 cache %s  2 registry https://%s  3 upstream http://%s\n\n",
		d.product.CacheURL, d.product.LoginServer, d.parentAddr)
	return nil
}

// pulls stops one hop after another. The first line fills the cache with one
// platform; what the other platform does not share with it is not there until
// the second line.
func (d *demo) pulls(ctx context.Context) error {
	first, last := d.platforms[0], d.platforms[len(d.platforms)-1]
	const row = "%-44s %-12s %-11s %11s %14s %14s %8s %8s\n"
	fmt.Fprintf(d.out, row, "pull of "+repository, "platform", "answered by", "its disk", "from registry", "from upstream", "digests", "time")
	for _, p := range []struct {
		state    string
		prepare  func(context.Context) error
		ref      string
		platform string
		by       string // who has to answer
		most     source // where most of the bytes have to come from
	}{
		{"everything runs, cache cold", nil, d.reference("v1"), first, hopCache, viaRegistry},
		{"parent stopped", d.stopParent, d.reference("latest"), last, hopCache, ""},
		{"parent and registry stopped", d.stop(hopRegistry), d.reference("v1"), first, hopCache, fromDisk},
		{"parent and cache stopped, registry restarted", d.registryOnly, d.reference("v1"), first, hopRegistry, viaRegistry},
		{"cache and registry stopped, parent restarted", d.parentOnly, d.reference("v1"), first, hopUpstream, fromUpstream},
	} {
		if p.prepare != nil {
			if err := p.prepare(ctx); err != nil {
				return err
			}
		}
		got, err := d.node.pull(ctx, p.ref, p.platform)
		if err != nil {
			return fmt.Errorf("%s: %w", p.state, err)
		}
		if err := got.check(p.by, p.most); err != nil {
			return fmt.Errorf("%s: %w", p.state, err)
		}
		fmt.Fprintf(d.out, row, p.state, p.platform, p.by, megabytes(got.From[fromDisk]), megabytes(got.From[viaRegistry]),
			megabytes(got.From[fromUpstream]), strconv.Itoa(got.Digests), seconds(got.Time))
	}
	return nil
}

func (d *demo) stopParent(context.Context) error {
	d.parent.stop()
	return nil
}

func (d *demo) stop(hop string) func(context.Context) error {
	return func(context.Context) error {
		p := d.parts[hop]
		delete(d.parts, hop)
		return p.stop()
	}
}

// registryOnly stops what runs of the product and opens it again on what it
// keeps, with the same address and CA but without cache and node: a restart.
func (d *demo) registryOnly(ctx context.Context) error {
	if err := d.stop(hopCache)(ctx); err != nil {
		return err
	}
	d.product.Close()
	r, err := d.resource()
	if err != nil {
		return err
	}
	listen := d.product.LoginServer
	d.product, err = standalone.Open(ctx, standalone.Config{Resource: r, Data: filepath.Join(d.dir, "data"), Listen: listen})
	if err != nil {
		return err
	}
	d.parts[hopRegistry] = start(ctx, d.product.Registry.Run)
	return nil
}

func (d *demo) parentOnly(ctx context.Context) error {
	if err := d.stop(hopRegistry)(ctx); err != nil {
		return err
	}
	return d.startParent(ctx)
}

func (d *demo) stopAll() {
	for _, p := range d.parts {
		_ = p.stop() // its error was reported by the step that needed it
	}
	if d.product != nil {
		d.product.Close()
	}
	if d.parent != nil {
		d.parent.stop()
	}
}

func (d *demo) reference(tag string) string {
	return d.parentAddr + "/" + repository + ":" + tag
}

// part is a part of the product that can be stopped by itself.
type part struct {
	cancel context.CancelFunc
	done   chan error
}

func start(ctx context.Context, run func(context.Context) error) *part {
	ctx, cancel := context.WithCancel(ctx)
	p := &part{cancel: cancel, done: make(chan error, 1)}
	go func() { p.done <- run(ctx) }()
	return p
}

func (p *part) stop() error {
	p.cancel()
	return <-p.done
}

// server is an HTTP server that can be stopped and started again on its
// address.
type server struct {
	addr string
	http *http.Server
	done chan struct{}
}

func serve(ctx context.Context, addr string, h http.Handler) (*server, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	s := &server{addr: l.Addr().String(), http: &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		_ = s.http.Serve(l) // ends with Close
	}()
	return s, nil
}

func (s *server) stop() {
	_ = s.http.Close() // the listener is gone either way
	<-s.done
}

func megabytes(n int64) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
