package syncer

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

func TestSyncFetchesEachBlobOnce(t *testing.T) {
	p := newTestParent(t, registry.WithReferrersSupport(true))
	base, middle, own := testLayer(1, 300_000), testLayer(2, 200_000), testLayer(3, 100_000)
	a := testImage(t, "a", base, middle)
	b := testImage(t, "b", base, own)
	c := testImage(t, "c", base, middle, own)
	p.pushImage(t, "team/app:1.0", a)
	p.pushImage(t, "team/app:latest", a)
	p.pushImage(t, "team/app:2.0", b)
	p.pushImage(t, "team/web:1.0", c)

	f := newFixture(t, p, exactly("team/app", "team/web")...)
	result := f.mustSync(t)

	if want := uniqueBytes(t, a, b, c); p.bytesSent() != want {
		t.Errorf("%d bytes of blobs were sent, want %d", p.bytesSent(), want)
	}
	if got := len(p.asked(`^GET .*/blobs/`)); got != 6 || result.BlobsFetched != 6 {
		t.Errorf("%d requests for %d blobs, want 6", got, result.BlobsFetched)
	}
	if result.BlobsLinked < 3 { // more when two images link the same blob at the same moment
		t.Errorf("%d blobs linked", result.BlobsLinked)
	}
	if result.TagsUpdated != 4 {
		t.Errorf("%d tags updated", result.TagsUpdated)
	}
	for where, img := range map[[2]string]interface{ RawManifest() ([]byte, error) }{
		{"team/app", "1.0"}: a, {"team/app", "latest"}: a, {"team/app", "2.0"}: b, {"team/web", "1.0"}: c,
	} {
		raw, err := img.RawManifest()
		if err != nil {
			t.Fatal(err)
		}
		stored := f.verifyHere(t, where[0], f.tagDigest(t, where[0], where[1]), nil)
		if diff := cmp.Diff(raw, stored.manifests[0].body); diff != "" {
			t.Errorf("%s: %s", where, diff)
		}
	}
	if left := f.partialsLeft(t); len(left) > 0 {
		t.Errorf("uploads left: %s", left)
	}
}

// The second time, a tag costs one request, and nothing else is asked for each.
func TestSyncAgainAsksOncePerTag(t *testing.T) {
	p := newTestParent(t)
	for i, tag := range []string{"1", "2", "3"} {
		p.pushImage(t, "team/app:"+tag, testImage(t, tag, testLayer(uint64(i), 1000)))
	}
	f := newFixture(t, p, exactly("team/app")...)
	f.mustSync(t)
	p.reset()
	result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule)
	if err != nil {
		t.Fatal(err)
	}
	got := p.asked("")
	slices.Sort(got)
	want := []string{
		"GET /v2/",
		"GET /v2/team/app/tags/list?n=1000",
		"HEAD /v2/team/app/manifests/1",
		"HEAD /v2/team/app/manifests/2",
		"HEAD /v2/team/app/manifests/3",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if result.TagsUpdated != 0 || result.Repositories[0].TagsPresent != 3 {
		t.Errorf("%+v", result)
	}
}

func TestSyncMovesTags(t *testing.T) {
	p := newTestParent(t)
	one, two := testImage(t, "one", testLayer(1, 1000)), testImage(t, "two", testLayer(2, 1000))
	p.pushImage(t, "app:1", one)
	p.pushImage(t, "app:latest", one)
	f := newFixture(t, p, exactly("app")...)
	f.mustSync(t)

	p.pushImage(t, "app:2", two)
	p.pushImage(t, "app:latest", two)
	p.reset()
	if result := f.mustSync(t); result.TagsUpdated != 2 || result.BlobsFetched != 2 {
		t.Errorf("%+v", result)
	}
	if got := f.tagDigest(t, "app", "latest"); got != digestOf(t, two) {
		t.Errorf("latest is %s", got)
	}

	// Back to what is here: the tag alone is written.
	p.pushImage(t, "app:latest", one)
	p.reset()
	if result := f.mustSync(t); result.TagsUpdated != 1 || p.bytesSent() != 0 || len(p.asked("^GET .*/manifests/")) != 0 {
		t.Errorf("%+v %s", result, p.asked(""))
	}
	if got := f.tagDigest(t, "app", "latest"); got != digestOf(t, one) {
		t.Errorf("latest is %s", got)
	}
}

