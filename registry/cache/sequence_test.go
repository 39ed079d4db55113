package cache

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"path"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

// link carries bytes, so many in a second: for all downloads together, or for
// each of them.
type link struct {
	perSecond int64
	each      bool

	mu   sync.Mutex
	free map[string]time.Time // when it has carried what was given it
}

func (l *link) carry(download string, n int64) {
	l.mu.Lock()
	if !l.each {
		download = ""
	}
	if l.free == nil {
		l.free = make(map[string]time.Time)
	}
	at := later(l.free[download], time.Now()).Add(time.Duration(n) * time.Second / time.Duration(l.perSecond))
	l.free[download] = at
	l.mu.Unlock()
	time.Sleep(time.Until(at))
}

// serve answers with the bodies over the link.
func (l *link) serve(bodies map[digest.Digest][]byte) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		d := digest.Digest(path.Base(r.URL.Path))
		body := bodies[d]
		if body == nil || r.Method != http.MethodGet {
			return false
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		for len(body) > 0 {
			part := body[:min(len(body), 64<<10)]
			l.carry(d.String(), int64(len(part)))
			if _, err := w.Write(part); err != nil {
				return true
			}
			body = body[len(part):]
		}
		return true
	}
}

// layersOf are the digests of an image's layers.
func layersOf(image string, n int) (layers []digest.Digest) {
	for i := range n {
		layers = append(layers, digest.FromString(fmt.Sprint(image, i)))
	}
	return layers
}

// sequenced is a cache that has served the manifests of images.
func sequenced(images ...[]digest.Digest) *Cache {
	c := &Cache{sequences: make(map[sequenceKey]*sequence)}
	for _, layers := range images {
		body := []byte(testManifest(layers...))
		c.manifests.put(newManifest(digest.FromBytes(body), body))
	}
	return c
}

// load downloads so many bytes of a layer over a link and returns how long that
// takes.
func load(c *Cache, reg *registry, l *link, d digest.Digest, size int64) time.Duration {
	began := time.Now()
	p := c.takePlace(&request{target: target{route: route{digest: d}}, registry: reg})
	defer p.leave()
	for size > 0 {
		n := min(size, fillChunk)
		l.carry(d.String(), n)
		size -= n
		p.went(context.Background(), nil, int(n), size)
	}
	return time.Since(began)
}

// loadAll downloads layers at once, asked for in the given order.
func loadAll(c *Cache, reg *registry, l *link, layers []digest.Digest, order []int, size int64) []time.Duration {
	took := make([]time.Duration, len(layers))
	var all sync.WaitGroup
	for _, i := range order {
		all.Go(func() { took[i] = load(c, reg, l, layers[i], size) })
		synctest.Wait()
	}
	all.Wait()
	return took
}

const mega = 1_000_000

// TestSequence has three layers of one image come over a link, asked for in
// another order than the manifest's.
func TestSequence(t *testing.T) {
	for _, tt := range []struct {
		name        string
		link        *link
		size        int64
		first, last time.Duration // by when
	}{
		// In even parts the first would take 1.344 s.
		{"shared link", &link{perSecond: 125 * mega}, 56 * mega, 700 * time.Millisecond, 1350 * time.Millisecond},
		{"shared slower link", &link{perSecond: 12 * mega}, 20 * mega, 3500 * time.Millisecond, 5010 * time.Millisecond},
		// A quarter of what comes is for those that hold back.
		{"shared slow link", &link{perSecond: 3 * mega}, 20 * mega, 16 * time.Second, 20010 * time.Millisecond},
		{"too slow to tell", &link{perSecond: mega}, 3 * mega, 9 * time.Second, 9010 * time.Millisecond},
		// Alone each would take 2 s; one goes ahead for a moment.
		{"limited connections", &link{perSecond: 40 * mega, each: true}, 80 * mega, 2 * time.Second, 2170 * time.Millisecond},
		{"limited connections for long", &link{perSecond: 10 * mega, each: true}, 600 * mega, time.Minute, 61 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				layers := layersOf("image", 3)
				c := sequenced(layers)
				took := loadAll(c, new(registry), tt.link, layers, []int{2, 0, 1}, tt.size)
				if first, last := took[0], max(took[0], took[1], took[2]); first > tt.first || last > tt.last {
					t.Errorf("the first took %v, want %v; all %v, want %v", first, tt.first, last, tt.last)
				}
				if len(c.sequences) > 0 {
					t.Errorf("%d sequences are left", len(c.sequences))
				}
			})
		})
	}
}

