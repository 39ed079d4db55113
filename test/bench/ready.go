package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage"
)

const (
	manyRepositories = 100
	manyBlobs        = 200_000 // each with a link
	manyTags         = 20_000
	manyDeleted      = 5_000 // files that a crash left to be deleted
)

// ready measures how long a replica on a store that holds much takes from its
// start until it is ready and until it answers a pull, against one on a store that
// holds a single image.
func (b *benchmark) ready() ([]line, error) {
	large, small := filepath.Join(b.dir, "many"), filepath.Join(b.dir, "one")
	for _, data := range []string{large, small} {
		if err := seedOne(filepath.Join(data, "registry")); err != nil {
			return nil, err
		}
	}
	if err := seedMany(filepath.Join(large, "registry")); err != nil {
		return nil, err
	}
	defer os.RemoveAll(large)
	settings, err := b.replicaSettings()
	if err != nil {
		return nil, err
	}
	var ready, pull samples
	err = turns(b.rounds, func(many bool) error {
		data := small
		if many {
			data = large
			if err := leaveDeleted(filepath.Join(large, "registry")); err != nil {
				return err
			}
		}
		until, answered, err := b.startReplica(settings, data)
		ready.add(many, until.Seconds())
		pull.add(many, answered.Seconds())
		return err
	})
	return []line{
		ready.line("s ready", bound{mostOurs: 2}),
		pull.line("s pull", bound{mostOurs: 2}),
	}, err
}

// startReplica starts the command registry, and says how long it took to be ready
// and to answer a pull. Then it ends it.
func (b *benchmark) startReplica(settings, data string) (ready, answered time.Duration, err error) {
	addr, err := freeAddress()
	if err != nil {
		return 0, 0, err
	}
	health, err := freeAddress()
	if err != nil {
		return 0, 0, err
	}
	begun := time.Now()
	p, err := b.start("replica", addr, filepath.Join(b.dir, "connected-registry"), "registry", "--plain-http", "--replica", settings,
		"--data", data, "--listen", addr, "--health-listen", health, "--drain-delay", "0s", "--drain-timeout", "1s")
	if err != nil {
		return 0, 0, err
	}
	defer b.stopLast()
	if err := until(begun, "http://"+health+"/readyz"); err != nil {
		return 0, 0, p.died(err)
	}
	ready = time.Since(begun)
	if err := until(begun, "http://"+addr+"/v2/"+imageName+"/manifests/latest"); err != nil {
		return 0, 0, p.died(err)
	}
	return ready, time.Since(begun), nil
}

// until asks until the answer is 200.
func until(begun time.Time, url string) error {
	for {
		answer, err := http.Get(url)
		if err == nil {
			_, _ = io.Copy(io.Discard, answer.Body)
			answer.Body.Close()
			if answer.StatusCode == http.StatusOK {
				return nil
			}
			err = fmt.Errorf("%s: %s", url, answer.Status)
		}
		if time.Since(begun) > startTime {
			return err
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// replicaSettings are the files that a replica is told by.
func (b *benchmark) replicaSettings() (dir string, err error) {
	dir = filepath.Join(b.dir, "replica")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	for name, content := range map[string]string{
		"resource.yaml": "apiVersion: connectedregistry.io/v1alpha1\nkind: ConnectedRegistry\nmetadata: {name: bench}\nspec: {mode: ReadWrite, anonymousPull: true}\n",
		"secret":        strings.Repeat("ab", 32),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// seedOne stores an image.
func seedOne(root string) error {
	ctx := context.Background()
	store, err := storage.Open(ctx, storage.Config{Root: root})
	if err != nil {
		return err
	}
	defer store.Close()
	repo, err := store.Repository(imageName)
	if err != nil {
		return err
	}
	content := manifest()
	return repo.PutManifest(ctx, digest.FromBytes(content), content, "latest")
}

// seedMany stores blobs without content, links and tags, as files alone.
func seedMany(root string) error {
	tree := filepath.Join(root, "docker/registry/v2")
	var name string // the last digest, in hex
	for i := range manyBlobs {
		var number [8]byte
		binary.BigEndian.PutUint64(number[:], uint64(i))
		sum := sha256.Sum256(number[:])
		name = hex.EncodeToString(sum[:])
		repository := filepath.Join(tree, "repositories/many", fmt.Sprint(i%manyRepositories))
		files := map[string]string{
			filepath.Join(tree, "blobs/sha256", name[:2], name, "data"): "",
			filepath.Join(repository, "_layers/sha256", name, "link"):   "sha256:" + name,
		}
		if i < manyTags {
			tag := filepath.Join(repository, "_manifests/tags", fmt.Sprint("v", i))
			files[filepath.Join(tag, "current/link")] = "sha256:" + name
			files[filepath.Join(tag, "index/sha256", name, "link")] = "sha256:" + name
			files[filepath.Join(repository, "_manifests/revisions/sha256", name, "link")] = "sha256:" + name
		}
		for file, content := range files {
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// leaveDeleted leaves what a replica that died while it deleted a repository does.
func leaveDeleted(root string) error {
	for i := range manyDeleted {
		dir := filepath.Join(root, "trash/left/_layers/sha256", fmt.Sprint(i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "link"), nil, 0o644); err != nil {
			return err
		}
	}
	return nil
}
