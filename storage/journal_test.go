package storage

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/internal/membucket"
)

func done() error { return nil }

// record records a push of a tag that was made.
func record(t *testing.T, s *Store, tag string) {
	t.Helper()
	if err := s.Journal().Record(t.Context(), Change{Action: ActionPush, Repository: "a/b", Tag: tag}, done); err != nil {
		t.Fatal(err)
	}
}

func entries(t *testing.T, s *Store, n int) []Entry {
	t.Helper()
	e, err := s.Journal().Entries(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestJournal(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		want := []Change{
			{Action: ActionPush, Repository: "a/b", Tag: "1", Digest: digest.FromString("1"), MediaType: "x/y", Size: 7, Actor: "ci"},
			{Action: ActionDelete, Repository: "a/b", Digest: digest.FromString("2")},
			{Action: ActionDelete, Repository: "a/c"},
		}
		began := time.Now()
		for _, c := range want {
			if err := s.Journal().Record(t.Context(), c, done); err != nil {
				t.Fatal(err)
			}
		}
		got := entries(t, open(), 0)
		if diff := cmp.Diff([]Entry{{Change: want[0]}, {Change: want[1]}, {Change: want[2]}}, got, cmpopts.IgnoreFields(Entry{}, "ID", "Time")); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
		if first := entries(t, s, 1); len(first) != 1 || first[0].ID != got[0].ID {
			t.Errorf("first entry is %v", first)
		}
		if n, oldest, err := s.Journal().Backlog(t.Context()); n != 3 || err != nil || oldest.Before(began.Add(-time.Second)) || oldest.After(time.Now()) {
			t.Errorf("backlog %d since %v, %v", n, oldest, err)
		}
		if err := s.Journal().Done(t.Context(), got[0].ID, got[2].ID, got[2].ID); err != nil {
			t.Error(err)
		}
		if left := entries(t, s, 0); len(left) != 1 || left[0].ID != got[1].ID {
			t.Errorf("left: %v", left)
		}
		if err := s.Journal().Done(t.Context(), "../../x"); !errors.Is(err, ErrName) {
			t.Errorf("Done of what is no id: %v", err)
		}
	})
}

func TestJournalLeavesOutWhatFailed(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		boom := errors.New("boom")
		if err := s.Journal().Record(t.Context(), Change{Action: ActionPush, Repository: "a"}, func() error { return boom }); !errors.Is(err, boom) {
			t.Errorf("error %v", err)
		}
		if left := entries(t, s, 0); len(left) != 0 {
			t.Errorf("journal has %v", left)
		}
		if n, _, _ := s.Journal().Backlog(t.Context()); n != 0 {
			t.Errorf("%d files left", n)
		}
	})
}

// An entry may not be seen before its change, or the syncer would find nothing
// and take it for done; if its process died, it must be.
func TestJournalHidesAndFindsPending(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		err := s.Journal().Record(t.Context(), Change{Action: ActionPush, Repository: "a"}, func() error {
			if e := entries(t, s, 0); len(e) != 0 {
				t.Errorf("seen while it is being made: %v", e)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		id, content, err := s.Journal().begin(t.Context(), Change{Action: ActionPush, Repository: "dead"})
		if err != nil {
			t.Fatal(err)
		}
		old := fmt.Sprintf("%020d-%s", time.Now().Add(-settleTime).UnixNano(), id[21:])
		if err := s.medium.moveNote(t.Context(), noteOf(id, pendingSuffix), noteOf(old, pendingSuffix), content); err != nil {
			t.Fatal(err)
		}
		got := entries(t, s, 0)
		if len(got) != 2 || got[0].Repository != "dead" {
			t.Fatalf("entries %v", got)
		}
		if err := s.Journal().Done(t.Context(), old); err != nil || len(entries(t, s, 0)) != 1 {
			t.Errorf("Done: %v", err)
		}
	})
}

func TestJournalOutlivesBeingTakenForDead(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		err := s.Journal().Record(t.Context(), Change{Action: ActionPush, Repository: "slow"}, func() error {
			names, _ := s.Journal().names(t.Context())
			return s.Journal().Done(t.Context(), strings.TrimSuffix(names[0], pendingSuffix))
		})
		if err != nil || len(entries(t, s, 0)) != 1 {
			t.Errorf("entries %v, %v", entries(t, s, 0), err)
		}
	})
}

func TestJournalIsBounded(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		s.journal.limit = 3
		for i := range 3 {
			record(t, s, fmt.Sprint(i))
		}
		err := s.Journal().Record(t.Context(), Change{Action: ActionPush, Repository: "a"}, func() error { t.Error("applied"); return nil })
		if !errors.Is(err, ErrJournalFull) {
			t.Errorf("error %v", err)
		}
		if err := s.Journal().Done(t.Context(), entries(t, s, 1)[0].ID); err != nil {
			t.Fatal(err)
		}
		record(t, s, "again")
	})
}