// TestSmallLayer checks that what comes at one go is not held up behind a layer
// that goes ahead.
func TestSmallLayer(t *testing.T) {
	bubble(t, "", func(t *testing.T, n *network) {
		o := n.serve(t, "up:80")
		large := [][]byte{random(16<<20, 60), random(16<<20, 61)}
		small := random(32<<10, 62)
		layers := []digest.Digest{o.blob("app", large[0]), o.blob("app", large[1]), o.blob("app", small)}
		o.manifest("app", "latest", testManifest(layers...))
		l := &link{perSecond: 16 << 20}
		o.setFront(l.serve(map[digest.Digest][]byte{layers[0]: large[0], layers[1]: large[1]}))
		nd := n.run(t, "up:80")
		nd.get(manifestURL("app", "latest"))
		var all sync.WaitGroup
		for i, body := range large {
			all.Go(func() { nd.wantBlob(nd.get(blobURL("app", layers[i])), body, "fwd=miss; stored") })
		}
		time.Sleep(time.Second)
		began := time.Now()
		nd.wantBlob(nd.get(blobURL("app", layers[2])), small, "fwd=miss; stored")
		if took := time.Since(began); took > 10*time.Millisecond {
			t.Errorf("a small layer took %v", took)
		}
		all.Wait()
	})
}

// TestSequenceRemembers checks that a registry where going ahead cost time is
// spared it for other images, for a while.
func TestSequenceRemembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := layersOf("first", 2), layersOf("second", 3)
		c, reg := sequenced(first, second), new(registry)
		l := &link{perSecond: 40 * mega, each: true}
		loadAll(c, reg, l, first, []int{1, 0}, 20*mega)
		took := loadAll(c, reg, l, second, []int{2, 0, 1}, 20*mega)
		if last := max(took[1], took[2]); last > 510*time.Millisecond {
			t.Errorf("the other image's later layers took %v, want 500ms", last)
		}
		// A link that all share can be told then as well.
		time.Sleep(mostAheadRetry)
		took = loadAll(c, reg, &link{perSecond: 40 * mega}, first, []int{1, 0}, 40*mega)
		if took[0] > 1300*time.Millisecond {
			t.Errorf("the first layer took %v over a shared link, want 1.3s", took[0])
		}
	})
}

// TestSequenceOfTheStalled checks that nobody holds back for long for a download
// that brings nothing, whether it ends or not.
func TestSequenceOfTheStalled(t *testing.T) {
	for _, ends := range []bool{true, false} {
		t.Run(fmt.Sprint("ends ", ends), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				layers := layersOf("image", 3)
				c, reg := sequenced(layers), new(registry)
				l := &link{perSecond: 100 * mega}
				stalled := make(chan struct{})
				var all sync.WaitGroup
				all.Go(func() {
					p := c.takePlace(&request{target: target{route: route{digest: layers[0]}}, registry: reg})
					defer p.leave()
					for range 300 {
						l.carry("", fillChunk)
						p.went(context.Background(), nil, fillChunk, 100*mega)
					}
					if !ends {
						<-stalled
					}
				})
				took := make([]time.Duration, 3)
				for i := 1; i < 3; i++ {
					all.Go(func() { took[i] = load(c, reg, l, layers[i], 50*mega) })
				}
				time.Sleep(3 * time.Second)
				close(stalled)
				all.Wait()
				// All that comes is 120 MB.
				if last := max(took[1], took[2]); last > 1400*time.Millisecond {
					t.Errorf("the others took %v", last)
				}
			})
		})
	}
}

