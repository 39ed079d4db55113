package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
	"github.com/connected-registry/connected-registry/syncer"
)

// syncOptions are what the sync engine is told.
type syncOptions struct {
	Root, Parent string
	Repositories []string
	Concurrency  int
}

// syncResult is how a synchronisation went.
type syncResult struct {
	Seconds      float64
	BytesFetched int64
	TagsUpdated  int
	Complete     bool
	Error        string
}

// serveSync synchronises once for each line that it reads, and prints how it
// went.
func serveSync(ctx context.Context, options string) error {
	var o syncOptions
	if err := json.Unmarshal([]byte(options), &o); err != nil {
		return err
	}
	store, err := storage.Open(ctx, storage.Config{Root: o.Root})
	if err != nil {
		return err
	}
	defer store.Close()
	config := syncer.Config{
		Store:       store.Namespace(),
		Driver:      store.Driver(),
		Parent:      syncer.Parent{Endpoint: o.Parent, Insecure: true},
		Concurrency: o.Concurrency,
		Referrers:   true,
	}
	for _, name := range o.Repositories {
		config.Repositories = append(config.Repositories, v1alpha1.Repository{Name: name})
	}
	s, err := syncer.New(config)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		result, err := s.Sync(ctx, v1alpha1.SyncTriggerSchedule)
		r := syncResult{Seconds: result.End.Sub(result.Start).Seconds(), BytesFetched: result.BytesFetched, TagsUpdated: result.TagsUpdated, Complete: err == nil}
		if err != nil {
			r.Error = err.Error()
		}
		if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
			return err
		}
	}
	return lines.Err()
}

// syncProcess is the sync engine in a process of its own.
type syncProcess struct {
	*process
	in  io.WriteCloser
	out *bufio.Reader
}

func (b *benchmark) startSync(o syncOptions) (*syncProcess, error) {
	options, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(b.self, roleSync, string(options))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Env = append(os.Environ(), "GOMAXPROCS=") // all processors, as in real life
	log, err := os.Create(filepath.Join(b.dir, "sync.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stderr = log
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &syncProcess{&process{cmd: cmd, log: log.Name(), ended: make(chan error, 1)}, in, bufio.NewReader(out)}
	if line, err := p.out.ReadString('\n'); err != nil || line != "ready\n" {
		err := p.died(fmt.Errorf("it is not ready: %q %w", line, err))
		p.kill()
		return nil, err
	}
	return p, nil
}

// sync synchronises once.
func (p *syncProcess) sync() (r syncResult, err error) {
	if _, err := io.WriteString(p.in, "sync\n"); err != nil {
		return r, err
	}
	line, err := p.out.ReadBytes('\n')
	if err != nil {
		return r, p.died(err)
	}
	if err := json.Unmarshal(line, &r); err != nil {
		return r, err
	}
	if !r.Complete {
		return r, errors.New(r.Error)
	}
	return r, nil
}

// kill ends the process as a power failure of the program would.
func (p *syncProcess) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

// end lets the process end by itself, when it has nothing to do.
func (p *syncProcess) end() {
	p.in.Close()
	p.cmd.Wait()
}

// begin synchronises until it ends, or somebody kills it; the channel gets nil
// when it has ended well.
func (p *syncProcess) begin() <-chan error {
	ended := make(chan error, 1)
	go func() {
		_, err := p.sync()
		ended <- err
	}()
	return ended
}
