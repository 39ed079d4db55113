package replicas

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sys/unix"
)

// smallDisk mounts a file system of so many bytes where nobody sees it but who
// has the file: it is not attached to any directory, and goes with its last user.
func smallDisk(t *testing.T, size int) *os.File {
	t.Helper()
	disk, err := func() (*os.File, error) {
		context, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
		if err != nil {
			return nil, err
		}
		defer unix.Close(context)
		if err := unix.FsconfigSetString(context, "size", fmt.Sprint(size)); err != nil {
			return nil, err
		}
		if err := unix.FsconfigCreate(context); err != nil {
			return nil, err
		}
		fd, err := unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, 0)
		return os.NewFile(uintptr(fd), "small disk"), err
	}()
	if err != nil {
		t.Fatalf("making a small disk: %v: it wants root", err)
	}
	t.Cleanup(func() { disk.Close() })
	return disk
}

// isFull reports whether an error is the answer that the disk is full.
func isFull(err error) bool {
	var t *transport.Error
	return isStatus(err, http.StatusInsufficientStorage) || errors.As(err, &t) && t.StatusCode == http.StatusInsufficientStorage ||
		strings.Contains(err.Error(), "507 Insufficient Storage")
}

// TestFullDisk has the disk fill up under pushes, a replica killed and started
// again meanwhile, and the disk freed. What was acknowledged can be pulled all the
// time, and pushes go on when there is space.
func TestFullDisk(t *testing.T) {
	disk := smallDisk(t, 64<<20)
	s := newSite(t, "/proc/self/fd/3", disk) // the first of a process's further files
	here := fmt.Sprintf("/proc/self/fd/%d", disk.Fd())
	ballast := filepath.Join(here, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 32<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	l := newLedger()
	work := startLoad(t, s, l)
	var mu sync.Mutex
	refused := 0
	count := func() bool {
		mu.Lock()
		defer mu.Unlock()
		refused++
		return true
	}
	for _, w := range work.workers {
		w.fresh = true
		w.tolerates = func(err error) bool { return isFull(err) && count() }
	}
	work.begin(t, s)
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) || t.Failed() {
				t.Fatalf("still not: %s\n%s", what, &s.log)
			}
		}
	}
	seen := func() int {
		mu.Lock()
		defer mu.Unlock()
		return refused
	}
	pushed := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.pushes
	}
	until("full", func() bool { return seen() >= 20 })
	for _, r := range s.replicas {
		s.untilReady(2)
		r.running().kill()
		if err := s.start(r); err != nil {
			t.Fatal(err)
		}
	}
	s.untilReady(2)
	before, more := pushed(), seen()
	until("still full", func() bool { return seen() >= more+10 })
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	until("pushes go on", func() bool { return pushed() >= before+10 })
	work.finish(t)
	t.Logf("%d pushes were refused", refused)
	root := filepath.Join(here, "registry")
	nothingPartial(t, root)
	noUploads(t, root)
	for _, r := range s.replicas {
		r.running().terminate(t)
	}
	fill(t, ballast)
	for _, r := range s.replicas {
		if err := s.start(r); err != nil {
			t.Fatal(err)
		}
	}
	s.untilReady(2)
	l.check(t, s.client, s.host)
	c := newChunks(s)
	defer c.close()
	i := newImage(pool(70_000), "after")
	if err := c.push(t.Context(), i, "after", "1"); err == nil || !isFull(err) {
		t.Errorf("pushing to a full disk: %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if err := c.push(t.Context(), i, "after", "1"); err != nil {
		t.Errorf("pushing when there is space again: %v", err)
	}
}

// fill takes the last byte of the disk.
func fill(t *testing.T, name string) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for block := make([]byte, 64<<10); len(block) > 0; {
		if _, err := f.Write(block); errors.Is(err, unix.ENOSPC) {
			block = block[:len(block)/2]
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// noUploads finds what uploads that were refused have left: nothing.
func noUploads(t *testing.T, root string) {
	t.Helper()
	_ = filepath.WalkDir(filepath.Join(root, "docker/registry/v2/repositories"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Name() == "data" && strings.Contains(path, "/_uploads/") {
			if fi, err := e.Info(); err == nil && fi.Size() > 0 {
				t.Errorf("%s takes %d bytes", path, fi.Size())
			}
		}
		return err
	})
}
