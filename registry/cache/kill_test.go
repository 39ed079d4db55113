package cache

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// The environment of a process that is a cache and nothing else, to be killed.
const (
	processDir = "CACHE_TEST_PROCESS_DIR"
	processURL = "CACHE_TEST_PROCESS_UPSTREAM"
)

// runProcess is what such a process does.
func runProcess() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	c, err := New(Config{
		Dir: os.Getenv(processDir), Registries: upstreams(os.Getenv(processURL)),
		Listener: l, Logger: quiet(), Timeouts: patient,
	})
	if err != nil {
		return err
	}
	fmt.Println("http://" + l.Addr().String())
	return c.Run(context.Background())
}

// process is a cache in a process of its own.
type process struct {
	cmd *exec.Cmd
	url string
}

func startProcess(t *testing.T, dir, upstream string) *process {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), processDir+"="+dir, processURL+"="+upstream)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	p := &process{cmd, strings.TrimSpace(line)}
	t.Cleanup(p.kill)
	return p
}

// kill is kill -9.
func (p *process) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

// TestKilledMidPull kills the cache while containerd pulls through it: the pull
// goes on with the next host, and the next cache on the same directory makes
// use of what is there, and serves nothing that is not right.
func TestKilledMidPull(t *testing.T) {
	small, large := random(5<<20, 80), random(20<<20, 81)
	o, direct := newOrigin(t), newOrigin(t)
	image(o, small, large)
	all := image(direct, small, large)
	g := newGate(18 << 20)
	serve := g.serve(large)
	d := digest.FromBytes(large)
	o.setFront(only(blobURL("app", d), serve))
	dir := t.TempDir()
	p := startProcess(t, dir, o.URL)
	c := newContainerd(t, p.url, direct.URL)
	pulled := make(chan error)
	go func() { pulled <- c.pull(1) }()
	st := &store{dir: dir}
	awaitFile(t, func() bool {
		fi, err := os.Stat(st.partialPath(d))
		_, small := os.Stat(st.blobPath(digest.FromBytes(small)))
		return err == nil && small == nil && fi.Size() > 17<<20
	})
	p.kill()
	if err := <-pulled; err != nil {
		t.Fatalf("the pull that lost its cache: %v", err)
	}
	for _, body := range all {
		c.has(body)
	}
	g.open(len(large))
	o.setFront(nil)
	o.forget()

	p = startProcess(t, dir, o.URL)
	c = newContainerd(t, p.url, refusing(t))
	if err := c.pull(1); err != nil {
		t.Fatal(err)
	}
	for _, body := range all {
		c.has(body)
	}
	for i, asked := range o.asked {
		switch {
		case strings.HasPrefix(asked, "GET") && strings.Contains(asked, d.Encoded()):
			if from := parseRange(o.ranges[i]).first; from < checkpointEvery {
				t.Errorf("the large layer was fetched again from %d", from)
			}
		case strings.HasPrefix(asked, "GET /v2/app/blobs/"):
			t.Errorf("fetched again: %s", asked)
		}
	}
}

func awaitFile(t *testing.T, there func() bool) {
	t.Helper()
	for range 10_000 {
		if there() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("it did not happen within 10 seconds")
}

// TestKilledAtRandom kills the cache again and again while it fills, and checks
// each time that only right content is served.
func TestKilledAtRandom(t *testing.T) {
	o := newOrigin(t)
	var bodies [][]byte
	for i := range 6 {
		body := random(1<<20+i*1234567, byte(90+i))
		o.blob("app", body)
		bodies = append(bodies, body)
	}
	dir := t.TempDir()
	for round := range 6 {
		p := startProcess(t, dir, o.URL)
		n := &node{t: t, url: p.url, client: newClient()}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			defer close(done)
			for _, body := range bodies {
				got, err := fetch(ctx, n, blobURL("app", digest.FromBytes(body)))
				if err != nil {
					return // killed meanwhile
				}
				if digest.FromBytes(got) != digest.FromBytes(body) {
					done <- errors.New("wrong bytes ended well")
				}
			}
		}()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(time.Duration(5+round*7) * time.Millisecond):
		}
		p.kill()
		if err := <-done; err != nil {
			t.Error(err)
		}
		cancel()
		n.client.CloseIdleConnections()
	}
	n := start(t, Config{Dir: dir, Registries: upstreams(o.URL)})
	for _, body := range bodies {
		r := n.get(blobURL("app", digest.FromBytes(body)))
		if r.err != nil || digest.FromBytes(r.body) != digest.FromBytes(body) {
			t.Errorf("%d, %v", r.status, r.err)
		}
	}
}

func fetch(ctx context.Context, n *node, path string) ([]byte, error) {
	resp, err := n.client.Do(newGet(ctx, n.url+path+"?ns="+testHost))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(resp.Body)
}
