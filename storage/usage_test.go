package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/internal/membucket"
)

// TestGrowthIsSeenByOthers has one process add, twice in a row and then nothing
// for a long time. The other knows all of it soon.
func TestGrowthIsSeenByOthers(t *testing.T) {
	root := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		one, two := open(t, root), open(t, root)
		used := func() int64 {
			_, total, err := two.Used(t.Context(), "app")
			if err != nil {
				t.Fatal(err)
			}
			return total
		}
		before := used()
		one.usage.add(t.Context(), "", 10)
		one.usage.add(t.Context(), "", 5)
		time.Sleep(3*usageSave + time.Millisecond)
		if got := used() - before; got != 15 {
			t.Errorf("%d of 15 bytes are known elsewhere", got)
		}
		one.usage.add(t.Context(), "", 1)
		one.usage.add(t.Context(), "", 1)
		if err := one.Close(); err != nil { // with bytes that wait to be saved
			t.Fatal(err)
		}
		time.Sleep(2*usageSave + time.Millisecond)
		if got := used() - before; got != 17 {
			t.Errorf("%d of 17 bytes are known after one closed", got)
		}
	})
}

// TestTrashIsEmptiedBehind opens a store in which a deletion was interrupted.
func TestTrashIsEmptiedBehind(t *testing.T) {
	root := t.TempDir()
	trash := filepath.Join(root, trashDir)
	for i := range 100 {
		dir := filepath.Join(trash, fmt.Sprint("left-", i%3), fmt.Sprint(i), "deep")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// One that closes at once leaves what it has not come to.
	if err := open(t, root).Close(); err != nil {
		t.Fatal(err)
	}
	open(t, root)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		entries, err := os.ReadDir(trash)
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still there: %v", entries)
		}
	}
}

// TestRepositoryThatIsGone uses nothing, also for a process that knew it before
// everything was counted again.
func TestRepositoryThatIsGone(t *testing.T) {
	eachMediumInTime(t, func(t *testing.T, open func() *Store) {
		leader, replica := open(), open()
		repo := repository(t, leader, "app")
		if err := repo.PutManifest(t.Context(), digest.FromString("{}"), []byte("{}"), "t"); err != nil {
			t.Fatal(err)
		}
		if _, err := leader.recount(t.Context()); err != nil {
			t.Fatal(err)
		}
		if used, _, err := replica.Used(t.Context(), "app"); err != nil || used != 2 {
			t.Fatalf("%d of 2 bytes are used, %v", used, err)
		}
		if err := repo.DeleteRepository(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := leader.recount(t.Context()); err != nil {
			t.Fatal(err)
		}
		replica.usage.reread()
		if used, _, err := replica.Used(t.Context(), "app"); err != nil || used != 0 {
			t.Errorf("%d bytes are used, %v", used, err)
		}
	})
}

// TestCountingKeepsNobodyWaiting has a count that takes for ever: pushes go on.
func TestCountingKeepsNobodyWaiting(t *testing.T) {
	counting, end := make(chan struct{}), make(chan struct{})
	var once sync.Once
	b := &membucket.Bucket{Before: func(_ context.Context, method, key string) error {
		if method == "List" && strings.HasPrefix(key, "docker/registry/v2/blobs") {
			once.Do(func() { close(counting) })
			<-end
		}
		return nil
	}}
	s := openWith(t, Config{Bucket: b})
	var used sync.WaitGroup
	used.Go(func() {
		if _, total, err := s.Used(context.WithoutCancel(t.Context()), ""); err != nil || total != 2 && total != 4 { // what comes while everything is counted may count twice
			t.Errorf("%d of 2 bytes, %v", total, err)
		}
	})
	<-counting
	if err := repository(t, s, "app").PutManifest(t.Context(), digest.FromString("{}"), []byte("{}"), "t"); err != nil {
		t.Error(err)
	}
	impatient, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := s.Used(impatient, "app"); !errors.Is(err, context.Canceled) {
		t.Errorf("whoever has given up waits on: %v", err)
	}
	close(end)
	used.Wait()
}
