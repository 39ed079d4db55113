package cache

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
)

// contentDaemon is containerd's content service on a socket.
type contentDaemon struct {
	t      *testing.T
	socket string
	dir    string
	store  content.Store
	server *grpc.Server
}

func newContentDaemon(t *testing.T) *contentDaemon {
	t.Helper()
	short, err := os.MkdirTemp("", "c-") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(short) })
	d := &contentDaemon{t: t, socket: filepath.Join(short, "s"), dir: t.TempDir()}
	if d.store, err = local.NewStore(d.dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.stop)
	return d
}

func (d *contentDaemon) start() {
	d.t.Helper()
	l, err := net.Listen("unix", d.socket)
	if err != nil {
		d.t.Fatal(err)
	}
	d.server = grpc.NewServer()
	service := contentserver.New(d.store)
	if err := service.(interface{ Register(*grpc.Server) error }).Register(d.server); err != nil {
		d.t.Fatal(err)
	}
	go d.server.Serve(l)
}

func (d *contentDaemon) stop() {
	if d.server != nil {
		d.server.Stop()
		d.server = nil
	}
}

func (d *contentDaemon) put(body []byte) digest.Digest {
	d.t.Helper()
	dg := digest.FromBytes(body)
	desc := ocispec.Descriptor{Digest: dg, Size: int64(len(body))}
	if err := content.WriteBlob(d.t.Context(), d.store, dg.String(), bytes.NewReader(body), desc); err != nil {
		d.t.Fatal(err)
	}
	return dg
}

// damage changes a byte of the content of d.
func (d *contentDaemon) damage(dg digest.Digest) {
	d.t.Helper()
	path := filepath.Join(d.dir, "blobs", dg.Algorithm().String(), dg.Encoded())
	if err := os.Chmod(path, 0o600); err != nil {
		d.t.Fatal(err)
	}
	flip(d.t, path, 100)
}

// TestContainerdsContent serves what containerd has, without fetching or keeping
// it, and only to those who may read it.
func TestContainerdsContent(t *testing.T) {
	small, large, missing := random(1000, 130), random(9<<20, 131), random(2000, 132)
	daemon := newContentDaemon(t)
	daemon.start()
	o := newOrigin(t)
	for _, body := range [][]byte{small, large} {
		daemon.put(body)
		o.blob("team/a", body)
	}
	m := testManifest(digest.FromBytes(large))
	daemon.put([]byte(m))
	md := o.manifest("team/a", "v1", m)
	gone := o.blob("team/a", missing)
	guard(o, basic, map[string][]string{"Basic alice": {"team/a"}})
	n := start(t, Config{Registries: upstreams(o.URL), ContentStore: daemon.socket})

	const hit = "hit; detail=containerd"
	alice := []string{"Authorization", "Basic alice"}
	for _, body := range [][]byte{small, large} {
		path := blobURL("team/a", digest.FromBytes(body))
		n.wantRefused(n.get(path), 401, "fwd=miss; fwd-status=401")
		n.wantBlob(n.get(path, alice...), body, hit)
		if r := n.do("HEAD", path, alice...); r.status != 200 || r.cache() != hit {
			t.Errorf("HEAD: %d %q", r.status, r.cache())
		}
		if n.stored(digest.FromBytes(body)) {
			t.Error("it is kept twice")
		}
	}
	if r := n.get(manifestURL("team/a", md.String()), alice...); r.status != 200 || string(r.body) != m {
		t.Errorf("manifest: %d %s", r.status, r.body)
	}
	n.wantRefused(n.get(manifestURL("team/a", md.String())), 401, "fwd=miss; fwd-status=401")
	if got := o.count("GET /v2/team/a/manifests") + o.count("GET /v2/team/a/blobs"); got != 0 {
		t.Errorf("the registry was asked for content: %q", o.asked)
	}
	n.wantBlob(n.get(blobURL("team/a", gone), alice...), missing, "fwd=miss; stored")

	// Parts are fetched, as containerd asks for what it has not.
	r := n.get(blobURL("team/a", digest.FromBytes(small)), append(alice, "Range", "bytes=10-19")...)
	if r.status != 206 || !bytes.Equal(r.body, small[10:20]) || r.cache() != "fwd=miss; stored" {
		t.Errorf("%d %q", r.status, r.cache())
	}
	o.Close()
	n.wantBlob(n.get(blobURL("team/a", digest.FromBytes(large)), alice...), large, hit)
}

// TestContainerdsContentIsVerified serves what containerd's disk has spoilt from
// the registry.
func TestContainerdsContentIsVerified(t *testing.T) {
	daemon := newContentDaemon(t)
	daemon.start()
	o := newOrigin(t)
	n := start(t, Config{Registries: upstreams(o.URL), ContentStore: daemon.socket})
	for _, body := range [][]byte{random(1000, 133), random(9<<20, 134)} {
		d := daemon.put(body)
		daemon.damage(d)
		o.blob("app", body)
		if len(body) > HoldBackWhole {
			if r := n.get(blobURL("app", d)); r.err == nil || len(r.body) >= len(body) {
				t.Errorf("%d of %d bytes, %v", len(r.body), len(body), r.err)
			}
		}
		n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
	}
	m := testManifest(digest.FromString("layer"))
	daemon.damage(daemon.put([]byte(m)))
	md := o.manifest("app", "", m)
	if r := n.get(manifestURL("app", md.String())); r.status != 200 || string(r.body) != m {
		t.Errorf("manifest: %d %s", r.status, r.body)
	}
}

// TestContainerdComesAndGoes starts the cache before containerd and restarts
// containerd.
func TestContainerdComesAndGoes(t *testing.T) {
	daemon := newContentDaemon(t)
	o := newOrigin(t)
	timeouts := patient
	timeouts.Retry = time.Millisecond
	n := start(t, Config{Registries: upstreams(o.URL), ContentStore: daemon.socket, Timeouts: timeouts})
	put := func(seed byte) digest.Digest {
		body := random(1000, seed)
		o.blob("app", body)
		return daemon.put(body)
	}
	n.wantBlob(n.get(blobURL("app", put(135))), random(1000, 135), "fwd=miss; stored")
	for seed := byte(136); seed < 140; seed++ {
		if seed%2 == 0 {
			daemon.start()
		} else {
			daemon.stop()
			n.wantBlob(n.get(blobURL("app", put(seed))), random(1000, seed), "fwd=miss; stored")
			continue
		}
		d := put(seed)
		n.await(func() bool { return n.do("HEAD", blobURL("app", d)).cache() == "hit; detail=containerd" })
		n.wantBlob(n.get(blobURL("app", d)), random(1000, seed), "hit; detail=containerd")
	}
}

// TestContentStoreThatHangs has a socket that accepts and says nothing.
func TestContentStoreThatHangs(t *testing.T) {
	daemon := newContentDaemon(t)
	l, err := net.Listen("unix", daemon.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	o := newOrigin(t)
	body := random(1000, 140)
	d := o.blob("app", body)
	n := start(t, Config{Registries: upstreams(o.URL), ContentStore: daemon.socket})
	n.wantBlob(n.get(blobURL("app", d)), body, "fwd=miss; stored")
	if !n.disk.Load().content.away.has(struct{}{}) {
		t.Error("the next request waits again")
	}
}