func TestSyncSelects(t *testing.T) {
	p := newTestParent(t)
	img := testImage(t, "x", testLayer(1, 1000))
	for _, where := range []string{"team/app:1.0", "team/app:1.1-rc1", "team/app:2.0", "team/deep/web:1.0", "other:1.0", "base:1.0", "base:2.0"} {
		p.pushImage(t, where, img)
	}
	f := newFixture(t, p,
		v1alpha1.Repository{Name: "team/*", Tags: v1alpha1.Tags{Include: []string{"semver:>=1.0.0-0 <2"}, Exclude: []string{"regex:.*-rc."}}},
		v1alpha1.Repository{Name: "**/web"},
		v1alpha1.Repository{Name: "base", Tags: v1alpha1.Tags{Include: []string{"2.0"}}},
	)
	result := f.mustSync(t)
	var got []string
	for _, e := range f.events {
		if e.Kind == EventTagged {
			got = append(got, e.Repository+":"+e.Tag)
		}
	}
	slices.Sort(got)
	if diff := cmp.Diff([]string{"base:2.0", "team/app:1.0", "team/deep/web:1.0"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if len(result.Repositories) != 3 {
		t.Errorf("%+v", result.Repositories)
	}
	// Tags that are selected by name need no list, unless for referrers.
	if got := p.asked(`/v2/base/tags/list`); len(got) > 1 {
		t.Errorf("asked %s", got)
	}
}

func TestSyncRepairs(t *testing.T) {
	p := newTestParent(t)
	img := testImage(t, "x", testLayer(1, 50_000), testLayer(2, 60_000))
	d := p.pushImage(t, "app:1", img)
	f := newFixture(t, p, exactly("app")...)
	f.mustSync(t)
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	broken := digestOf(t, layers[0])
	path := filepath.Join(f.root, "docker/registry/v2/blobs/sha256", broken.Encoded()[:2], broken.Encoded(), "data")

	for name, damage := range map[string]func() error{
		"a flipped byte": func() error {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			b[100] ^= 1
			return os.WriteFile(path, b, 0o644)
		},
		"decay that scrubbing finds": func() error {
			fi, err := os.Stat(path)
			if err != nil {
				return err
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			b[100] ^= 1
			// As the medium does it: the file's times say nothing.
			if err := errors.Join(os.WriteFile(path, b, 0o644), os.Chtimes(path, time.Time{}, fi.ModTime())); err != nil {
				return err
			}
			did, err := f.store.Maintain(t.Context(), storage.Maintenance{ScrubRate: 1 << 30})
			if err == nil && (len(did.Damaged) != 1 || did.Damaged[0].Digest != broken) {
				err = fmt.Errorf("scrubbing found %+v", did.Damaged)
			}
			return err
		},
		"a blob removed": func() error { return os.Remove(path) },
		"the manifest removed": func() error {
			return os.RemoveAll(filepath.Join(f.root, "docker/registry/v2/blobs/sha256", d.Encoded()[:2], d.Encoded()))
		},
		"a link removed": func() error {
			return os.RemoveAll(filepath.Join(f.root, "docker/registry/v2/repositories/app/_layers/sha256", broken.Encoded()))
		},
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		p.reset()
		result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		f.verifyHere(t, "app", d, nil)
		want := int64(50_000)
		if strings.Contains(name, "manifest") || strings.Contains(name, "link") {
			want = 0
		}
		if p.bytesSent() != want || result.Repositories[0].TagsPresent != 1 {
			t.Errorf("%s: %d bytes sent, want %d", name, p.bytesSent(), want)
		}
	}
}

func TestSyncFailsPerRepository(t *testing.T) {
	p := newTestParent(t)
	img := testImage(t, "x", testLayer(1, 1000))
	p.pushImage(t, "good:1", img)
	p.pushImage(t, "bad:1", testImage(t, "y", testLayer(2, 1000)))
	p.pushImage(t, "bad:2", testImage(t, "z", testLayer(3, 1000)))
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/v2/bad/blobs/") {
			http.Error(w, "no", http.StatusForbidden)
			return true
		}
		return false
	})
	f := newFixture(t, p,
		v1alpha1.Repository{Name: "absent"},
		v1alpha1.Repository{Name: "bad"},
		v1alpha1.Repository{Name: "good", Tags: v1alpha1.Tags{Include: []string{"1", "9"}}},
	)
	result, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual)
	if err == nil || result.State != v1alpha1.SyncStateFailed {
		t.Fatalf("%+v %v", result, err)
	}
	got := result.Repositories
	if got[0].Err == nil || got[0].Err.Error() != "parent "+p.host+" has no repository absent (404): push it there, or correct the name in the repositories of the configuration" {
		t.Errorf("absent: %v", got[0].Err)
	}
	if got[1].TagsWanted != 2 || got[1].TagsPresent != 0 || got[1].BytesLeft < 2000 {
		t.Errorf("bad: %+v", got[1])
	}
	if !strings.HasSuffix(got[1].Err.Error(), "(and 1 more)") || !strings.Contains(got[1].Err.Error(), "does not let anonymous clients read bad@sha256:") {
		t.Errorf("bad: %v", got[1].Err)
	}
	if got[2].TagsWanted != 2 || got[2].TagsPresent != 1 || got[2].Err.Error() != "parent "+p.host+" has no good:9 (404)" {
		t.Errorf("good: %+v", got[2])
	}
	if f.tagDigest(t, "good", "1") != digestOf(t, img) || f.tagDigest(t, "bad", "1") != "" {
		t.Error("wrong tags here")
	}
	status := f.Status()
	if status.ConnectionState != v1alpha1.ConnectionStateUnhealthy || status.LastSyncTime != nil || status.RegistrySyncResult.SyncState != v1alpha1.SyncStateFailed || len(status.Repositories) != 3 {
		t.Errorf("%+v", status)
	}
	p.setFault(nil)
	p.pushImage(t, "absent:1", img)
	p.pushImage(t, "good:9", img)
	f.mustSync(t)
	status = f.Status()
	if status.ConnectionState != v1alpha1.ConnectionStateOnline || status.LastSyncTime == nil || status.RegistrySyncResult.Error != "" {
		t.Errorf("%+v", status)
	}
}