// TestSequencesApart checks that images do not wait for one another, nor what is
// no layer of an image, nor who need not hurry.
func TestSequencesApart(t *testing.T) {
	layers := layersOf("image", 2)
	c, reg := sequenced(layers, layersOf("other", 2)), new(registry)
	at := func(d digest.Digest, reg *registry) *place {
		return c.takePlace(&request{target: target{route: route{digest: d}}, registry: reg})
	}
	a, b := at(layers[0], reg), at(layers[1], reg)
	if a == nil || b == nil || a.sequence != b.sequence || a.position != 0 || b.position != 1 {
		t.Errorf("an image's layers have the places %+v and %+v", a, b)
	}
	if p := at(layersOf("other", 1)[0], reg); p == nil || p.sequence == a.sequence {
		t.Errorf("another image's layer has the place %+v", p)
	}
	if p := at(layers[0], new(registry)); p == nil || p.sequence == a.sequence {
		t.Errorf("the layer of another registry has the place %+v", p)
	}
	if p := at(digest.FromString("no layer"), reg); p != nil {
		t.Errorf("a blob that is no layer has the place %+v", p)
	}
	rq := &request{target: target{route: route{digest: layers[0]}}, registry: reg, limit: rate.NewLimiter(1, 1)}
	if p := c.takePlace(rq); p != nil {
		t.Errorf("a download that nobody waits for has the place %+v", p)
	}
}

// TestLayerOfManifest checks where layers are found.
func TestLayerOfManifest(t *testing.T) {
	var mc manifestCache
	put := func(body string) digest.Digest {
		d := digest.FromString(body)
		mc.put(newManifest(d, []byte(body)))
		return d
	}
	a, b, shared := digest.FromString("a"), digest.FromString("b"), digest.FromString("shared")
	first, second := put(testManifest(shared, a)), put(testManifest(b, shared, b))
	put(`{"mediaType":"application/x","layers":"` + a.String() + `"}`)
	put(`{"mediaType":"application/x","manifests":[{"digest":"` + a.String() + `"}]}`)
	for _, tt := range []struct {
		layer, manifest digest.Digest
		place           int
	}{{a, first, 1}, {b, second, 0}, {shared, second, 1}, {digest.FromString("c"), "", 0}} {
		if m, place := mc.layer(tt.layer); m != tt.manifest || place != tt.place {
			t.Errorf("layer %s: place %d of %s, want %d of %s", tt.layer, place, m, tt.place, tt.manifest)
		}
	}
	mc.get(first)
	if m, place := mc.layer(shared); m != first || place != 0 {
		t.Errorf("a layer of two manifests is found at %d of %s, not in the one used last", place, m)
	}
}

// TestBacklog checks that what a connection has received counts before it is
// read.
func TestBacklog(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	from, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	s := &sequence{places: []*place{{}, {conn: rawConn(to)}}}
	if n := s.backlog(); n != 0 {
		t.Errorf("%d bytes have come in before any were sent", n)
	}
	if _, err := from.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); s.backlog() != 1000; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes have come in, want 1000", s.backlog())
		}
	}
}

// TestLayersComeInSequence pulls as containerd does: the manifest, and then the
// layers at once, the last one first.
func TestLayersComeInSequence(t *testing.T) {
	bubble(t, "", func(t *testing.T, n *network) {
		o := n.serve(t, "up:80")
		var layers []digest.Digest
		bodies := make(map[digest.Digest][]byte)
		for i := range 3 {
			body := random(16<<20, byte(50+i))
			d := o.blob("app", body)
			layers = append(layers, d)
			bodies[d] = body
		}
		o.manifest("app", "latest", testManifest(layers...))
		l := &link{perSecond: 64 << 20}
		o.setFront(l.serve(bodies))
		nd := n.run(t, "up:80")
		nd.get(manifestURL("app", "latest"))
		began := time.Now()
		took := make([]time.Duration, 3)
		var all sync.WaitGroup
		for _, i := range []int{2, 0, 1} {
			all.Go(func() {
				nd.wantBlob(nd.get(blobURL("app", layers[i])), bodies[layers[i]], "fwd=miss; stored")
				took[i] = time.Since(began)
			})
			synctest.Wait()
		}
		all.Wait()
		// In even parts each takes 750 ms.
		if took[0] > 450*time.Millisecond || max(took[1], took[2]) > 760*time.Millisecond {
			t.Errorf("the layers came within %v", took)
		}
	})
}
