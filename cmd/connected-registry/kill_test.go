package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	parentregistry "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// TestKilledInMidSync kills the process while it synchronises, and finds that
// the next one shows nothing that is not whole and fetches nothing again that
// was.
func TestKilledInMidSync(t *testing.T) {
	parent := newParent(t)
	img, err := random.Image(1<<20, 8)
	if err != nil {
		t.Fatal(err)
	}
	ref := parent.push(t, "team/app:v1", img)
	dir := t.TempDir()
	config := writeConfig(t, dir, parent.host)

	parent.hold(4) // blobs are answered, the others wait for the kill
	first := startStandalone(t, dir, config)
	parent.waitHeld(t)
	stored := waitStored(t, dir, 1)
	if _, err := first.pull(t, ref); err == nil {
		t.Error("the image can be pulled although blobs of it are missing")
	}
	first.kill(t)

	parent.release()
	before := parent.counts()
	second := startStandalone(t, dir, config)
	got := second.waitImage(t, ref)
	if err := validate.Image(got); err != nil {
		t.Errorf("image after the restart: %v", err)
	}
	after := parent.counts()
	for _, hex := range stored {
		if n := after[hex] - before[hex]; n != 0 {
			t.Errorf("blob %s was complete before the kill and was fetched %d times after it", hex, n)
		}
	}
	second.interrupt(t)
}

// parent is a registry that can hold back blobs.
type parent struct {
	host string

	mu      sync.Mutex
	fetched map[string]int // GETs of blobs by hex
	left    int            // GETs of blobs that may still be answered; negative: any number
	held    chan struct{}  // closed when the first one is held back
	open    chan struct{}  // closed when all may be answered
}

func newParent(t *testing.T) *parent {
	p := &parent{fetched: map[string]int{}, left: -1, held: make(chan struct{}), open: make(chan struct{})}
	next := parentregistry.New(parentregistry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, hex, ok := strings.Cut(r.URL.Path, "/blobs/sha256:"); ok && r.Method == http.MethodGet {
			if !p.admit(r.Context(), hex) {
				return
			}
		}
		next.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	p.host = strings.TrimPrefix(s.URL, "http://")
	return p
}

func (p *parent) admit(ctx context.Context, hex string) bool {
	p.mu.Lock()
	p.fetched[hex]++
	admitted := p.left != 0
	if p.left > 0 {
		p.left--
	}
	if !admitted {
		select {
		case <-p.held:
		default:
			close(p.held)
		}
	}
	p.mu.Unlock()
	if admitted {
		return true
	}
	select {
	case <-p.open:
		return true
	case <-ctx.Done():
		return false
	}
}

func (p *parent) hold(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left = n
}

func (p *parent) release() {
	p.hold(-1)
	close(p.open)
}

func (p *parent) waitHeld(t *testing.T) {
	t.Helper()
	select {
	case <-p.held:
	case <-time.After(30 * time.Second):
		t.Fatal("the parent was not asked for blobs")
	}
}

func (p *parent) counts() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	counts := map[string]int{}
	for hex, n := range p.fetched {
		counts[hex] = n
	}
	return counts
}

func (p *parent) push(t *testing.T, tagged string, img v1.Image) (repoAndTag string) {
	t.Helper()
	ref, err := name.ParseReference(p.host + "/" + tagged)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	return tagged
}

func writeConfig(t *testing.T, dir, parent string) string {
	t.Helper()
	file := filepath.Join(dir, "registry.yaml")
	err := os.WriteFile(file, fmt.Appendf(nil, `apiVersion: connectedregistry.io/v1alpha1
kind: ConnectedRegistry
metadata:
  name: test
spec:
  parent:
    endpoint: %s
    insecure: true
  repositories:
    - name: team/app
  sync:
    concurrency: 2
  anonymousPull: true
`, parent), 0o644)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// process is a running `connected-registry standalone`.
type process struct {
	cmd  *exec.Cmd
	done chan error
	addr string // of the registry
	http http.RoundTripper
}

var serving = regexp.MustCompile(`registry=https://(\S+)`)

func startStandalone(t *testing.T, dir, config string) *process {
	t.Helper()
	node := filepath.Join(dir, "node")
	if err := os.MkdirAll(node, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "standalone", "--config", config, "--data", filepath.Join(dir, "data"),
		"--listen", "127.0.0.1:0", "--cache-listen", "127.0.0.1:0", "--node-root", node)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: cmd, done: make(chan error, 1)}
	addr := make(chan string, 1)
	go func() {
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			if m := serving.FindStringSubmatch(lines.Text()); m != nil {
				addr <- m[1]
			}
		}
		p.done <- cmd.Wait()
	}()
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // ended already, but for a test that failed
	select {
	case p.addr = <-addr:
	case err := <-p.done:
		t.Fatalf("standalone ended at once: %v", err)
	case <-time.After(30 * time.Second):
		t.Fatal("standalone does not serve")
	}
	pem, err := os.ReadFile(filepath.Join(dir, "data", "ca", "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	t.Cleanup(tr.CloseIdleConnections)
	p.http = tr
	return p
}

func (p *process) kill(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.done
}

// interrupt ends the process as Ctrl-C does, and wants it gone in five seconds
// and satisfied.
func (p *process) interrupt(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-p.done:
		if err != nil {
			t.Errorf("standalone after an interrupt: %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("standalone runs on five seconds after an interrupt")
	}
}

func (p *process) pull(t *testing.T, repoAndTag string) (v1.Image, error) {
	t.Helper()
	ref, err := name.ParseReference(p.addr + "/" + repoAndTag)
	if err != nil {
		t.Fatal(err)
	}
	return remote.Image(ref, remote.WithTransport(p.http), remote.WithContext(t.Context()))
}

// waitImage waits until the image can be pulled.
func (p *process) waitImage(t *testing.T, repoAndTag string) v1.Image {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		img, err := p.pull(t, repoAndTag)
		if err == nil {
			return img
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s did not arrive: %v", repoAndTag, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// waitStored waits until at least n blobs are in the registry's storage, and
// returns their digests in hex.
func waitStored(t *testing.T, dir string, n int) []string {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		files, err := filepath.Glob(filepath.Join(dir, "data", "registry", "docker", "registry", "v2", "blobs", "sha256", "*", "*", "data"))
		if err != nil {
			t.Fatal(err)
		}
		if len(files) >= n {
			var hex []string
			for _, f := range files {
				hex = append(hex, filepath.Base(filepath.Dir(f)))
			}
			return hex
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d blobs stored", len(files), n)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// waitFile waits until a process that reports its end on done has made a file.
func waitFile(t *testing.T, name string, done <-chan error) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		if _, err := os.Stat(name); err == nil {
			return
		}
		select {
		case err := <-done:
			t.Fatalf("the process ended before it made %s: %v", name, err)
		case <-deadline:
			t.Fatalf("%s was not made", name)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
