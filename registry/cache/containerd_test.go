package cache

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// containerd is a node's containerd as far as pulling goes: its resolver, reading
// a hosts.toml, and its content store.
type containerd struct {
	t     *testing.T
	hosts string
	store content.Store
	user  string // "": no pull secret
}

// newContainerd has hosts as its mirrors, in order.
func newContainerd(t *testing.T, hosts ...string) *containerd {
	t.Helper()
	c := &containerd{t: t, hosts: t.TempDir()}
	var b bytes.Buffer
	for _, h := range hosts {
		fmt.Fprintf(&b, "[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", h)
	}
	dir := filepath.Join(c.hosts, testHost)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	toml := "server = " + strconv.Quote(hosts[len(hosts)-1]) + "\n" + b.String()
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(toml), 0o600); err != nil {
		t.Fatal(err)
	}
	c.reset()
	return c
}

// reset forgets all content.
func (c *containerd) reset() {
	c.t.Helper()
	store, err := local.NewStore(c.t.TempDir())
	if err != nil {
		c.t.Fatal(err)
	}
	c.store = store
}

// pull fetches imageRef with everything it consists of, each blob in parallel
// parts if parallel is more than 1.
func (c *containerd) pull(parallel int) error {
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	log.L.Logger.SetOutput(io.Discard)
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	options := config.HostOptions{
		HostDir: config.HostDirFromRoot(c.hosts),
		Credentials: func(string) (string, string, error) {
			if c.user == "" {
				return "", "", nil
			}
			return c.user, "password", nil
		},
		UpdateClient: func(hc *http.Client) error {
			hc.Transport = client.Transport
			return nil
		},
	}
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: config.ConfigureHosts(ctx, options)})
	resolver.(remotes.ResolverWithOptions).SetOptions(
		transfer.WithMaxConcurrentDownloads(parallel), transfer.WithConcurrentLayerFetchBuffer(1<<20))
	name, desc, err := resolver.Resolve(ctx, imageRef)
	if err != nil {
		return err
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return err
	}
	return images.Dispatch(ctx, images.Handlers(remotes.FetchHandler(c.store, fetcher), images.ChildrenHandler(c.store)), nil, desc)
}

// has checks that the content of body arrived and is right.
func (c *containerd) has(body []byte) {
	c.t.Helper()
	d := digest.FromBytes(body)
	got, err := content.ReadBlob(c.t.Context(), c.store, ocispec.Descriptor{Digest: d, Size: int64(len(body))})
	if err != nil || !bytes.Equal(got, body) {
		c.t.Errorf("%s: %d of %d bytes, %v", d, len(got), len(body), err)
	}
}

