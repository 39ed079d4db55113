package cache

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

// TestSetPrefetch follows a list of images and their tags.
func TestSetPrefetch(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		o := net.serve(t, "up:80")
		first, second := random(1000, 180), random(2000, 181)
		image(o, first)
		reg := prometheus.NewRegistry()
		n := net.runWith(t, Config{Registries: upstreams("http://up:80"), Metrics: reg})
		wantStored := func(when string, body []byte, want bool) {
			t.Helper()
			if got := n.stored(digest.FromBytes(body)); got != want {
				t.Errorf("%s: stored %v", when, got)
			}
		}
		wantImages := func(when string, present, missing float64) {
			t.Helper()
			got := samples(t, reg)
			for state, want := range map[string]float64{"present": present, "missing": missing} {
				if diff := cmp.Diff(want, got["prefetch_images[state="+state+"]"]); diff != "" {
					t.Errorf("%s: %s (-want +got):\n%s", when, state, diff)
				}
			}
		}
		wantStored("nothing wanted", first, false)

		n.SetPrefetch([]string{imageRef}, 0)
		time.Sleep(time.Second)
		wantStored("at once", first, true)
		wantImages("at once", 1, 0)

		image(o, second) // moves the tag
		time.Sleep(prefetchEvery / 2)
		wantStored("too early", second, false)
		time.Sleep(prefetchEvery)
		wantStored("a tag that moved", second, true)

		n.SetPrefetch([]string{imageRef, testHost + "/late:v1"}, 0)
		time.Sleep(time.Second)
		wantImages("one is not there yet", 1, 1)
		late := random(3000, 182)
		o.blob("late", []byte("{}")) // testManifest's configuration
		o.manifest("late", "v1", testManifest(o.blob("late", late)))
		time.Sleep(2 * prefetchRetry)
		wantStored("tried again soon", late, true)
		wantImages("all there", 2, 0)

		n.SetPrefetch(nil, 0)
		synctest.Wait()
		wantImages("nothing wanted any more", 0, 0)
	})
}

// TestSetPrefetchReplaces has the list change while an image comes in slowly.
func TestSetPrefetchReplaces(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		o := net.serve(t, "up:80")
		slow, quick := random(10<<20, 183), random(1000, 184)
		image(o, slow)
		o.blob("quick", []byte("{}"))
		o.manifest("quick", "v1", testManifest(o.blob("quick", quick)))
		n := net.run(t, "up:80")
		n.SetPrefetch([]string{imageRef}, 1<<10) // hours
		time.Sleep(time.Minute)
		n.SetPrefetch([]string{testHost + "/quick:v1"}, 0)
		time.Sleep(time.Second)
		if !n.stored(digest.FromBytes(quick)) {
			t.Error("what is wanted now waits for what was wanted before")
		}
		n.SetPrefetch([]string{imageRef}, 1<<10)
		time.Sleep(time.Minute)
		n.wantBlob(n.get(blobURL("app", digest.FromBytes(slow))), slow, "fwd=miss; collapsed; stored")
	})
}