func TestJournalThatCannotBeWrittenRefuses(t *testing.T) {
	s := open(t, t.TempDir())
	if err := os.RemoveAll(filepath.Join(s.root, journalDir)); err != nil {
		t.Fatal(err)
	}
	err := s.Journal().Record(t.Context(), Change{Action: ActionPush, Repository: "a"}, func() error { t.Error("applied"); return nil })
	if err == nil {
		t.Error("no error")
	}
}

// An entry that waits for long is read once, and forgotten with its note.
func TestJournalReadsAnEntryOnce(t *testing.T) {
	var reads atomic.Int64
	b := &membucket.Bucket{Before: func(_ context.Context, method, key string) error {
		if method == "Open" && strings.HasPrefix(key, journalDir+"/") {
			reads.Add(1)
		}
		return nil
	}}
	replica, leader := openWith(t, Config{Bucket: b}), openWith(t, Config{Bucket: b})
	record(t, replica, "1")
	record(t, replica, "2")
	for range 3 {
		if got := entries(t, leader, 0); len(got) != 2 || got[0].Tag != "1" || got[1].Tag != "2" {
			t.Fatalf("entries: %v", got)
		}
		if tags, err := leader.Journal().Tags(t.Context()); err != nil || !tags["a/b"]["1"] || !tags["a/b"]["2"] {
			t.Fatalf("tags: %v, %v", tags, err)
		}
	}
	if n := reads.Load(); n != 2 {
		t.Errorf("2 entries were read %d times", n)
	}
	if err := replica.Journal().Done(t.Context(), entries(t, leader, 1)[0].ID); err != nil {
		t.Fatal(err)
	}
	if got := entries(t, leader, 0); len(got) != 1 || got[0].Tag != "2" {
		t.Errorf("left: %v", got)
	}
	if n := len(leader.Journal().memory.entries); n != 1 {
		t.Errorf("%d entries are remembered of 1", n)
	}
}

func TestJournalSetsDamageAside(t *testing.T) {
	s := open(t, t.TempDir())
	record(t, s, "1")
	name := fmt.Sprintf("%020d-%012x.json", 1, 1)
	if err := os.WriteFile(filepath.Join(filepath.Join(s.root, journalDir), name), []byte(`{"repository":"../x"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := entries(t, s, 0); len(got) != 1 || got[0].Tag != "1" {
		t.Errorf("entries %v", got)
	}
	if _, err := os.Stat(filepath.Join(s.root, quarantineDir, "journal-"+name)); err != nil {
		t.Error(err)
	}
}

// Two replicas write while one reader takes away: each change is seen once, and
// those of one replica in order.
func TestJournalOfSeveralReplicas(t *testing.T) {
	root := t.TempDir()
	const each = 60
	var writers sync.WaitGroup
	for replica := range 2 {
		s := open(t, root)
		writers.Go(func() {
			for i := range each {
				record(t, s, fmt.Sprintf("%d-%d", replica, i))
			}
		})
	}
	finished := make(chan struct{})
	go func() { writers.Wait(); close(finished) }()
	next := make(map[string]int)
	reader := open(t, root)
	for last := false; ; {
		select {
		case <-finished:
			last = true
		default:
		}
		batch := entries(t, reader, 7)
		for _, e := range batch {
			replica, n, _ := strings.Cut(e.Tag, "-")
			i, err := strconv.Atoi(n)
			if err != nil || i != next[replica] {
				t.Fatalf("entry %q where %d was next", e.Tag, next[replica])
			}
			next[replica]++
			if err := reader.Journal().Done(t.Context(), e.ID); err != nil {
				t.Fatal(err)
			}
		}
		if last && len(batch) == 0 {
			break
		}
	}
	if next["0"] != each || next["1"] != each {
		t.Errorf("seen: %v", next)
	}
}

// recordUntilKilled tags and says so once that is acknowledged.
func recordUntilKilled(root string) {
	ctx := context.Background()
	s, err := Open(ctx, Config{Root: root})
	if err != nil {
		fmt.Println("error", err)
		return
	}
	for i := 0; ; i++ {
		tag := fmt.Sprint(i)
		err := s.Journal().Record(ctx, Change{Action: ActionPush, Repository: "a", Tag: tag}, done)
		if err != nil {
			fmt.Println("error", err)
			return
		}
		fmt.Println("recorded", tag)
	}
}

func TestJournalSurvivesKill(t *testing.T) {
	root := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), crashRootEnv+"="+root, crashJobEnv+"=record")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	acknowledged := -1
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if _, err := fmt.Sscanf(lines.Text(), "recorded %d", &acknowledged); err != nil {
			t.Fatal(lines.Text())
		}
		if acknowledged == 40 {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	for lines.Scan() {
		var n int
		if _, err := fmt.Sscanf(lines.Text(), "recorded %d", &n); err == nil && n == acknowledged+1 { // the last line may be cut short
			acknowledged = n
		}
	}
	cmd.Wait()
	got := entries(t, open(t, root), 0)
	if len(got) < acknowledged+1 {
		t.Fatalf("%d entries, %d acknowledged", len(got), acknowledged+1)
	}
	for i := range acknowledged + 1 {
		if got[i].Tag != fmt.Sprint(i) {
			t.Errorf("entry %d is of tag %s", i, got[i].Tag)
		}
	}
}
