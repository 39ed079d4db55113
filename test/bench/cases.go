package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// cachedHost is the registry that the node cache is asked for.
const cachedHost = "registry.test"

const (
	pushUser     = "bench"
	pushPassword = "correct horse battery staple"
)

// benchmark holds what the cases share: files and running servers.
type benchmark struct {
	options
	dir     string
	self    string // this program
	content content
	tls     *tls.Config

	standalone         *process // TLS
	plain              *process
	distribution       *process
	distributionTLS    *process
	cache              *process
	nginx              *process
	running            []*process
	cacheDir, nginxDir string
	upstream           string    // of the cache; "": standalone
	pullImage          pullImage // once it is written
}

func (b *benchmark) data() string   { return filepath.Join(b.dir, "data") }
func (b *benchmark) caFile() string { return filepath.Join(b.data(), "ca", "ca.crt") }

func (b *benchmark) stop() {
	for _, p := range b.running {
		p.stop()
	}
}

// prepare builds the programs, writes the files and starts the servers.
func (b *benchmark) prepare(ctx context.Context) (err error) {
	if b.self, err = os.Executable(); err != nil {
		return err
	}
	ours, theirs := filepath.Join(b.dir, "connected-registry"), filepath.Join(b.dir, "distribution")
	if err := build(ctx, "../..", ours, "./cmd/connected-registry"); err != nil {
		return err
	}
	if err := build(ctx, ".", theirs, "github.com/distribution/distribution/v3/cmd/registry"); err != nil {
		return err
	}
	for name, pkg := range map[string]string{"regsync": "github.com/regclient/regclient/cmd/regsync", "crane": "github.com/google/go-containerregistry/cmd/crane"} {
		if err := build(ctx, ".", filepath.Join(b.dir, name), pkg); err != nil {
			return err
		}
	}
	root := filepath.Join(b.data(), "registry")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if b.content, err = seed(ctx, root); err != nil {
		return err
	}
	if err := b.startRegistries(ours, theirs, root); err != nil {
		return err
	}
	if err := b.startNginx(); err != nil {
		return err
	}
	b.cacheDir = filepath.Join(b.dir, "cache")
	return b.startCache()
}

func (b *benchmark) start(name, addr, program string, args ...string) (*process, error) {
	p, err := start(addr, filepath.Join(b.dir, name+".log"), program, args...)
	if err == nil {
		b.running = append(b.running, p)
	}
	return p, err
}

func (b *benchmark) startRegistries(ours, theirs, root string) (err error) {
	if b.standalone, err = b.startStandalone(ours); err != nil {
		return err
	}
	if b.plain, err = b.start("registry", "", b.self, roleRegistry, root); err != nil {
		return err
	}
	pem, err := os.ReadFile(b.caFile())
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	b.tls = &tls.Config{RootCAs: pool, ServerName: "127.0.0.1"}
	if b.distribution, err = b.startDistribution(theirs, root, ""); err != nil {
		return err
	}
	b.distributionTLS, err = b.startDistribution(theirs, root, fmt.Sprintf("\n  tls:\n    certificate: %[1]s/tls.crt\n    key: %[1]s/tls.key", filepath.Join(b.data(), "tls")))
	return err
}

func (b *benchmark) startStandalone(program string) (*process, error) {
	secret := filepath.Join(b.data(), "secrets", pushUser)
	if err := os.MkdirAll(secret, 0o700); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(secret, "password1"), []byte(pushPassword), 0o600); err != nil {
		return nil, err
	}
	config := filepath.Join(b.dir, "standalone.yaml")
	if err := os.WriteFile(config, []byte(`apiVersion: connectedregistry.io/v1alpha1
kind: ConnectedRegistry
metadata: {name: bench}
spec:
  mode: ReadWrite
  anonymousPull: true
  clientTokens:
    - name: bench
      secretRef: {name: bench}
      scopeMap: [{repositories: ["**"], actions: [content/read, content/write]}]
`), 0o600); err != nil {
		return nil, err
	}
	addr, err := freeAddress()
	if err != nil {
		return nil, err
	}
	return b.start("standalone", addr, program, "standalone", "--config", config, "--data", b.data(),
		"--listen", addr, "--cache-listen", "", "--node-root", "")
}

