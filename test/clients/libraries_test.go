package clients

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	orasgo "oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// orasRepository is a repository as oras sees it.
func orasRepository(t *testing.T, s *site, l login, name string) (*remote.Repository, error) {
	r, err := remote.NewRepository(name)
	if err != nil {
		return nil, err
	}
	r.Client = &auth.Client{
		Client:     s.httpClient(t),
		Cache:      auth.NewCache(),
		Credential: auth.StaticCredential(s.host, auth.Credential{Username: l.user, Password: l.password}),
	}
	return r, nil
}

var oras = client{
	name: "oras",
	push: func(t *testing.T, s *site, l login, layout, ref string) error {
		name, tag := split(ref)
		r, err := orasRepository(t, s, l, name)
		if err != nil {
			return err
		}
		store, err := oci.New(layout)
		if err != nil {
			return err
		}
		_, err = orasgo.Copy(t.Context(), store, "v1", r, tag, orasgo.DefaultCopyOptions)
		return err
	},
	pull: func(t *testing.T, s *site, l login, ref string) (string, error) {
		name, tag := split(ref)
		r, err := orasRepository(t, s, l, name)
		if err != nil {
			return "", err
		}
		dir := t.TempDir()
		store, err := oci.New(dir)
		if err != nil {
			return "", err
		}
		if _, err = orasgo.Copy(t.Context(), r, tag, store, tag, orasgo.DefaultCopyOptions); err != nil {
			return "", err
		}
		return imageID(dir)
	},
	tags: func(t *testing.T, s *site, l login, repository string) (tags []string, err error) {
		r, err := orasRepository(t, s, l, repository)
		if err != nil {
			return nil, err
		}
		err = r.Tags(t.Context(), "", func(page []string) error {
			tags = append(tags, page...)
			return nil
		})
		return tags, err
	},
	remove: func(t *testing.T, s *site, l login, ref string) error {
		name, tag := split(ref)
		r, err := orasRepository(t, s, l, name)
		if err != nil {
			return err
		}
		d, err := r.Resolve(t.Context(), tag)
		if err != nil {
			return err
		}
		return r.Delete(t.Context(), d)
	},
}

var containerd = client{
	name: "containerd",
	push: func(t *testing.T, s *site, l login, layout, ref string) error {
		pusher, err := containerdResolver(t, s, l).Pusher(t.Context(), ref)
		if err != nil {
			return err
		}
		read := func(d ocispec.Descriptor) ([]byte, error) {
			return os.ReadFile(filepath.Join(layout, "blobs", d.Digest.Algorithm().String(), d.Digest.Encoded()))
		}
		data, err := os.ReadFile(filepath.Join(layout, "index.json"))
		if err != nil {
			return err
		}
		var index ocispec.Index
		if err := json.Unmarshal(data, &index); err != nil {
			return err
		}
		return walk(index.Manifests[0], read, func(d ocispec.Descriptor, data []byte) error {
			w, err := pusher.Push(t.Context(), d)
			if errdefs.IsAlreadyExists(err) {
				return nil
			}
			if err != nil {
				return err
			}
			defer w.Close()
			return content.Copy(t.Context(), w, bytes.NewReader(data), d.Size, d.Digest)
		})
	},
	pull: func(t *testing.T, s *site, l login, ref string) (string, error) {
		resolver := containerdResolver(t, s, l)
		name, root, err := resolver.Resolve(t.Context(), ref)
		if err != nil {
			return "", err
		}
		fetcher, err := resolver.Fetcher(t.Context(), name)
		if err != nil {
			return "", err
		}
		var id string
		err = walk(root, func(d ocispec.Descriptor) ([]byte, error) { return fetch(t.Context(), fetcher, d) },
			func(d ocispec.Descriptor, data []byte) error {
				if d.MediaType == "application/vnd.docker.container.image.v1+json" || d.MediaType == ocispec.MediaTypeImageConfig {
					id = d.Digest.String()
				}
				return nil
			})
		return id, err
	},
}

// walk calls visit for what a manifest refers to, and for the manifest last.
func walk(root ocispec.Descriptor, read func(ocispec.Descriptor) ([]byte, error), visit func(ocispec.Descriptor, []byte) error) error {
	data, err := read(root)
	if err != nil {
		return err
	}
	var manifest ocispec.Manifest
	if err := json.Unmarshal(data, &manifest); err != nil {
		return err
	}
	for _, d := range append(manifest.Layers, manifest.Config) {
		blob, err := read(d)
		if err != nil {
			return err
		}
		if err := visit(d, blob); err != nil {
			return fmt.Errorf("%s: %w", d.MediaType, err)
		}
	}
	return visit(root, data)
}

func fetch(ctx context.Context, fetcher remotes.Fetcher, d ocispec.Descriptor) ([]byte, error) {
	r, err := fetcher.Fetch(ctx, d)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	if actual := d.Digest.Algorithm().FromBytes(data); actual != d.Digest {
		return nil, errors.New("wrong bytes: " + actual.String())
	}
	return data, nil
}

// containerdResolver reads a hosts.toml, as containerd does.
func containerdResolver(t *testing.T, s *site, l login) remotes.Resolver {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, s.host, "hosts.toml"), fmt.Appendf(nil, `server = "https://%[1]s"
[host."https://%[1]s"]
  capabilities = ["pull", "resolve", "push"]
  ca = %[2]q
`, s.host, s.caFile))
	return docker.NewResolver(docker.ResolverOptions{
		Hosts: config.ConfigureHosts(t.Context(), config.HostOptions{
			HostDir:     config.HostDirFromRoot(dir),
			Credentials: func(string) (string, string, error) { return l.user, l.password, nil },
		}),
	})
}
