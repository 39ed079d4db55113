package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
)

// pushUntilFull pushes as a registry does until the disk is full, and says what
// is there then.
func pushUntilFull(root string) {
	ctx := context.Background()
	s, err := Open(ctx, Config{Root: root})
	if err != nil {
		fmt.Println("error", err)
		return
	}
	defer s.Close()
	r, err := s.Repository("a")
	if err != nil {
		fmt.Println("error", err)
		return
	}
	acknowledged, refused := 0, 0
	for i := 0; refused < 5; i++ {
		content := manifestOf("", nil, nil, fmt.Sprint(i, strings.Repeat("x", 10_000)))
		d, tag := digest.FromBytes(content), fmt.Sprint("t", i)
		err := s.Journal().Record(ctx, Change{Action: ActionPush, Repository: "a", Tag: tag, Digest: d}, func() error {
			return r.PutManifest(ctx, d, content, tag)
		})
		switch {
		case err == nil && refused == 0:
			acknowledged++
		case err != nil && errors.Is(err, syscall.ENOSPC):
			refused++
		case err != nil:
			fmt.Println("error", err)
			return
		}
	}
	entries, err := s.Journal().Entries(ctx, 0)
	if err != nil {
		fmt.Println("error", err)
		return
	}
	journalled := make(map[string]bool)
	for _, e := range entries {
		journalled[e.Tag] = true
		f, err := r.OpenManifest(ctx, e.Digest)
		if err != nil {
			fmt.Println("error journalled and not there", e.Tag, err)
			return
		}
		f.Close()
	}
	for i := range acknowledged {
		if !journalled[fmt.Sprint("t", i)] {
			fmt.Println("error acknowledged and not journalled", i)
			return
		}
	}
	// What frees space works without any.
	if err := s.Journal().Done(ctx, entries[0].ID); err != nil {
		fmt.Println("error", err)
		return
	}
	for i := range acknowledged / 2 {
		if err := r.DeleteTag(ctx, fmt.Sprint("t", i)); err != nil {
			fmt.Println("error deleting", err)
			return
		}
	}
	fmt.Println("acknowledged", acknowledged)
}

// TestFullDisk fills a small file system in a mount namespace of its own.
func TestFullDisk(t *testing.T) {
	mount := filepath.Join(t.TempDir(), "small")
	if err := os.Mkdir(mount, 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{"--mount", "--fork", "--kill-child"}
	if os.Geteuid() != 0 {
		args = append(args, "--user", "--map-root-user")
	}
	script := fmt.Sprintf("mount -t tmpfs -o size=2m tmpfs %s && exec %s", mount, os.Args[0])
	cmd := exec.CommandContext(t.Context(), "unshare", append(args, "sh", "-c", script)...)
	cmd.Env = append(os.Environ(), crashRootEnv+"="+filepath.Join(mount, "data"), crashJobEnv+"=fill")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	n := 0
	if _, err := fmt.Sscanf(string(out), "acknowledged %d", &n); err != nil || n < 10 {
		t.Errorf("%s", out)
	}
}
