package cache

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// multiPlatform puts an image of layer for this machine, and one of other for
// another one, into o.
func multiPlatform(o *origin, layer, other []byte) {
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	index.SchemaVersion = 2
	for arch, l := range map[string][]byte{runtime.GOARCH: layer, "s390x": other} {
		conf := fmt.Appendf(nil, `{"architecture":%q}`, arch)
		m := ocispec.Manifest{
			MediaType: ocispec.MediaTypeImageManifest,
			Config:    ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: o.blob("app", conf), Size: int64(len(conf))},
			Layers:    []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: o.blob("app", l), Size: int64(len(l))}},
		}
		m.SchemaVersion = 2
		body, _ := json.Marshal(m)
		index.Manifests = append(index.Manifests, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageManifest, Digest: o.manifest("app", "", string(body)), Size: int64(len(body)),
			Platform: &ocispec.Platform{OS: "linux", Architecture: arch},
		})
	}
	body, _ := json.Marshal(index)
	o.manifest("app", "v1", string(body))
}

// TestPrefetch brings an image and pulls it with the registry gone.
func TestPrefetch(t *testing.T) {
	o := newOrigin(t)
	layer, other := random(5<<20, 170), random(1000, 171)
	multiPlatform(o, layer, other)
	n := start(t, Config{Registries: upstreams(o.URL)})
	if err := n.Prefetch(t.Context(), []string{imageRef}, 0); err != nil {
		t.Fatal(err)
	}
	if n.stored(digest.FromBytes(other)) {
		t.Error("the image of another platform was brought")
	}
	n.settled()
	o.forget()
	if err := n.Prefetch(t.Context(), []string{imageRef}, 0); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"HEAD /v2/app/manifests/v1"}, o.asked); diff != "" {
		t.Errorf("asked the second time (-want +got):\n%s", diff)
	}
	o.Close()
	r := n.get(manifestURL("app", "v1"))
	var index ocispec.Index
	if err := json.Unmarshal(r.body, &index); err != nil || r.cache() != "hit; detail=stale-tag" {
		t.Fatalf("index: %q, %v", r.cache(), err)
	}
	for _, m := range index.Manifests {
		want := map[bool]int{true: 200, false: 502}[m.Platform.Architecture == runtime.GOARCH]
		if r := n.get(manifestURL("app", m.Digest.String())); r.status != want {
			t.Errorf("manifest for %s: %d", m.Platform.Architecture, r.status)
		}
	}
	n.wantBlob(n.get(blobURL("app", digest.FromBytes(layer))), layer, "hit")
}

// TestPrefetchErrors checks that one image does not keep another from coming,
// and that each fault is named.
func TestPrefetchErrors(t *testing.T) {
	o := newOrigin(t)
	layer := random(1000, 172)
	multiPlatform(o, layer, []byte("other"))
	foreign, _ := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{{
		Digest: digest.FromString("x"), Platform: &ocispec.Platform{OS: "plan9", Architecture: "mips"},
	}}})
	o.manifest("foreign", "v1", string(foreign))
	o.manifest("lacking", "v1", testManifest(digest.FromString("nowhere")))
	n := start(t, Config{Registries: upstreams(o.URL)})
	want := map[string]string{
		"nonsense":                         "not of the form",
		testHost + "/App:v1":               "not of the form",
		testHost + "/app@sha256:1":         "not of the form",
		"unknown.test/app:v1":              "does not answer for unknown.test",
		testHost + "/app:v2":               "does not have it",
		testHost + "/foreign:v1":           "no image for linux/" + runtime.GOARCH,
		testHost + "/lacking:v1":           "does not have it",
		testHost + "/app@" + missingDigest: "does not have it",
	}
	var images []string
	for image := range want {
		images = append(images, image)
	}
	err := n.Prefetch(t.Context(), append(images, imageRef), 0)
	if err == nil {
		t.Fatal("no error")
	}
	for image, why := range want {
		found := false
		for line := range strings.Lines(err.Error()) {
			found = found || strings.HasPrefix(line, "prefetching "+image+": ") && strings.Contains(line, why)
		}
		if !found {
			t.Errorf("%s: want %q in\n%v", image, why, err)
		}
	}
	if strings.Contains(err.Error(), imageRef+":") || !n.stored(digest.FromBytes(layer)) {
		t.Errorf("the good image was not brought: %v", err)
	}
	n.stop()
	if err := n.Prefetch(t.Context(), []string{imageRef}, 0); err == nil {
		t.Error("a cache that does not run has fetched")
	}
}

const missingDigest = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8b"

