package replicas

import (
	"context"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// load is clients at work.
type load struct {
	workers []*worker
	nodes   []*node
	images  map[string]*image // that the nodes pull
	working sync.WaitGroup
	end     context.CancelFunc
}

// startLoad has two of each kind of client push, and containerds pull.
func startLoad(t *testing.T, s *site, l *ledger) *load {
	t.Helper()
	layers := pool(100, 3_000, 40_000, 40_001, 200_000, 400_000, 700_000, 1_000_000, 1_500_000, 2_500_000)
	work := &load{images: map[string]*image{
		"node/large:1": newImage([]blob{newLayer(100, 12<<20), newLayer(101, 200)}, "large"),
		"node/small:1": newImage([]blob{newLayer(102, 1<<20), newLayer(103, 1<<20)}, "small"),
	}}
	seeder := newCrane(s)
	defer seeder.close()
	for ref, i := range work.images {
		repository, tag, _ := strings.Cut(ref, ":")
		if err := seeder.push(t.Context(), i, repository, tag); err != nil {
			t.Fatal(err)
		}
		l.pushed(repository, tag, i.manifest.Digest)
	}
	for name, newClient := range map[string]func(*site) client{"crane": newCrane, "containerd": newContainerd, "chunks": newChunks} {
		for _, n := range []string{"1", "2"} {
			work.workers = append(work.workers, newWorker(t, name+n, newClient(s), layers, l))
		}
	}
	work.nodes = []*node{startNode(t, s, 0), startNode(t, s, 512<<10)}
	return work
}

func (w *load) begin(t *testing.T, s *site) {
	ctx, cancel := context.WithCancel(t.Context())
	w.end = cancel
	for _, worker := range w.workers {
		w.working.Go(func() { worker.run(ctx) })
	}
	for _, n := range w.nodes {
		w.working.Go(func() { n.run(ctx, s.host, w.images) })
	}
}

// finish waits until all have done what they were at, and returns how often they
// had to begin again.
func (w *load) finish(t *testing.T) (again int64) {
	w.end()
	w.working.Wait()
	for _, worker := range w.workers {
		t.Logf("%s did %d things, %d a second time", worker.name, worker.done.Load(), worker.patient.needed.Load())
		again += worker.patient.needed.Load()
		if worker.done.Load() < 5 {
			t.Errorf("%s hardly came to do anything", worker.name)
		}
	}
	for _, n := range w.nodes {
		t.Logf("containerd pulled %d images, %d a second time", n.pulls.Load(), n.patient.needed.Load())
		again += n.patient.needed.Load()
		if n.pulls.Load() < 2 {
			t.Error("containerd hardly came to pull")
		}
	}
	return again
}

// dataDir is a directory for the replicas, with the root of the storage in it.
func dataDir(t *testing.T) (data, root string) {
	data = t.TempDir()
	return data, filepath.Join(data, "registry")
}

// TestKilledReplicas kills a replica every few seconds, and the leader now and
// then.
func TestKilledReplicas(t *testing.T) {
	data, root := dataDir(t)
	s := newSite(t, data)
	l := newLedger()
	work := startLoad(t, s, l)
	lead := newLeader(s, root)
	if err := lead.start(); err != nil {
		t.Fatal(err)
	}
	work.begin(t, s)
	kills := 0
	for until := time.Now().Add(*duration); time.Now().Before(until) && !t.Failed(); {
		time.Sleep(time.Duration(500+rand.IntN(2500)) * time.Millisecond)
		s.untilReady(2)
		r := s.replicas[rand.IntN(len(s.replicas))]
		r.running().kill()
		if kills++; kills%5 == 0 {
			if err := lead.again(); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Duration(rand.IntN(1500)) * time.Millisecond)
		if err := s.start(r); err != nil {
			t.Fatal(err)
		}
	}
	again := work.finish(t)
	t.Logf("%d kills; %d things were begun again", kills, again)
	lead.stop()
	verify(t, s, l, lead, root)
}

// TestReplicasInTurn restarts replicas as a rollout does. No client notices.
func TestReplicasInTurn(t *testing.T) {
	data, _ := dataDir(t)
	s := newSite(t, data)
	l := newLedger()
	work := startLoad(t, s, l)
	work.begin(t, s)
	for _, r := range s.replicas {
		time.Sleep(time.Second)
		r.running().terminate(t)
		if err := *r.running().err; err != nil {
			t.Errorf("a replica that was told to end: %v", err)
		}
		if err := s.start(r); err != nil {
			t.Fatal(err)
		}
		s.untilReady(2)
	}
	if again := work.finish(t); again > 0 {
		t.Errorf("%d things had to be begun again", again)
	}
	l.check(t, s.client, s.host)
}

// verify has a fresh replica show all that was acknowledged, before and after
// everything else was collected.
func verify(t *testing.T, s *site, l *ledger, lead *leader, root string) {
	t.Helper()
	for _, r := range s.replicas {
		r.running().terminate(t)
	}
	for _, r := range s.replicas {
		if err := s.start(r); err != nil {
			t.Fatal(err)
		}
	}
	s.untilReady(2)
	l.check(t, s.client, s.host)
	if s.storage == "" {
		nothingPartial(t, root)
	}
	last := newLeader(s, root)
	if err := last.settle(); err != nil {
		t.Fatal(err)
	}
	l.check(t, s.client, s.host)
	for c := range last.heard {
		lead.heard[c] = true
	}
	l.journalled(t, lead.heard)
	if s.storage == "" {
		nothingPartial(t, root)
		onlyReachable(t, s, l, root)
	}
}

// onlyReachable finds blobs that nobody acknowledged and nothing needs.
func onlyReachable(t *testing.T, s *site, l *ledger, root string) {
	t.Helper()
	want := make(map[digest.Digest]bool)
	for repository, tags := range l.tags {
		for _, d := range tags {
			want[d] = true
			content, _, err := get(t.Context(), s.client, "https://"+s.host+"/v2/"+repository+"/manifests/"+d.String())
			if err != nil {
				t.Error(err)
				continue
			}
			needs, err := references(content)
			if err != nil {
				t.Error(err)
			}
			for _, need := range needs {
				want[need.Digest] = true
			}
		}
	}
	files, err := filepath.Glob(filepath.Join(root, "docker/registry/v2/blobs/sha256/*/*/data"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if d := digest.NewDigestFromEncoded(digest.SHA256, filepath.Base(filepath.Dir(file))); !want[d] {
			t.Errorf("%s is left over", d)
		}
	}
}
