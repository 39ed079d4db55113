package storage

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// crashRootEnv makes the test binary a process that uses a store until it is
// killed; crashJobEnv says how.
const (
	crashRootEnv = "STORAGE_TEST_CRASH_ROOT"
	crashJobEnv  = "STORAGE_TEST_CRASH_JOB"
)

// pushUntilKilled pushes blobs and manifests and prints the digest of each once
// it has been acknowledged.
func pushUntilKilled(root string) {
	ctx := context.Background()
	s, err := Open(ctx, Config{Root: root})
	if err != nil {
		fmt.Println("error", err)
		return
	}
	repo, err := s.Repository("crash/test")
	if err != nil {
		fmt.Println("error", err)
		return
	}
	for i := 0; ; i++ {
		d, err := upload(ctx, s, repo.Name(), random(1+rand.IntN(1<<20)))
		if err != nil {
			fmt.Println("error", err)
			return
		}
		fmt.Println("blob", d)
		manifest := fmt.Appendf(nil, `{"schemaVersion":2,"layers":[{"digest":%q}]}`, d)
		md := digest.FromBytes(manifest)
		if err := repo.PutManifest(ctx, md, manifest, fmt.Sprintf("t%d", i%3)); err != nil {
			fmt.Println("error", err)
			return
		}
		fmt.Println("manifest", md)
	}
}

func TestKillLosesNothingAcknowledged(t *testing.T) {
	root := t.TempDir()
	acknowledged := make(map[digest.Digest]string)
	for range 5 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), crashRootEnv+"="+root)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 1 + rand.IntN(30); n > 0 && lines.Scan(); n-- {
			note(t, acknowledged, lines.Text())
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() { // what was printed before the end was acknowledged
			if strings.Count(lines.Text(), " ") == 1 {
				note(t, acknowledged, lines.Text())
			}
		}
		cmd.Wait()
	}
	if len(acknowledged) < 5 {
		t.Fatalf("only %d pushes", len(acknowledged))
	}
	s := open(t, root)
	repo, err := s.Repository("crash/test")
	if err != nil {
		t.Fatal(err)
	}
	for d, kind := range acknowledged {
		openIt := repo.OpenLayer
		if kind == "manifest" {
			openIt = repo.OpenManifest
		}
		f, err := openIt(t.Context(), d)
		if err != nil {
			t.Errorf("%s %s: %v", kind, d, err)
			continue
		}
		if got, err := digest.FromReader(f); err != nil || got != d {
			t.Errorf("%s %s reads as %s, %v", kind, d, got, err)
		}
		f.Close()
	}
	everythingServedIsRight(t, s, repo)
}

func note(t *testing.T, acknowledged map[digest.Digest]string, line string) {
	t.Helper()
	kind, text, _ := strings.Cut(line, " ")
	d, err := digest.Parse(text)
	if kind == "error" {
		t.Fatal(line)
	}
	if err == nil { // the last line may be cut short
		acknowledged[d] = kind
	}
}

// everythingServedIsRight reads every blob in the tree and follows every tag.
func everythingServedIsRight(t *testing.T, s *Store, repo Repository) {
	t.Helper()
	err := filepath.WalkDir(s.path(blobsRoot), func(path string, e fs.DirEntry, err error) error {
		d, ok := parseBlobPath(strings.TrimPrefix(path, s.root))
		if err != nil || !ok {
			return err
		}
		content, err := s.Driver().GetContent(t.Context(), blobPath(d))
		if err == nil && digest.FromBytes(content) != d {
			t.Errorf("%s is served with other content", d)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	tags, _, err := repo.Tags(t.Context(), "", -1)
	if err != nil {
		t.Fatal(err)
	}
	for _, tag := range tags {
		d, err := repo.Tag(t.Context(), tag)
		if errors.Is(err, fs.ErrNotExist) {
			continue // killed before the tag was acknowledged
		}
		f, err := repo.OpenManifest(t.Context(), d)
		if err != nil {
			t.Errorf("tag %s: %v", tag, err)
			continue
		}
		io.Copy(io.Discard, f)
		f.Close()
	}
}

// A kill between the rename and what follows leaves a blob without a seal or
// without a link. The first costs a hash; the second is as if never pushed.
func TestUnsealedAfterCrashCostsOneHash(t *testing.T) {
	s := open(t, t.TempDir())
	content := random(100_000)
	d := digest.FromBytes(content)
	path := s.path(blobPath(d))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := s.Driver().Stat(t.Context(), blobPath(d)); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.Stats().Rehashed; got != 1 {
		t.Errorf("hashed %d times, want once", got)
	}
}