// TestPrefetchCredentials brings private images.
func TestPrefetchCredentials(t *testing.T) {
	layer := random(1000, 173)
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, _ := r.BasicAuth()
		q := r.URL.Query()
		if q.Get("scope") != "repository:app:pull" || q.Get("service") != "s, t" {
			http.Error(w, "bad query", http.StatusBadRequest)
			return
		}
		fmt.Fprintf(w, `{"token":"for-%s-%s"}`, user, password)
	}))
	defer tokens.Close()
	bearer := `Bearer realm="` + tokens.URL + `/token",service="s, t",scope="x"`
	for _, tt := range []struct {
		name, challenge, accepts string
		user                     string
		ok                       bool
	}{
		{"basic", basic, "Basic bm9kZTpzZWNyZXQ=", "node", true},
		{"basic, no credential", basic, "Basic bm9kZTpzZWNyZXQ=", "", false},
		{"bearer", bearer, "Bearer for-node-secret", "node", true},
		{"bearer, anonymous", bearer, "Bearer for--", "", true},
		{"bearer, not enough", bearer, "Bearer for-other-secret", "node", false},
		{"strange", "Strange x", "", "node", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := newOrigin(t)
			image(o, layer)
			guard(o, tt.challenge, map[string][]string{tt.accepts: {"app"}})
			if tt.accepts == "" {
				o.setFront(answering(401, "Www-Authenticate", tt.challenge))
			}
			n := start(t, Config{
				Registries:     upstreams(o.URL),
				NodeCredential: func(string) (string, string) { return tt.user, "secret" },
			})
			err := n.Prefetch(t.Context(), []string{imageRef}, 0)
			if (err == nil) != tt.ok || n.stored(digest.FromBytes(layer)) != tt.ok {
				t.Errorf("stored %v, error %v", n.stored(digest.FromBytes(layer)), err)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("the error tells the password: %v", err)
			}
			// What the node may read is not open to others.
			n.wantRefused(n.get(blobURL("app", digest.FromBytes(layer))), 401, "fwd=miss; fwd-status=401")
		})
	}
}

// TestPrefetchTokenRunsOut brings an image that takes longer than a token lasts.
func TestPrefetchTokenRunsOut(t *testing.T) {
	o, tokens := newOrigin(t), newTokenServer(t)
	layers := image(o, random(1000, 175), random(1000, 176), random(1000, 177))
	tokens.guard(o)
	guarded := o.front
	o.setFront(func(w http.ResponseWriter, r *http.Request) bool {
		done := guarded(w, r)
		if !done && strings.Contains(r.URL.Path, "/blobs/") {
			tokens.mu.Lock()
			clear(tokens.valid)
			tokens.mu.Unlock()
		}
		return done
	})
	n := start(t, Config{
		Registries:     upstreams(o.URL),
		NodeCredential: func(string) (string, string) { return "alice", "secret" },
	})
	if err := n.Prefetch(t.Context(), []string{imageRef}, 0); err != nil {
		t.Fatal(err)
	}
	for _, layer := range layers {
		if !n.stored(digest.FromBytes(layer)) {
			t.Error("a layer is missing")
		}
	}
}

// TestPrefetchBandwidth checks the rate, and that a client is not held to it.
func TestPrefetchBandwidth(t *testing.T) {
	const bandwidth = 100 << 10
	layer := random(10<<20, 174)
	bubble(t, "", func(t *testing.T, net *network) {
		o := net.serve(t, "up:80")
		image(o, layer)
		n := net.run(t, "up:80")
		began := time.Now()
		prefetched := make(chan error, 1)
		go func() { prefetched <- n.Prefetch(t.Context(), []string{imageRef}, bandwidth) }()
		time.Sleep(50 * time.Second)
		f := n.joinFill(digest.FromBytes(layer))
		f.mu.Lock()
		got := f.written
		f.mu.Unlock()
		f.leave(time.Minute)
		if got < 40*bandwidth || got > 60*bandwidth {
			t.Errorf("%d bytes in 50 seconds, want about %d", got, 50*bandwidth)
		}
		n.wantBlob(n.get(blobURL("app", digest.FromBytes(layer))), layer, "fwd=miss; collapsed; stored")
		if err := <-prefetched; err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > 60*time.Second {
			t.Errorf("with a client waiting it took %s", took)
		}
	})
}

func FuzzChallenge(f *testing.F) {
	f.Add(`realm="https://x/token",service=y , scope="a b"`)
	f.Add(`realm="`)
	f.Add(`=,=`)
	f.Fuzz(func(t *testing.T, s string) {
		for name := range challengeParams(s) {
			if strings.ContainsAny(name, "=") {
				t.Errorf("%q", name)
			}
		}
	})
}
