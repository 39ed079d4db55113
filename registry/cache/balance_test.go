package cache

import (
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// behind has the endpoints stand behind "service:80".
func behind(endpoints ...string) map[string]Registry {
	return map[string]Registry{testHost: {Upstreams: []Upstream{{URL: "http://service:80", Endpoints: endpoints}}}}
}

// slowly answers after d.
func slowly(d time.Duration) func(http.ResponseWriter, *http.Request) bool {
	return func(_ http.ResponseWriter, r *http.Request) bool {
		pause(r, d)
		return false
	}
}

// TestAvoidsSlowAndDeadEndpoints counts who is asked when one endpoint of three
// is slow and another one dead.
func TestAvoidsSlowAndDeadEndpoints(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		quick, slow, service := net.serve(t, "quick:80"), net.serve(t, "slow:80"), net.serve(t, "service:80")
		quick.setFront(slowly(time.Millisecond))
		slow.setFront(slowly(90 * time.Millisecond))
		n := net.runWith(t, Config{Registries: behind("quick:80", "slow:80", "dead:80")})
		const requests = 200
		for i := range requests {
			body := []byte(strconv.Itoa(i))
			d := digest.FromBytes(body)
			for _, o := range []*origin{quick, slow, service} {
				o.blob("app", body)
			}
			n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
		}
		// By chance, every third pair leaves the quick one out: then it is slow
		// or dead. The dead one costs a second and is left alone for five.
		if got := quick.count(""); got < requests/2 {
			t.Errorf("the quick endpoint was asked %d times of %d, the slow one %d, the service %d", got, requests, slow.count(""), service.count(""))
		}
		if got := service.count(""); got != 0 {
			t.Errorf("the common address was asked %d times while endpoints answered", got)
		}
	})
}

// TestAllEndpointsDead has only the common address answer.
func TestAllEndpointsDead(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		body := random(1000, 120)
		d := net.serve(t, "service:80").blob("app", body)
		n := net.runWith(t, Config{Registries: behind("a:80", "b:80")})
		r := n.get(blobURL("app", d))
		n.wantBlob(r, body, "fwd=miss; stored")
		if r.took > 2*time.Second {
			t.Errorf("it took %s", r.took)
		}
	})
}

// hangOnce does not answer the first request that has the method.
func hangOnce(method string) func(http.ResponseWriter, *http.Request) bool {
	var once sync.Once
	return func(w http.ResponseWriter, r *http.Request) bool {
		first := false
		if r.Method == method {
			once.Do(func() { first = true })
		}
		return first && hang(w, r)
	}
}

// TestHedge checks that a small answer that does not come is asked for again.
func TestHedge(t *testing.T) {
	m := testManifest(digest.FromString("layer"))
	for _, tt := range []struct {
		name string
		cfg  Config
		want time.Duration
	}{
		{"same address", Config{Registries: upstreams("http://service:80")}, 100 * time.Millisecond},
		{"another endpoint", Config{Registries: behind("a:80", "b:80")}, 100 * time.Millisecond},
		{"later", Config{Registries: upstreams("http://service:80"), Timeouts: Timeouts{Hedge: time.Second}}, time.Second},
	} {
		bubble(t, tt.name, func(t *testing.T, net *network) {
			front := hangOnce("HEAD") // by whoever is asked first
			var d digest.Digest
			for _, name := range []string{"service:80", "a:80", "b:80"} {
				o := net.serve(t, name)
				d = o.manifest("app", "v1", m)
				o.setFront(front)
			}
			n := net.runWith(t, tt.cfg)
			for _, r := range (*n.registries.Load())[testHost].upstreams {
				for _, up := range r {
					up.health.credit = 1
				}
			}
			r := n.get(manifestURL("app", "v1"))
			if r.status != 200 || r.header.Get("Docker-Content-Digest") != d.String() || r.took != tt.want {
				t.Errorf("%d %s after %s, want 200 after %s", r.status, r.header.Get("Docker-Content-Digest"), r.took, tt.want)
			}
		})
	}
}

// TestHedgesAreFew checks that an upstream which is slow for long is asked
// hardly more often for it.
func TestHedgesAreFew(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		o := net.serve(t, "up:80")
		o.manifest("app", "v1", testManifest(digest.FromString("layer")))
		var mu sync.Mutex
		turn := 0
		o.setFront(func(_ http.ResponseWriter, r *http.Request) bool {
			mu.Lock()
			turn++
			slow := turn%2 == 0 // so that slowness never becomes usual
			mu.Unlock()
			if slow {
				pause(r, 900*time.Millisecond)
			}
			return false
		})
		n := net.run(t, "up:80")
		const requests = 100
		for range requests {
			if r := n.do("HEAD", manifestURL("app", "v1")); r.status != 200 {
				t.Fatalf("status %d", r.status)
			}
		}
		if got := o.count("HEAD"); got > requests+requests/10 {
			t.Errorf("%d requests for %d", got, requests)
		}
	})
}

// TestSlowPassword checks that an upstream which takes too long for one client's
// credentials is passed over for that client alone.
func TestSlowPassword(t *testing.T) {
	bubble(t, "", func(t *testing.T, net *network) {
		o := net.serve(t, "up:80")
		body, other := random(1000, 122), random(1000, 123)
		d, e := o.blob("app", body), o.blob("app", other)
		o.setFront(func(_ http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Authorization") == "Basic wrong" {
				pause(r, time.Minute)
			}
			return false
		})
		n := net.run(t, "up:80")
		for i, wait := range []time.Duration{1800 * time.Millisecond, 0} {
			r := n.get(blobURL("app", d), "Authorization", "Basic wrong")
			if r.status != http.StatusBadGateway || r.took != wait {
				t.Errorf("attempt %d: %d after %s, want 502 after %s", i, r.status, r.took, wait)
			}
		}
		r := n.get(blobURL("app", d), "Authorization", "Basic right")
		n.wantBlob(r, body, "fwd=miss; stored")
		if r.took != 0 {
			t.Errorf("another client waited %s", r.took)
		}
		n.wantBlob(n.get(blobURL("app", e)), other, "fwd=miss; stored")
	})
}