// image puts an image with layers into o under app:v1 and returns all its
// contents.
func image(o *origin, layers ...[]byte) [][]byte {
	conf := []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`)
	m := ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: o.blob("app", conf), Size: int64(len(conf))},
	}
	m.SchemaVersion = 2
	for _, l := range layers {
		m.Layers = append(m.Layers, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerGzip, Digest: o.blob("app", l), Size: int64(len(l)),
		})
	}
	body, _ := json.Marshal(m)
	o.manifest("app", "v1", string(body))
	return append(layers, conf, body)
}

const imageRef = testHost + "/app:v1"

// TestContainerdPulls pulls by way of a cache: cold, warm, and with everything
// else gone.
func TestContainerdPulls(t *testing.T) {
	for _, parallel := range []int{1, 4} {
		t.Run(strconv.Itoa(parallel), func(t *testing.T) {
			o, direct := newOrigin(t), newOrigin(t)
			all := image(o, random(9<<20, 60), random(100, 61), random(5<<20, 62))
			image(direct, all[:3]...)
			n := start(t, Config{Registries: upstreams(o.URL)})
			c := newContainerd(t, n.url, direct.URL)
			for _, phase := range []string{"cold", "warm", "offline"} {
				if phase == "offline" {
					n.settled()
					o.Close()
					direct.Close()
				}
				c.reset()
				if err := c.pull(parallel); err != nil {
					t.Fatalf("%s: %v", phase, err)
				}
				for _, body := range all {
					c.has(body)
				}
				for path, want := range map[string]int{"GET /v2/app/blobs/": 4, "GET /v2/app/manifests/": 1} {
					if got := o.count(path); got != want {
						t.Errorf("%s: %d × %s, want %d", phase, got, path, want)
					}
				}
			}
			if got := direct.count(""); got != 0 {
				t.Errorf("the next host was asked: %q", direct.asked)
			}
		})
	}
}

// TestContainerdPullsPrivate pulls with a pull secret, then without the
// registry, then with another's.
func TestContainerdPullsPrivate(t *testing.T) {
	o := newOrigin(t)
	all := image(o, random(5<<20, 63))
	o.setFront(func(w http.ResponseWriter, r *http.Request) bool {
		if user, _, _ := r.BasicAuth(); user == "alice" {
			return false
		}
		w.Header().Set("Www-Authenticate", basic)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	n := start(t, Config{Registries: upstreams(o.URL)})
	alice := newContainerd(t, n.url, refusing(t))
	alice.user = "alice"
	mallory := newContainerd(t, n.url, refusing(t))
	for _, phase := range []string{"cold", "offline"} {
		alice.reset()
		if err := alice.pull(1); err != nil {
			t.Fatalf("%s: %v", phase, err)
		}
		for _, body := range all {
			alice.has(body)
		}
		for _, user := range []string{"", "mallory"} {
			mallory.user = user
			if err := mallory.pull(1); err == nil {
				t.Errorf("%s: %q could pull", phase, user)
			}
		}
		n.settled()
		o.Close()
	}
}

// hasty are timeouts for what is broken anyway.
var hasty = Timeouts{
	Dial: time.Second, Headers: time.Second, Tag: time.Second, Stall: 300 * time.Millisecond,
	MinRate: 1024, Unread: time.Minute, Retry: time.Minute,
}

// TestContainerdFaults pulls from a cache whose upstream is broken in every way,
// with a next host that is not: the pull must succeed, and soon.
func TestContainerdFaults(t *testing.T) {
	layer := random(9<<20, 64)
	stall := func(c net.Conn) {
		io.Copy(io.Discard, c)
		c.Close()
	}
	token := answering(401, "Www-Authenticate", `Bearer realm="`+refusing(t)+`/token",service="x"`)
	for _, tt := range []struct {
		name  string
		url   string
		front func(http.ResponseWriter, *http.Request) bool
		again bool // unless it is lucky, only the next pull can be saved
	}{
		{name: "refused", url: refusing(t)},
		{name: "silent", url: "http://" + silent(t)},
		{name: "silent TLS", url: "https://" + silent(t)},
		{name: "500", front: answering(500)},
		{name: "429", front: answering(429)},
		{name: "408", front: answering(408)},
		{name: "404", front: answering(404)},
		{name: "403", front: answering(403)},
		{name: "401", front: answering(401)},
		{name: "401 Basic", front: answering(401, "Www-Authenticate", basic)},
		{name: "401 Bearer", front: token},
		{name: "500 for blobs", front: onlyBlobs(answering(500))},
		{name: "reset mid-blob", front: breakingOnly(layer, 5<<20, reset)},
		{name: "reset at once", front: breakingOnly(layer, 0, reset)},
		{name: "short mid-blob", front: breakingOnly(layer, 5<<20, fin)},
		{name: "short at once", front: breakingOnly(layer, 0, fin)},
		{name: "stalled mid-blob", front: breakingOnly(layer, 5<<20, stall)},
		{name: "stalled at once", front: breakingOnly(layer, 0, stall)},
		{name: "wrong bytes", front: wrongBlob(layer), again: true},
	} {
		for _, parallel := range []int{1, 4} {
			if parallel > 1 && (strings.Contains(tt.name, "mid-blob") || tt.again) {
				continue // containerd fails as soon as one part does
			}
			t.Run(tt.name+"/"+strconv.Itoa(parallel), func(t *testing.T) {
				t.Parallel()
				o, direct := newOrigin(t), newOrigin(t)
				image(o, layer, random(1000, 65))
				all := image(direct, layer, random(1000, 65))
				o.setFront(tt.front)
				url := tt.url
				if url == "" {
					url = o.URL
				}
				n := start(t, Config{Registries: upstreams(url), Timeouts: hasty})
				c := newContainerd(t, n.url, direct.URL)
				err := c.pull(parallel)
				if tt.again && err != nil {
					c.reset() // as containerd's own cleaning does
					err = c.pull(parallel)
				}
				if err != nil {
					t.Fatal(err)
				}
				for _, body := range all {
					c.has(body)
				}
			})
		}
	}
}

func onlyBlobs(front func(http.ResponseWriter, *http.Request) bool) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		rt, err := parseRoute(r.URL)
		return err == nil && rt.kind == kindBlob && front(w, r)
	}
}

// only applies front to one path.
func only(path string, front func(http.ResponseWriter, *http.Request) bool) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool { return r.URL.Path == path && front(w, r) }
}

// wrongBlob changes a byte early in that one blob.
func wrongBlob(body []byte) func(http.ResponseWriter, *http.Request) bool {
	wrong := bytes.Clone(body)
	wrong[100] ^= 1
	return only(blobURL("app", digest.FromBytes(body)), func(w http.ResponseWriter, r *http.Request) bool {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(wrong))
		return true
	})
}

// breakingOnly breaks that one blob.
func breakingOnly(body []byte, n int, end func(net.Conn)) func(http.ResponseWriter, *http.Request) bool {
	return only(blobURL("app", digest.FromBytes(body)), breaking(body, n, end))
}
