package clients

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// client is one program, as far as every client is alike. A nil function is
// something that it has no command for. Errors hold what the program said.
type client struct {
	name string
	// push pushes the image tagged v1 in an OCI layout.
	push func(t *testing.T, s *site, l login, layout, ref string) error
	// pull pulls the whole image and returns the digest of its configuration,
	// which survives when a client packs layers anew.
	pull func(t *testing.T, s *site, l login, ref string) (string, error)
	// tags lists a repository's tags.
	tags func(t *testing.T, s *site, l login, repository string) ([]string, error)
	// remove deletes the image.
	remove func(t *testing.T, s *site, l login, ref string) error
}

var clients = []client{crane, skopeo, podman, oras, containerd}

// newImage writes an image of three layers as an OCI layout, tagged v1, and
// returns the directory and the digest of the image's configuration.
func newImage(t *testing.T) (dir, config string) {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for range 3 {
		layer, err := random.Layer(200_000, types.OCILayer)
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			t.Fatal(err)
		}
	}
	// podman takes the path for an image name, which has no capitals.
	dir, err := os.MkdirTemp("", "layout-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "v1"})); err != nil {
		t.Fatal(err)
	}
	id, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	return dir, id.String()
}

// TestClients takes every client through what people do with it.
func TestClients(t *testing.T) {
	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			// One for each, for wrong passwords in a row are answered with 429.
			s := newSite(t, t.TempDir(), v1alpha1.ModeReadWrite)
			image, id := newImage(t)
			repository := s.host + "/team/" + c.name
			ref := repository + ":v1"
			if err := c.push(t, s, writer, image, ref); err != nil {
				t.Fatalf("pushing: %v", err)
			}
			if err := c.push(t, s, writer, image, repository+":v2"); err != nil {
				t.Fatalf("pushing what is there: %v", err)
			}
			for _, l := range []login{writer, reader} {
				got, err := c.pull(t, s, l, ref)
				if err != nil {
					t.Fatalf("pulling as %s: %v", l.user, err)
				}
				if got != id {
					t.Errorf("%s pulled configuration %s, pushed %s", l.user, got, id)
				}
			}
			if c.tags != nil {
				tags, err := c.tags(t, s, reader, repository)
				if err != nil {
					t.Fatalf("listing tags: %v", err)
				}
				if slices.Sort(tags); !slices.Equal(tags, []string{"v1", "v2"}) {
					t.Errorf("tags are %q, want v1 and v2", tags)
				}
			}
			c.testRefusals(t, s, image, repository)
			if c.remove != nil {
				c.testRemove(t, s, ref)
			}
		})
	}
}

// testRefusals does what is not allowed, and reads what the client says then.
func (c client) testRefusals(t *testing.T, s *site, image, repository string) {
	t.Helper()
	ref := repository + ":v1"
	secret := s.host + "/secret/" + c.name + ":v1"
	if err := c.push(t, s, writer, image, secret); err != nil {
		t.Fatalf("pushing elsewhere: %v", err)
	}
	_, err := c.pull(t, s, impostor, ref)
	wantRefusal(t, "pull with a wrong password", err, "401", "unauthorized", "invalid username/password", "authentication required")
	err = c.push(t, s, impostor, image, ref)
	wantRefusal(t, "push with a wrong password", err, "401", "unauthorized", "invalid username/password", "authentication required")
	_, err = c.pull(t, s, reader, secret)
	wantRefusal(t, "pull from outside the scope map", err, "403", "denied", "forbidden")
	err = c.push(t, s, reader, image, repository+":v3")
	wantRefusal(t, "push by a reader", err, "403", "denied", "forbidden")
	if c.tags != nil {
		_, err = c.tags(t, s, reader, s.host+"/secret/"+c.name)
		wantRefusal(t, "tags from outside the scope map", err, "403", "denied", "forbidden", "unauthorized")
	}
	if c.remove != nil {
		wantRefusal(t, "deletion by a reader", c.remove(t, s, reader, ref), "403", "denied", "forbidden", "unauthorized")
		if _, err := c.pull(t, s, reader, ref); err != nil {
			t.Errorf("after a deletion that was refused: %v", err)
		}
	}
}

func (c client) testRemove(t *testing.T, s *site, ref string) {
	t.Helper()
	if err := c.remove(t, s, writer, ref); err != nil {
		t.Fatalf("deleting: %v", err)
	}
	if _, err := c.pull(t, s, reader, ref); err == nil {
		t.Error("what was deleted can still be pulled")
	}
}

// TestReadOnly pushes to and deletes from a registry that only reads: whoever
// tries must be told why it does not work.
func TestReadOnly(t *testing.T) {
	data := t.TempDir()
	images := map[string]string{}
	t.Run("seed", func(t *testing.T) {
		s := newSite(t, data, v1alpha1.ModeReadWrite)
		for _, c := range clients {
			image, id := newImage(t)
			if err := c.push(t, s, writer, image, s.host+"/team/"+c.name+":v1"); err != nil {
				t.Fatal(err)
			}
			images[c.name] = id
		}
	})
	s := newSite(t, data, v1alpha1.ModeReadOnly)
	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			ref := s.host + "/team/" + c.name + ":v1"
			image, _ := newImage(t)
			wantRefusal(t, "push", c.push(t, s, writer, image, ref), "read-only")
			if c.remove != nil {
				wantRefusal(t, "deletion", c.remove(t, s, writer, ref), "read-only")
			}
			if got, err := c.pull(t, s, reader, ref); err != nil || got != images[c.name] {
				t.Errorf("pulled %s and %v, want %s", got, err, images[c.name])
			}
		})
	}
}

// wantRefusal checks that err says one of the given things, in any case.
func wantRefusal(t *testing.T, what string, err error, says ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: worked", what)
		return
	}
	t.Logf("%s: %v", what, err)
	said := strings.ToLower(err.Error())
	if !slices.ContainsFunc(says, func(s string) bool { return strings.Contains(said, s) }) {
		t.Errorf("%s: the message says none of %q: %v", what, says, err)
	}
}

// split takes host/repository:tag apart.
func split(ref string) (repository, tag string) {
	i := strings.LastIndexByte(ref, ':')
	return ref[:i], ref[i+1:]
}

func said(program string, args []string, err error, output []byte) error {
	return fmt.Errorf("%s %s: %w: %s", program, args[0], err, output)
}
