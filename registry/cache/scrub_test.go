package cache

import (
	"fmt"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/connected-registry/connected-registry/storage"
	"github.com/opencontainers/go-digest"
)

// TestScrub finds a blob that has decayed under its seal, without anybody
// asking for it, and leaves the others and their order alone.
func TestScrub(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		o := net.serve(t, "up:80")
		n := net.run(t, "up:80")
		var digests []digest.Digest
		for i, size := range []int{100, scrubChunk, 3*scrubChunk + 5} {
			body := random(size, byte(180+i))
			d := o.blob("app", body)
			n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
			n.settled()
			digests = append(digests, d)
		}
		st := n.disk.Load().store
		forgetHashes(st)
		for _, d := range digests[1:] {
			flip(t, st.blobPath(d), 50)
			if err := os.Chtimes(st.blobPath(d), time.Time{}, storage.SealTime(d)); err != nil {
				t.Fatal(err)
			}
		}
		order := fmt.Sprint(st.oldest.next.digest)
		time.Sleep(scrubDelay + time.Minute)
		synctest.Wait()
		for i, d := range digests {
			if got, want := n.stored(d), i == 0; got != want {
				t.Errorf("blob %d: stored %v, want %v", i, got, want)
			}
		}
		if got := fmt.Sprint(st.oldest.next.digest); got != order || order != fmt.Sprint(digests[0]) {
			t.Errorf("the oldest is %s, want %s", got, order)
		}
		if bytes, blobs := st.usage(); bytes != 100 || blobs != 1 {
			t.Errorf("%d bytes in %d blobs are counted", bytes, blobs)
		}
		flip(t, st.blobPath(digests[0]), 50)
		if err := os.Chtimes(st.blobPath(digests[0]), time.Time{}, storage.SealTime(digests[0])); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * scrubEvery)
		synctest.Wait()
		if n.stored(digests[0]) {
			t.Error("it was not read again")
		}
	})
}

// forgetHashes makes the store as it is after a restart.
func forgetHashes(s *store) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.index {
		e.hashed = 0
	}
}

// TestScrubRate measures on the bubble's clock how long a blob takes.
func TestScrubRate(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		o := net.serve(t, "up:80")
		n := net.run(t, "up:80")
		body := random(40<<20, 185)
		d := o.blob("app", body)
		n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
		n.settled()
		st := n.disk.Load().store
		forgetHashes(st)
		time.Sleep(scrubDelay)
		began := time.Now()
		for st.notHashedSince(began.Add(-time.Minute)) != nil {
			time.Sleep(100 * time.Millisecond)
		}
		if took := time.Since(began); took < 9*time.Second || took > 12*time.Second {
			t.Errorf("40 MiB took %s, want about 10 s", took)
		}
	})
}
