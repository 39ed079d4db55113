package replicas

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/connected-registry/connected-registry/storage"
)

// ledger is what was acknowledged to clients.
type ledger struct {
	mu      sync.Mutex
	tags    map[string]map[string]digest.Digest // by repository; guarded by mu
	unclear map[string]bool                     // repository:tag whose last change was refused; guarded by mu
	changes map[storage.Change]bool             // guarded by mu
	pushes  int                                 // guarded by mu
	deletes int                                 // guarded by mu
}

func newLedger() *ledger {
	return &ledger{tags: make(map[string]map[string]digest.Digest), unclear: make(map[string]bool), changes: make(map[storage.Change]bool)}
}

// pushed notes that a push of a tag was acknowledged.
func (l *ledger) pushed(repository, tag string, d digest.Digest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tags[repository] == nil {
		l.tags[repository] = make(map[string]digest.Digest)
	}
	l.tags[repository][tag] = d
	delete(l.unclear, repository+":"+tag)
	l.changes[change(repository, tag, storage.ActionPush)] = true
	l.pushes++
}

// deleted notes that the deletion of a tag was acknowledged.
func (l *ledger) deleted(repository, tag string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.tags[repository], tag)
	delete(l.unclear, repository+":"+tag)
	l.changes[change(repository, tag, storage.ActionDelete)] = true
	l.deletes++
}

// refused notes that nobody knows what a tag is now.
func (l *ledger) refused(repository, tag string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unclear[repository+":"+tag] = true
}

// check compares what a registry answers with what was acknowledged: each
// repository's tags, and what each names, to the last byte.
func (l *ledger) check(t *testing.T, client *http.Client, host string) {
	t.Helper()
	seen := make(map[string]bool) // blobs, by repository
	for _, repository := range slices.Sorted(maps.Keys(l.tags)) {
		want := l.tags[repository]
		l.checkTags(t, client, host, repository, want)
		for tag, d := range want {
			if l.unclear[repository+":"+tag] {
				continue
			}
			base := "https://" + host + "/v2/" + repository
			content, named, err := get(t.Context(), client, base+"/manifests/"+tag)
			if err == nil && (named != d || digest.FromBytes(content) != d) {
				err = fmt.Errorf("it names %s and holds %s, not %s", named, digest.FromBytes(content), d)
			}
			if err != nil {
				t.Errorf("%s:%s: %v", repository, tag, err)
				continue
			}
			needs, err := references(content)
			if err != nil {
				t.Error(err)
			}
			for _, need := range needs {
				if seen[repository+string(need.Digest)] {
					continue
				}
				seen[repository+string(need.Digest)] = true
				content, _, err := get(t.Context(), client, base+"/blobs/"+need.Digest.String())
				if err == nil && (digest.FromBytes(content) != need.Digest || int64(len(content)) != need.Size) {
					err = fmt.Errorf("it holds %d bytes with digest %s", len(content), digest.FromBytes(content))
				}
				if err != nil {
					t.Errorf("%s of %s:%s: %v", need.Digest, repository, tag, err)
				}
			}
		}
	}
	t.Logf("%d pushes and %d deletions were acknowledged; %d blobs hold right", l.pushes, l.deletes, len(seen))
}

func (l *ledger) checkTags(t *testing.T, client *http.Client, host, repository string, want map[string]digest.Digest) {
	t.Helper()
	content, _, err := get(t.Context(), client, "https://"+host+"/v2/"+repository+"/tags/list")
	if err != nil {
		t.Errorf("tags of %s: %v", repository, err)
		return
	}
	var list struct{ Tags []string }
	if err := json.Unmarshal(content, &list); err != nil {
		t.Error(err)
	}
	unclear := func(tag string) bool { return l.unclear[repository+":"+tag] }
	sure := slices.DeleteFunc(slices.Sorted(maps.Keys(want)), unclear)
	if diff := cmp.Diff(sure, slices.DeleteFunc(list.Tags, unclear)); diff != "" {
		t.Errorf("tags of %s (-acknowledged +there):\n%s", repository, diff)
	}
}

// journalled checks that a leader was told of every change.
func (l *ledger) journalled(t *testing.T, heard map[storage.Change]bool) {
	t.Helper()
	for c := range l.changes {
		if !heard[c] {
			t.Errorf("the journal never had the %s of %s:%s", c.Action, c.Repository, c.Tag)
		}
	}
}

// references are the blobs that a manifest needs.
func references(manifest []byte) ([]ocispec.Descriptor, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(manifest, &m); err != nil {
		return nil, fmt.Errorf("manifest %q: %w", manifest, err)
	}
	return append(m.Layers, m.Config), nil
}

// get reads all of something, and what the answer says its digest is.
func get(ctx context.Context, client *http.Client, url string) ([]byte, digest.Digest, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, "", err
	}
	r.SetBasicAuth(user, password)
	r.Header.Set("Accept", ocispec.MediaTypeImageManifest)
	answer, err := client.Do(r)
	if err != nil {
		return nil, "", err
	}
	defer answer.Body.Close()
	content, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", answer.Status, bytes.TrimSpace(content))
	}
	return content, digest.Digest(answer.Header.Get("Docker-Content-Digest")), err
}

// nothingPartial reads everything on a directory: each blob is that of its
// digest, and each link names one.
func nothingPartial(t *testing.T, root string) {
	t.Helper()
	tree := filepath.Join(root, "docker/registry/v2")
	blobs, links := 0, 0
	blobFile := func(d digest.Digest) string {
		return filepath.Join(tree, "blobs", d.Algorithm().String(), d.Encoded()[:2], d.Encoded(), "data")
	}
	err := filepath.WalkDir(tree, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || strings.Contains(path, "/_uploads/") {
			return err
		}
		switch e.Name() {
		case "data":
			blobs++
			content, err := os.ReadFile(path)
			if name := filepath.Base(filepath.Dir(path)); err == nil && digest.FromBytes(content).Encoded() != name {
				t.Errorf("%s holds %d other bytes", path, len(content))
			}
			return err
		case "link":
			links++
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			d := digest.Digest(content)
			if d.Validate() != nil {
				t.Errorf("%s holds %q", path, content)
			} else if _, err := os.Stat(blobFile(d)); err != nil && !strings.Contains(path, "/_manifests/tags/") {
				t.Errorf("%s: %v", path, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	t.Logf("%d blobs and %d links on the directory", blobs, links)
}
