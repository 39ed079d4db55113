package cache

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func testLedger(t *testing.T, path string, now func() time.Time) *ledger {
	t.Helper()
	l, err := openLedger(path, 24*time.Hour, now, quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.close)
	return l
}

func TestLedger(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	clk := &clock{}
	l := testLedger(t, path, clk.now)
	a, b, c := factKey{1}, factKey{2}, factKey{3}
	l.confirm(a)
	l.confirm(b)
	l.revoke(b)
	l.revoke(c)
	check := func(l *ledger) {
		t.Helper()
		for k, want := range map[factKey]bool{a: true, b: false, c: false} {
			if got := l.fresh(k, time.Minute); got != want {
				t.Errorf("%v: %v, want %v", k[0], got, want)
			}
		}
	}
	check(l)
	l = testLedger(t, path, clk.now)
	check(l)
	clk.advance(time.Hour)
	if l.fresh(a, time.Minute) || !l.known(a, 2*time.Hour) || l.known(a, time.Minute) {
		t.Error("after an hour")
	}
	clk.advance(-2 * time.Hour)
	if l.fresh(a, 24*time.Hour) || !l.known(a, 2*time.Hour) || l.known(a, time.Minute) {
		t.Error("an hour before")
	}
	clk.advance(48 * time.Hour)
	if l = testLedger(t, path, clk.now); len(l.seen) != 0 {
		t.Errorf("old facts are kept: %d", len(l.seen))
	}
}

// TestLedgerTorn cuts the file at every length, as a crash could.
func TestLedgerTorn(t *testing.T) {
	var whole []byte
	now := time.Now().Unix()
	for i := range byte(4) {
		whole = appendRecord(whole, opConfirm, factKey{i}, now)
	}
	for cut := range len(whole) + 1 {
		path := filepath.Join(t.TempDir(), "ledger")
		if err := os.WriteFile(path, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		l := testLedger(t, path, time.Now)
		if len(l.seen) != cut/recordSize {
			t.Fatalf("cut at %d: %d facts", cut, len(l.seen))
		}
		l.confirm(factKey{77})
		l = testLedger(t, path, time.Now)
		if len(l.seen) != cut/recordSize+1 || !l.fresh(factKey{77}, time.Minute) {
			t.Fatalf("cut at %d, then appended: %d facts", cut, len(l.seen))
		}
	}
}

// TestLedgerStaysSmall confirms the same facts over and over.
func TestLedgerStaysSmall(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	clk := &clock{}
	l := testLedger(t, path, clk.now)
	for range 20_000 {
		clk.advance(time.Second)
		l.confirm(factKey{1})
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Size() > 200<<10 {
		t.Errorf("%d bytes, %v", fi.Size(), err)
	}
	if l = testLedger(t, path, clk.now); !l.fresh(factKey{1}, 2*time.Second) {
		t.Error("the last word was lost")
	}
}

// TestLedgerWithoutDisk takes the directory away and gives it back.
func TestLedgerWithoutDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dir")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "ledger")
	clk := &clock{}
	l := testLedger(t, path, clk.now)
	l.confirm(factKey{1})
	l.file.Close() // every write fails
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	l.confirm(factKey{2})
	l.revoke(factKey{1})
	if l.fresh(factKey{1}, time.Minute) || !l.fresh(factKey{2}, time.Minute) {
		t.Error("memory is wrong")
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	clk.advance(2 * rewriteRetry)
	l.confirm(factKey{3})
	l = testLedger(t, path, clk.now)
	if len(l.seen) != 2 || l.known(factKey{1}, time.Hour) {
		t.Errorf("%d facts", len(l.seen))
	}
}

func FuzzLedger(f *testing.F) {
	f.Add(appendRecord(nil, opConfirm, factKey{1}, 5))
	f.Add(bytes.Repeat([]byte{0}, 100))
	f.Fuzz(func(t *testing.T, b []byte) {
		if seen := replay(b); len(seen) > len(b)/recordSize {
			t.Errorf("%d facts from %d bytes", len(seen), len(b))
		}
	})
}

func TestNodeKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	a, err := loadNodeKey(path, quiet())
	if err != nil {
		t.Fatal(err)
	}
	if b, err := loadNodeKey(path, quiet()); err != nil || a.fact("x") != b.fact("x") {
		t.Errorf("another key the second time: %v", err)
	}
	if err := os.WriteFile(path, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := loadNodeKey(path, quiet())
	if err != nil || a.fact("x") == b.fact("x") {
		t.Errorf("a damaged key was kept: %v", err)
	}
	if a.fact("x", "yz") == a.fact("xy", "z") {
		t.Error("facts collide")
	}
}

func TestNotes(t *testing.T) {
	n := notes{dir: filepath.Join(t.TempDir(), "notes")}
	k := factKey{0xab}
	if n.get(k) != "" || n.tag(k) != "" {
		t.Error("a note out of nothing")
	}
	for _, text := range []string{"one", "two", "two"} {
		if err := n.put(k, text); err != nil || n.get(k) != text {
			t.Errorf("%q: %q, %v", text, n.get(k), err)
		}
	}
	if n.tag(k) != "" {
		t.Error("that is no digest")
	}
	n.prune(time.Now().Add(-time.Hour))
	if n.get(k) == "" {
		t.Error("pruned too early")
	}
	n.prune(time.Now().Add(time.Hour))
	if n.get(k) != "" {
		t.Error("not pruned")
	}
	n.forget(k)
}