// startDistribution starts distribution's registry as its example configuration
// has it, but without a log of requests, of which ours has none either.
func (b *benchmark) startDistribution(program, root, more string) (*process, error) {
	addr, err := freeAddress()
	if err != nil {
		return nil, err
	}
	name := "distribution-" + addr[strings.LastIndexByte(addr, ':')+1:]
	config := filepath.Join(b.dir, name+".yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `version: 0.1
log:
  level: error
  accesslog: {disabled: true}
storage:
  cache: {blobdescriptor: inmemory}
  filesystem: {rootdirectory: %s}
  tag: {concurrencylimit: 8}
  maintenance: {uploadpurging: {enabled: false}}
http:
  addr: %s%s
`, root, addr, more), 0o600); err != nil {
		return nil, err
	}
	return b.start(name, addr, program, "serve", config)
}

// startNginx serves the layer and the manifest as files.
func (b *benchmark) startNginx() error {
	program, err := exec.LookPath("nginx")
	if err != nil {
		if program, err = exec.LookPath("/usr/sbin/nginx"); err != nil {
			return errors.New("nginx is not installed: install the package nginx-light")
		}
	}
	b.nginxDir = filepath.Join(b.dir, "nginx")
	if err := os.MkdirAll(filepath.Join(b.nginxDir, "files"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(b.nginxDir, "files", "manifest"), b.content.manifest, 0o644); err != nil {
		return err
	}
	if err := os.Link(b.content.layerFile, filepath.Join(b.nginxDir, "files", "layer")); err != nil {
		return err
	}
	addr, err := freeAddress()
	if err != nil {
		return err
	}
	config := filepath.Join(b.nginxDir, "nginx.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, `daemon off;
worker_processes auto;
pid %[1]s/pid;
error_log stderr error;
events { worker_connections 512; }
http {
  access_log off;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000000;
  default_type %[2]s;
  client_body_temp_path %[1]s/body;
  proxy_temp_path %[1]s/proxy;
  fastcgi_temp_path %[1]s/fastcgi;
  uwsgi_temp_path %[1]s/uwsgi;
  scgi_temp_path %[1]s/scgi;
  server { listen %[3]s; root %[1]s/files; }
}
`, b.nginxDir, manifestType, addr), 0o644); err != nil {
		return err
	}
	b.nginx, err = b.start("nginx", addr, program, "-p", b.nginxDir, "-e", "stderr", "-c", config)
	return err
}

func (b *benchmark) startCache() (err error) {
	upstream := cmp.Or(b.upstream, "https://"+b.standalone.addr)
	b.cache, err = b.start("cache", "", b.self, roleCache, b.cacheDir, upstream, b.caFile())
	return err
}

// restartCache starts the cache anew, after doing something to its directory.
func (b *benchmark) restartCache(between func() error) error {
	b.stopLast() // which is the cache
	if between != nil {
		if err := between(); err != nil {
			return err
		}
	}
	return b.startCache()
}

// stopLast stops the server that was started last.
func (b *benchmark) stopLast() {
	last := len(b.running) - 1
	b.running[last].stop()
	b.running = b.running[:last]
}

func (b *benchmark) groups() []group {
	lessCPU := downloadBounds{rate: bound{least: 1}, cpu: bound{most: 1}}
	fourTimes := requestBounds{perSecond: bound{least: 4}, p99: bound{most: 1}}
	likeNginx := downloadBounds{rate: bound{least: 1}, cpu: bound{most: 1.2}}
	halfNginx := requestBounds{perSecond: bound{least: 0.5}, p99: bound{mostOurs: 2}}
	return []group{
		{"registry", "distribution", []benchCase{
			{"manifest GET by tag", func() ([]line, error) { return b.registryManifest("GET", false, fourTimes) }},
			{"manifest HEAD by tag", func() ([]line, error) { return b.registryManifest("HEAD", false, fourTimes) }},
			{"manifest GET by tag, TLS", func() ([]line, error) { return b.registryManifest("GET", true, requestBounds{}) }},
			{"blob GET, 256 MiB", func() ([]line, error) { return b.registryBlob(false, lessCPU) }},
			{"blob GET, 256 MiB, TLS", func() ([]line, error) { return b.registryBlob(true, lessCPU) }},
			{"32 clients pull 1 GiB each, TLS", b.pullMemory},
			{fmt.Sprintf("push of %d GiB in 64 MiB chunks", b.push), b.pushMemory},
		}},
		{"replica, 200,000 blobs", "one", []benchCase{
			{"replica: start", b.ready},
		}},
		{"node cache", "nginx", []benchCase{
			{"cache: 4 fills of 1 GiB at once", b.fillMemory},
			{"cache: blob GET, 256 MiB", func() ([]line, error) { return b.cacheBlob(likeNginx) }},
			{"cache: manifest GET by digest", func() ([]line, error) { return b.cacheManifest("GET", b.content.manifestByDigest(), halfNginx) }},
			{"cache: manifest HEAD by digest", func() ([]line, error) { return b.cacheManifest("HEAD", b.content.manifestByDigest(), halfNginx) }},
			{"cache: manifest GET, traced", func() ([]line, error) { return b.cacheTraced("GET", b.content.manifestByDigest()) }},
			{"cache: manifest HEAD by tag", func() ([]line, error) { return b.cacheManifest("HEAD", b.content.manifestPath(), requestBounds{}) }},
			{"cache: 100,000 blobs", b.manyBlobs},
		}},
		{"node cache, 1 GiB unpacked", "without", []benchCase{
			{"cache: cold pull, 1 Gbit/s", func() ([]line, error) { return b.coldPull(gigabit) }},
			{"cache: cold pull, loopback", func() ([]line, error) { return b.coldPull(0) }},
		}},
		{fmt.Sprintf("node cache, at %d MiB/s", waveRate>>20), "1 client", []benchCase{
			{"cache: 16 clients at once", b.wave},
		}},
		{"sync", "best other", b.syncCases()},
	}
}

func (b *benchmark) registryManifest(method string, secure bool, bounds requestBounds) ([]line, error) {
	t := target{method: method, path: b.content.manifestPath(), accept: manifestType}
	ours, theirs := b.registrySides(t, secure)
	return b.compareRequests(ours, theirs, bounds)
}

func (b *benchmark) registryBlob(secure bool, bounds downloadBounds) ([]line, error) {
	ours, theirs := b.registrySides(target{method: "GET", path: blobPath(b.content.layer)}, secure)
	return b.compareDownloads(ours, theirs, bounds)
}

func (b *benchmark) registrySides(t target, secure bool) (ours, theirs side) {
	p, q := b.plain, b.distribution
	if secure {
		t.tls = b.tls
		p, q = b.standalone, b.distributionTLS
	}
	return t.from(p), t.from(q)
}

func (t target) from(p *process) side {
	t.addr = p.addr
	return side{t, p}
}

func (b *benchmark) pullMemory() ([]line, error) {
	t := target{method: "GET", path: blobPath(b.content.large[0]), tls: b.tls}
	return b.standalone.memory(func() error {
		// In full where the machine is fast enough for it.
		_, _, err := download(t.from(b.standalone).target, 32, 20*time.Second, true)
		return err
	}, bound{mostOurs: 80})
}

func (b *benchmark) pushMemory() ([]line, error) {
	return b.standalone.memory(b.pushLayer, bound{mostOurs: 80})
}

// pushLayer uploads a layer of so many GiB in chunks.
func (b *benchmark) pushLayer() error {
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: b.tls}}
	defer client.CloseIdleConnections()
	chunk := make([]byte, 64<<20)
	rand.NewChaCha8([32]byte{1}).Read(chunk)
	base := "https://" + b.standalone.addr
	location, err := upload(client, "POST", base+"/v2/bench/pushed/blobs/uploads/", nil, http.StatusAccepted, "")
	if err != nil {
		return err
	}
	hash := sha256.New()
	for sent := 0; sent < b.push<<30; sent += len(chunk) {
		hash.Write(chunk)
		last := fmt.Sprintf("%d-%d", sent, sent+len(chunk)-1)
		if location, err = upload(client, "PATCH", location, chunk, http.StatusAccepted, last); err != nil {
			return err
		}
	}
	u, err := url.Parse(location)
	if err != nil {
		return err
	}
	query := u.Query()
	query.Set("digest", digest.NewDigest(digest.SHA256, hash).String())
	u.RawQuery = query.Encode()
	_, err = upload(client, "PUT", u.String(), nil, http.StatusCreated, "")
	return err
}

// upload makes one request of an upload and returns where to go on.
func upload(client *http.Client, method, where string, body []byte, want int, contentRange string) (string, error) {
	r, err := http.NewRequest(method, where, bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	r.SetBasicAuth(pushUser, pushPassword)
	if contentRange != "" {
		r.Header.Set("Content-Range", contentRange)
		r.Header.Set("Content-Type", "application/octet-stream")
	}
	answer, err := client.Do(r)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	said, err := io.ReadAll(answer.Body)
	if err != nil {
		return "", err
	}
	if answer.StatusCode != want {
		return "", fmt.Errorf("%s: %s: %s", method, answer.Status, said)
	}
	location, err := r.URL.Parse(answer.Header.Get("Location"))
	if err != nil {
		return "", err
	}
	return location.String(), nil
}

// cached is a request for something that the cache holds, or will.
func (b *benchmark) cached(method, path string) side {
	return target{method: method, path: path + "?ns=" + cachedHost, accept: manifestType}.from(b.cache)
}

// fetch brings something into the cache.
func (b *benchmark) fetch(path string) error {
	const limit = time.Minute
	_, took, err := download(b.cached("GET", path).target, 1, limit, true)
	if err == nil && took >= limit {
		err = fmt.Errorf("fetching %s took more than %v", path, limit)
	}
	return err
}

func (b *benchmark) cacheBlob(bounds downloadBounds) ([]line, error) {
	path := blobPath(b.content.layer)
	if err := b.fetch(path); err != nil {
		return nil, err
	}
	theirs := target{method: "GET", path: "/layer"}.from(b.nginx)
	return b.compareDownloads(b.cached("GET", path), theirs, bounds)
}

func (b *benchmark) cacheManifest(method, path string, bounds requestBounds) ([]line, error) {
	if err := b.fetch(path); err != nil {
		return nil, err
	}
	theirs := target{method: method, path: "/manifest"}.from(b.nginx)
	return b.compareRequests(b.cached(method, path), theirs, bounds)
}

// cacheTraced is cacheManifest with requests none of which is repeated, for
// which the cache has a shorter way.
func (b *benchmark) cacheTraced(method, path string) ([]line, error) {
	if err := b.fetch(path); err != nil {
		return nil, err
	}
	ours := b.cached(method, path)
	theirs := target{method: method, path: "/manifest"}.from(b.nginx)
	ours.traced, theirs.traced = true, true
	return b.compareRequests(ours, theirs, requestBounds{})
}

func (b *benchmark) fillMemory() ([]line, error) {
	return b.cache.memory(func() error {
		next := b.content.large
		return each(len(next), func(mu *sync.Mutex) error {
			mu.Lock()
			d := next[0]
			next = next[1:]
			mu.Unlock()
			return b.fetch(blobPath(d))
		})
	}, bound{mostOurs: 64})
}

// manyBlobs starts the cache on a full directory, and measures until it answers
// with something from it, and the memory it takes when it has looked at all.
func (b *benchmark) manyBlobs() ([]line, error) {
	if err := b.fetch(b.content.manifestByDigest()); err != nil {
		return nil, err
	}
	var begun time.Time
	err := b.restartCache(func() error {
		err := fillCache(b.cacheDir, 100_000)
		begun = time.Now()
		return err
	})
	if err != nil {
		return nil, err
	}
	for err = errors.New("not asked"); err != nil; {
		if time.Since(begun) > startTime {
			return nil, err
		}
		err = b.fetch(b.content.manifestByDigest())
	}
	ready := time.Since(begun)
	if err := b.cache.untilIdle(); err != nil {
		return nil, err
	}
	peak, err := b.cache.peak()
	return []line{
		{unit: "s ready", ours: ready.Seconds(), bound: bound{mostOurs: 1}},
		{unit: "peak MiB", ours: float64(peak) / (1 << 20), bound: bound{mostOurs: 64}},
	}, err
}
