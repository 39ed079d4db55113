package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"golang.org/x/sync/semaphore"
)

const (
	pullReady = "ready"
	pullDone  = "done"
	// pullStreams is how many layers containerd fetches at a time, unless it is
	// told otherwise.
	pullStreams = 3
)

// servePull fetches an image into a content store of its own, with the code that
// containerd fetches with and its way to read hosts.toml, when a line comes in.
func servePull(ctx context.Context, hosts, root, image string) error {
	store, err := local.NewStore(root)
	if err != nil {
		return err
	}
	fmt.Println(pullReady)
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return err
	}
	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts: config.ConfigureHosts(ctx, config.HostOptions{HostDir: config.HostDirFromRoot(hosts)}),
	})
	name, described, err := resolver.Resolve(ctx, image)
	if err != nil {
		return err
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return err
	}
	all := images.Handlers(remotes.FetchHandler(store, fetcher), images.ChildrenHandler(store))
	if err := images.Dispatch(ctx, all, semaphore.NewWeighted(pullStreams), described); err != nil {
		return err
	}
	fmt.Println(pullDone)
	return nil
}

// puller is a client in a process of its own.
type puller struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
	said strings.Builder
}

// pullAtOnce has so many clients pull the image through the cache, each into a
// store of its own, and returns when the last one was ready. size is how much
// each of them takes.
func (b *benchmark) pullAtOnce(clients int, size int64) (last time.Duration, err error) {
	dir, err := b.roomFor(int64(clients) * size)
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	hosts := filepath.Join(dir, "certs.d")
	if err := os.MkdirAll(filepath.Join(hosts, cachedHost), 0o755); err != nil {
		return 0, err
	}
	if err := os.WriteFile(filepath.Join(hosts, cachedHost, "hosts.toml"), fmt.Appendf(nil, "[host.'http://%s']\n", b.cache.addr), 0o644); err != nil {
		return 0, err
	}
	var all []*puller
	defer func() {
		for _, p := range all {
			err = errors.Join(err, p.end())
		}
	}()
	for i := range clients {
		p, err := b.startPuller(hosts, filepath.Join(dir, fmt.Sprint("store-", i)))
		if err != nil {
			return 0, err
		}
		all = append(all, p)
	}
	syscall.Sync()
	begun := time.Now()
	next := all
	err = each(clients, func(mu *sync.Mutex) error {
		mu.Lock()
		p := next[0]
		next = next[1:]
		mu.Unlock()
		if _, err := io.WriteString(p.in, "\n"); err != nil {
			return err
		}
		return p.await(pullDone)
	})
	return time.Since(begun), err
}

// roomFor makes a directory for so many bytes: in memory where there is enough
// of it, so that one disk does not stand for those of all nodes.
func (b *benchmark) roomFor(size int64) (string, error) {
	const shm = "/dev/shm"
	var fs syscall.Statfs_t
	if err := syscall.Statfs(shm, &fs); err == nil && int64(fs.Bavail)*fs.Bsize > 2*size {
		return os.MkdirTemp(shm, "connected-registry-bench-")
	}
	return os.MkdirTemp(b.dir, "stores-")
}

func (b *benchmark) startPuller(hosts, store string) (*puller, error) {
	p := &puller{cmd: exec.Command(b.self, rolePull, hosts, store, cachedHost+"/"+pullName+":latest")}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.cmd.Stderr = &p.said
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	if err := p.await(pullReady); err != nil {
		return nil, errors.Join(err, p.end())
	}
	return p, nil
}

func (p *puller) await(word string) error {
	line, err := p.out.ReadString('\n')
	if err == nil && strings.TrimSpace(line) != word {
		err = fmt.Errorf("it said %q", line)
	}
	if err != nil {
		return fmt.Errorf("a client that pulls: %w", err)
	}
	return nil
}

// end waits until the process has ended, which it does when its input has.
func (p *puller) end() error {
	p.in.Close()
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("a client that pulls: %w: %s", err, strings.TrimSpace(p.said.String()))
	}
	return nil
}
