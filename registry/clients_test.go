package registry

import (
	"errors"
	"net/http"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/crane"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// startTLS runs a registry on TLS and returns its address and a transport that
// trusts it.
func startTLS(t *testing.T, cfg Config) (host string, tr http.RoundTripper) {
	t.Helper()
	authority := newCA(t)
	cfg.CertFile, cfg.KeyFile = tlsFiles(t)
	authority.issue(t, 2, cfg.CertFile, cfg.KeyFile)
	cfg.Listener = listen(t)
	start(t, newServer(t, cfg))
	return cfg.Listener.Addr().String(), tlsClient(t, authority).Transport
}

func TestCraneRoundTrip(t *testing.T) {
	host, tr := startTLS(t, Config{})
	options := []crane.Option{crane.WithTransport(tr)}
	img, err := random.Image(1<<16, 5)
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []types.MediaType{types.DockerManifestSchema2, types.OCIManifestSchema1} {
		ref := host + "/team/app:" + map[bool]string{true: "oci", false: "docker"}[kind == types.OCIManifestSchema1]
		want := mutate.MediaType(img, kind)
		if err := crane.Push(want, ref, options...); err != nil {
			t.Fatal(err)
		}
		if err := crane.Push(want, ref, options...); err != nil {
			t.Fatalf("pushing again: %v", err)
		}
		got, err := crane.Pull(ref, options...)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Image(got); err != nil {
			t.Errorf("%s: %v", ref, err)
		}
		if d, _ := want.Digest(); crane.Tag(host+"/team/app@"+d.String(), "again", options...) != nil {
			t.Error("tagging by digest")
		}
	}
	tags, err := crane.ListTags(host+"/team/app", options...)
	if diff := cmp.Diff([]string{"again", "docker", "oci"}, tags); err != nil || diff != "" {
		t.Errorf("tags (-want +got):\n%s%v", diff, err)
	}
	if err := crane.Copy(host+"/team/app:oci", host+"/other:copied", options...); err != nil {
		t.Errorf("copying, which mounts: %v", err)
	}
	repos, err := crane.Catalog(host, options...)
	if diff := cmp.Diff([]string{"other", "team/app"}, repos); err != nil || diff != "" {
		t.Errorf("catalogue (-want +got):\n%s%v", diff, err)
	}
	if err := crane.Delete(host+"/team/app:docker", options...); err != nil {
		t.Errorf("deleting a tag: %v", err)
	}
	_, err = crane.Digest(host+"/team/app:docker", options...)
	var answer *transport.Error
	if !errors.As(err, &answer) || answer.StatusCode != http.StatusNotFound {
		t.Errorf("after deleting: %v", err)
	}
}

func TestIndexRoundTrip(t *testing.T) {
	host, tr := startTLS(t, Config{})
	idx, err := random.Index(1<<12, 2, 3)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(host + "/multi:latest")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, idx, remote.WithTransport(tr)); err != nil {
		t.Fatal(err)
	}
	got, err := remote.Index(ref, remote.WithTransport(tr))
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(got); err != nil {
		t.Error(err)
	}
}

// An index that names manifests of other platforms which were left out.
func TestSparseIndex(t *testing.T) {
	host, tr := startTLS(t, Config{})
	ref, err := name.ParseReference(host + "/sparse:latest")
	if err != nil {
		t.Fatal(err)
	}
	here, err := random.Image(1000, 1)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, err := random.Image(1000, 1)
	if err != nil {
		t.Fatal(err)
	}
	idx := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: here}, mutate.IndexAddendum{Add: elsewhere})
	if err := remote.Write(ref, here, remote.WithTransport(tr)); err != nil {
		t.Fatal(err)
	}
	if err := remote.Put(ref, idx, remote.WithTransport(tr)); err != nil {
		t.Fatal(err)
	}
	got, err := remote.Index(ref, remote.WithTransport(tr))
	if err != nil {
		t.Fatal(err)
	}
	m, err := got.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	want, _ := here.Digest()
	if !slices.ContainsFunc(m.Manifests, func(d v1.Descriptor) bool { return d.Digest == want }) {
		t.Errorf("index %v lacks %s", m.Manifests, want)
	}
}
