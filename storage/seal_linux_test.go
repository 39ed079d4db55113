package storage

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestSealKeepsTheAccessTime(t *testing.T) {
	f, d := writeFile(t, "content")
	accessed := time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)
	if err := os.Chtimes(f.Name(), accessed, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := Seal(f, d); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(f.Name(), &st); err != nil {
		t.Fatal(err)
	}
	if got := time.Unix(st.Atim.Unix()); !got.Equal(accessed) {
		t.Errorf("access time is %v, want %v", got, accessed)
	}
}
