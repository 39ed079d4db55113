package cache

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// makeReadOnly makes every further write to the file at path fail, by putting a
// read-only descriptor in the place of the one that this process writes by.
// Permission bits would not stop root.
func makeReadOnly(t *testing.T, path string) {
	t.Helper()
	ro, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		fd, _ := strconv.Atoi(filepath.Base(link))
		target, err := os.Readlink(link)
		if err != nil || target != path {
			continue
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_ACCMODE != unix.O_RDWR {
			continue
		}
		if err := unix.Dup3(int(ro.Fd()), fd, unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("%s is not open for writing", path)
}

// TestWriteErrorMidway checks what becomes of readers when the disk fails under
// a download: those who have bytes end short and resume past the store.
func TestWriteErrorMidway(t *testing.T) {
	o := newOrigin(t)
	body := random(9<<20, 45)
	d := o.blob("app", body)
	g := newGate(6 << 20)
	o.setFront(g.serve(body))
	n := start(t, Config{Registries: upstreams(o.URL)})
	done := make(chan reply)
	go func() { done <- n.get(blobURL("app", d)) }()
	n.await(func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		f := n.fills[d]
		if f == nil {
			return false
		}
		limit, _ := f.readable(0, false)
		return limit >= 5<<20
	})
	makeReadOnly(t, n.disk.Load().store.partialPath(d))
	g.open(len(body))
	r := <-done
	if r.err == nil || !bytes.Equal(r.body, body[:len(r.body)]) {
		t.Fatalf("%d bytes, %v", len(r.body), r.err)
	}
	rest := n.get(blobURL("app", d), "Range", "bytes="+strconv.Itoa(len(r.body))+"-")
	if rest.status != http.StatusPartialContent || !bytes.Equal(rest.body, body[len(r.body):]) {
		t.Errorf("the rest: %d", rest.status)
	}
}

// TestTinyDisk runs on a file system that really is full. Mounting one takes
// root; without, the injected errors of the other tests have to do.
func TestTinyDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Log("not root: nothing to mount")
		return
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Logf("mounting is not permitted here: %v", err)
		return
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	o := newOrigin(t)
	n := start(t, Config{Dir: dir, Registries: upstreams(o.URL)})
	defer n.stop()
	for i := range 8 {
		body := random(3<<20, byte(i))
		n.wantBlob(n.get(blobURL("app", o.blob("app", body))), body, "fwd=miss; stored")
		n.settled()
	}
	big := random(9<<20, 46)
	n.wantBlob(n.get(blobURL("app", o.blob("app", big))), big, "fwd=bypass; detail=no-space")

	// Somebody else takes all the space.
	if err := os.WriteFile(filepath.Join(dir, "hog"), make([]byte, 4<<20), 0o600); err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	for i := range 30 {
		body := random(1<<20, byte(100+i))
		r := n.get(blobURL("app", o.blob("app", body)), "Authorization", fmt.Sprint(i))
		if r.err != nil || !bytes.Equal(r.body, body) {
			t.Fatalf("blob %d: %d, %v", i, r.status, r.err)
		}
		n.settled()
	}
}

// TestStartsOnFullDisk starts where not one byte can be written.
func TestStartsOnFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Log("not root: nothing to mount")
		return
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Logf("mounting is not permitted here: %v", err)
		return
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	if err := os.WriteFile(filepath.Join(dir, "hog"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	o := newOrigin(t)
	body := random(1000, 49)
	d := o.blob("app", body)
	n := start(t, Config{Dir: dir, Registries: upstreams(o.URL)})
	defer n.stop()
	r := n.get(blobURL("app", d))
	if r.err != nil || !bytes.Equal(r.body, body) {
		t.Errorf("%d %s, %v", r.status, r.cache(), r.err)
	}
	o.manifest("app", "v1", testManifest(d))
	if r := n.get(manifestURL("app", "v1")); r.status != 200 {
		t.Errorf("manifest: %d %s", r.status, r.body)
	}
}
