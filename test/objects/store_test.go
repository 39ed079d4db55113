package objects

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.yaml.in/yaml/v4"

	"github.com/connected-registry/connected-registry/storage"
	"github.com/connected-registry/connected-registry/storage/bucket"
)

// TestStorage runs those of the storage's own tests that take any object store, on
// each kind at a time: distribution's tests of drivers, and pushes, deletions and
// collectors at several replicas.
func TestStorage(t *testing.T) {
	program := filepath.Join(t.TempDir(), "storage.test")
	if out, err := exec.CommandContext(t.Context(), "go", "test", "-C", "../..", "-c", "-o", program, "./storage").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for name, config := range map[string]func(t *testing.T) bucket.Config{
		"MinIO": func(t *testing.T) bucket.Config {
			return minioConfig(t, startMinIO(t, MinIO{Buckets: []string{"images"}}))
		},
		"Azurite": func(t *testing.T) bucket.Config { return azureConfig(t, startAzurite(t)) },
		"FakeGCS": func(t *testing.T) bucket.Config {
			url, _ := tokens(t)
			return gcsConfig(t, startFakeGCS(t), url)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			content, err := yaml.Marshal(config(t))
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(t.TempDir(), "storage.yaml")
			if err := os.WriteFile(file, content, 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), program, "-test.v", "-test.run", "^(TestObjectsCollectWhilePushing|TestDriverSuite)$")
			cmd.Env = append(os.Environ(), "STORAGE_TEST_BUCKET="+file, "STORAGE_TEST_ROUNDS=20")
			out, err := cmd.CombinedOutput()
			if err != nil || !bytes.Contains(out, []byte("--- PASS: TestDriverSuite")) || !bytes.Contains(out, []byte("--- PASS: TestObjectsCollectWhilePushing")) {
				t.Fatalf("%v\n%s", err, out)
			}
		})
	}
}

func openStore(t *testing.T, b bucket.Bucket) *storage.Store {
	t.Helper()
	s, err := storage.Open(t.Context(), storage.Config{Root: t.TempDir(), Bucket: b})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// put stores a blob as the syncer does, and makes it part of a repository.
func put(ctx context.Context, s *storage.Store, name string, content []byte) (digest.Digest, error) {
	d := digest.FromBytes(content)
	r, err := s.Repository(name)
	if err != nil {
		return d, err
	}
	p, err := s.OpenPartial(d, int64(len(content)), int64(len(content)))
	if err != nil {
		return d, err
	}
	defer p.Close()
	if _, missing := p.Missing(0); missing > 0 {
		if err := p.Write(0, content[int64(len(content))-missing:]); err != nil {
			return d, err
		}
	}
	if err := p.Commit(ctx); err != nil {
		return d, err
	}
	return d, r.LinkLayer(ctx, d)
}

func read(ctx context.Context, s *storage.Store, name string, d digest.Digest) ([]byte, error) {
	r, err := s.Repository(name)
	if err != nil {
		return nil, err
	}
	c, err := r.OpenLayer(ctx, d)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return io.ReadAll(c)
}

// An object store that goes away leads to errors, and to nothing else; when it
// comes back, so does everything.
func TestStoreOutlivesItsMinIO(t *testing.T) {
	server := startMinIO(t, MinIO{Buckets: []string{"images"}})
	b := open(t, minioConfig(t, server))
	one, another := openStore(t, b), openStore(t, b)
	content := make([]byte, 30<<20) // in parts
	rand.Read(content)
	d, err := put(t.Context(), one, "app", content)
	if err != nil {
		t.Fatal(err)
	}
	got, err := read(t.Context(), another, "app", d)
	if err != nil || !bytes.Equal(got, content) {
		t.Fatalf("the other replica has %d bytes: %v", len(got), err)
	}

	server.Kill()
	soon, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if got, err := read(soon, another, "app", d); err == nil {
		t.Errorf("%d bytes came from nowhere", len(got))
	}
	fresh := append([]byte("fresh"), content[:9<<20]...)
	if _, err := put(soon, one, "app", fresh); err == nil {
		t.Error("a blob was stored nowhere")
	}
	if err := one.Ready(soon); err == nil {
		t.Error("it says that it is ready")
	}

	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := one.Ready(t.Context()); err != nil {
		t.Error(err)
	}
	if got, err := read(t.Context(), another, "app", d); err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
	d, err = put(t.Context(), one, "app", fresh)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := read(t.Context(), another, "app", d); err != nil || !bytes.Equal(got, fresh) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
	if did, err := one.Maintain(t.Context(), storage.Maintenance{Grace: time.Second}); err != nil || did.Scrubbed.Corrupt > 0 || did.Scrubbed.Blobs != 2 {
		t.Errorf("%+v, %v", did, err)
	}
}
