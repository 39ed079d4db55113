package storage

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
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