func TestPlanWritesNothing(t *testing.T) {
	p := newTestParent(t)
	shared := testLayer(1, 10_000)
	a, b := testImage(t, "a", shared), testImage(t, "b", shared, testLayer(2, 20_000))
	p.pushImage(t, "app:1", a)
	f := newFixture(t, p, exactly("app", "web")...)
	if _, err := f.Sync(t.Context(), v1alpha1.SyncTriggerManual); err == nil {
		t.Fatal("web is not there")
	}
	p.pushImage(t, "app:2", b)
	p.pushImage(t, "app:latest", a)
	p.pushImage(t, "web:1", b)
	before := tree(t, f.root)
	p.reset()
	plan, err := f.Plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	da, db := digestOf(t, a), digestOf(t, b)
	want := &Plan{Repositories: []RepositoryPlan{
		{Name: "app", Blobs: 2, Bytes: uniqueBytes(t, b) - 10_000, Tags: []TagPlan{
			{Name: "1", Action: ActionKeep, Digest: da, Present: da},
			{Name: "2", Action: ActionCopy, Digest: db},
			{Name: "latest", Action: ActionTag, Digest: da},
		}},
		{Name: "web", Tags: []TagPlan{{Name: "1", Action: ActionCopy, Digest: db}}},
	}}
	if diff := cmp.Diff(want, plan, cmp.AllowUnexported(TagPlan{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if diff := cmp.Diff(before, tree(t, f.root)); diff != "" {
		t.Errorf("files changed:\n%s", diff)
	}
	if p.bytesSent() != 0 {
		t.Error("blobs were fetched")
	}
}

// tree lists the files under a directory.
func tree(t *testing.T, root string) (files []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		files = append(files, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// What a tag stood for is deleted between being asked for and being fetched, as
// registries do with what has no tag any more.
func TestSyncFollowsMovedTag(t *testing.T) {
	p := newTestParent(t)
	first := p.pushImage(t, "app:1", testImage(t, "first", testLayer(1, 1000)))
	second := testImage(t, "second", testLayer(2, 1000))
	var once sync.Once
	p.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, first.String()) {
			once.Do(func() {
				p.pushImage(t, "app:1", second)
				p.delete(t, "app/manifests/"+first.String())
			})
		}
		return false
	})
	f := newFixture(t, p, exactly("app")...)
	f.mustSync(t)
	if got := f.tagDigest(t, "app", "1"); got != digestOf(t, second) {
		t.Errorf("the tag stands for %s", got)
	}
}

// While the parent is away, the status says how complete things were.
func TestStatusWhileParentIsAway(t *testing.T) {
	p := newTestParent(t)
	p.pushImage(t, "app:1", testImage(t, "x", testLayer(1, 1000)))
	f := newFixture(t, p, exactly("app")...)
	f.limits.attempts = 1
	f.mustSync(t)
	p.setFault(func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) })
	if _, err := f.Sync(t.Context(), v1alpha1.SyncTriggerSchedule); err == nil {
		t.Fatal("no error")
	}
	status := f.Status()
	if status.ConnectionState != v1alpha1.ConnectionStateOffline || status.LastSyncTime == nil || status.RegistrySyncResult.LastSuccessfulSyncEndTime == nil {
		t.Errorf("%+v", status)
	}
	got := status.Repositories
	if len(got) != 1 || got[0].TagsWanted != 1 || got[0].TagsPresent != 1 || got[0].LastError == "" {
		t.Errorf("%+v", got)
	}
}
