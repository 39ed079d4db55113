package cache

import (
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/connected-registry/connected-registry/storage"
)

// TestSettles checks that a blob is served before it is sealed, sealed after a
// while or at the end, and never trusted once it was written to.
func TestSettles(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		o := net.serve(t, "up:80")
		n := net.run(t, "up:80")
		st := n.disk.Load().store
		sealed := func(body []byte) bool {
			t.Helper()
			fi, err := os.Stat(st.blobPath(o.blob("app", body)))
			if err != nil {
				t.Fatal(err)
			}
			return storage.Sealed(fi, o.blob("app", body))
		}
		first, touched, last := random(1000, 190), random(5<<20, 191), random(1000, 192)
		for _, body := range [][]byte{first, touched} {
			n.wantBlob(n.get(blobURL("app", o.blob("app", body))), body, "fwd=miss; stored")
			n.settled()
			o.forget()
			n.wantBlob(n.get(blobURL("app", o.blob("app", body))), body, "hit")
			if sealed(body) || len(o.asked) > 0 {
				t.Fatalf("sealed at once: %v; asked %q", sealed(body), o.asked)
			}
		}
		path := st.blobPath(o.blob("app", touched))
		flip(t, path, 77)
		future := time.Now().Add(time.Hour)
		if err := os.Chtimes(path, time.Time{}, future); err != nil {
			t.Fatal(err)
		}
		time.Sleep(settleAfter + 2*settleEvery)
		synctest.Wait()
		if !sealed(first) || sealed(touched) || len(st.fresh) > 0 {
			t.Errorf("sealed: %v, %v; %d are waiting", sealed(first), sealed(touched), len(st.fresh))
		}
		n.wantBlob(n.get(blobURL("app", o.blob("app", touched))), touched, "fwd=miss; stored")
		n.wantBlob(n.get(blobURL("app", o.blob("app", last))), last, "fwd=miss; stored")
		n.settled()
		n.stop()
		if !sealed(last) || !sealed(touched) {
			t.Error("not sealed at the end")
		}
	})
}
