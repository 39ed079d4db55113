package storage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

// collector opens a store in which a link is old as soon as it was not used for
// the minimum age.
func collector(t *testing.T, root string) *Store {
	t.Helper()
	return asCollector(open(t, root))
}

// collectAll collects what has not been used for an hour, without any grace.
func collectAll(t *testing.T, s *Store) Collected {
	t.Helper()
	c, err := s.collect(t.Context(), time.Hour, graceOf(s))
	if err != nil {
		t.Fatal(err)
	}
	if c.Waiting != 0 {
		t.Errorf("%d still wait", c.Waiting)
	}
	return c
}

// manifestOf is a manifest that refers to things.
func manifestOf(subject digest.Digest, layers, children []digest.Digest, note string) []byte {
	type descriptor struct {
		Digest digest.Digest `json:"digest"`
	}
	list := func(ds []digest.Digest) (l []descriptor) {
		for _, d := range ds {
			l = append(l, descriptor{d})
		}
		return l
	}
	m := map[string]any{"schemaVersion": 2, "annotations": map[string]string{"note": note}}
	if len(layers) > 0 {
		m["config"], m["layers"] = descriptor{layers[0]}, list(layers[1:])
	}
	if len(children) > 0 {
		m["manifests"] = list(children)
	}
	if subject != "" {
		m["subject"] = descriptor{subject}
	}
	content, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	return content
}

func put(t *testing.T, r Repository, content []byte, tags ...string) digest.Digest {
	t.Helper()
	d := digest.FromBytes(content)
	if err := r.PutManifest(t.Context(), d, content, tags...); err != nil {
		t.Fatal(err)
	}
	return d
}

func set(ds ...digest.Digest) map[digest.Digest]bool {
	m := make(map[digest.Digest]bool)
	for _, d := range ds {
		m[d] = true
	}
	return m
}

func TestCollectKeepsWhatIsReachable(t *testing.T) {
	eachMediumInTime(t, func(t *testing.T, open func() *Store) {
		s := asCollector(open())
		a, b := repository(t, s, "team/a"), repository(t, s, "team/a/b")
		layer := func(name string) digest.Digest { return mustUpload(t, s, a.Name(), []byte(name)) }
		config, one, two, shared := layer("config"), layer("one"), layer("two"), layer("shared")
		goneLayer, mounted, alone := layer("gone"), layer("mounted"), layer("alone")
		if err := b.MountLayer(t.Context(), a, mounted); err != nil {
			t.Fatal(err)
		}
		inB := put(t, b, manifestOf("", []digest.Digest{mounted}, nil, "b"), "t")

		image := put(t, a, manifestOf("", []digest.Digest{config, one, shared}, nil, "image"), "image")
		child := put(t, a, manifestOf("", []digest.Digest{config, two}, nil, "child"))
		absent := digest.FromString("not here")
		index := put(t, a, manifestOf("", nil, []digest.Digest{child, absent}, "index"), "index")
		signature := put(t, a, manifestOf(image, nil, nil, "signature"))
		counter := put(t, a, manifestOf(signature, nil, nil, "signature of the signature"))
		ofChild := put(t, a, manifestOf(child, nil, nil, "of a child"))
		// A referrer that is tagged keeps what it refers to.
		subject := put(t, a, manifestOf("", []digest.Digest{config}, nil, "subject"))
		tagged := put(t, a, manifestOf(subject, nil, nil, "tagged"), "sig")

		gone := put(t, a, manifestOf("", []digest.Digest{goneLayer, shared}, nil, "gone"))
		ofGone := put(t, a, manifestOf(gone, nil, nil, "of what is gone"))
		before := put(t, a, manifestOf(digest.FromString("nor this"), nil, nil, "of what is not here"))
		age(t, s)
		youngLayer := layer("young layer")
		young := put(t, a, manifestOf("", []digest.Digest{config}, nil, "young"))

		got := collectAll(t, s)
		want := Collected{Manifests: 3, Layers: 3, Blobs: 5, Bytes: got.Bytes, Kept: 16, Skipped: map[string]string{}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		blobs, litter := stored(t, s)
		kept := set(config, one, two, shared, mounted, inB, image, child, index, signature, counter, ofChild, subject, tagged, youngLayer, young)
		if diff := cmp.Diff(kept, blobs); diff != "" || litter != nil {
			t.Errorf("stored (-want +got):\n%s\nlitter %q", diff, litter)
		}
		for _, d := range []digest.Digest{gone, ofGone, before} {
			if _, err := a.OpenManifest(t.Context(), d); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("manifest %s: %v", d, err)
			}
		}
		for _, d := range []digest.Digest{goneLayer, alone, mounted} {
			if a.HasLayer(t.Context(), d) {
				t.Errorf("layer %s is still there", d)
			}
		}
		// What is gone can be pushed again.
		if mustUpload(t, s, a.Name(), []byte("gone")) != goneLayer || !a.HasLayer(t.Context(), goneLayer) {
			t.Error("pushed again and not there")
		}
		put(t, a, manifestOf("", []digest.Digest{goneLayer, shared}, nil, "gone"), "back")
		age(t, s)
		collectAll(t, s)
		for _, d := range []digest.Digest{goneLayer, shared} {
			if f, err := a.OpenLayer(t.Context(), d); err != nil {
				t.Errorf("layer %s: %v", d, err)
			} else {
				f.Close()
			}
		}
	})
}

func TestCollectLeavesNothingOfWhatWasDeleted(t *testing.T) {
	eachMediumInTime(t, func(t *testing.T, open func() *Store) {
		s := asCollector(open())
		a, below := repository(t, s, "a"), repository(t, s, "a/below")
		d := put(t, a, manifestOf("", []digest.Digest{mustUpload(t, s, "a", []byte("x"))}, nil, ""), "t")
		put(t, a, manifestOf(d, nil, nil, "signature"))
		keep := put(t, below, manifestOf("", []digest.Digest{mustUpload(t, s, "a/below", []byte("y"))}, nil, ""), "t")
		if err := a.DeleteManifest(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		age(t, s)
		collectAll(t, s)
		collectAll(t, s)
		if blobs, litter := stored(t, s); len(blobs) != 2 || !blobs[keep] || litter != nil {
			t.Errorf("stored: %v, %q", blobs, litter)
		}
		if _, _, err := a.Tags(t.Context(), "", -1); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("tags of what is gone: %v", err)
		}
		var names []string
		for name, err := range s.Repositories(t.Context(), "") {
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, name)
		}
		if diff := cmp.Diff([]string{"a/below"}, names); diff != "" {
			t.Error(diff)
		}
		put(t, a, manifestOf("", nil, nil, "again"), "t")
	})
}

// A manifest is not older than the moment its tag moved on: what runs by digest
// can be rolled back to for a while.
func TestReserveBeginsWhenTheTagMoves(t *testing.T) {
	eachMediumInTime(t, func(t *testing.T, open func() *Store) {
		s := asCollector(open())
		a := repository(t, s, "a")
		moved := put(t, a, manifestOf("", nil, nil, "1"), "moved")
		deleted := put(t, a, manifestOf("", nil, nil, "2"), "deleted")
		age(t, s)
		put(t, a, manifestOf("", nil, nil, "3"), "moved")
		if err := a.DeleteTag(t.Context(), "deleted"); err != nil {
			t.Fatal(err)
		}
		collectAll(t, s)
		if blobs, _ := stored(t, s); !blobs[moved] || !blobs[deleted] {
			t.Errorf("stored: %v", blobs)
		}
		age(t, s)
		collectAll(t, s)
		if blobs, _ := stored(t, s); blobs[moved] || blobs[deleted] || len(blobs) != 1 {
			t.Errorf("stored: %v", blobs)
		}
	})
}

// condemnAll makes one pass, after which everything that is garbage is in limbo.
func condemnAll(t *testing.T, s *Store) {
	t.Helper()
	for range 2 {
		if _, err := s.pass(t.Context(), time.Hour, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
}

func TestUseBringsBackFromLimbo(t *testing.T) {
	eachMediumInTime(t, func(t *testing.T, open func() *Store) {
		s := asCollector(open())
		ctx := t.Context()
		a, b := repository(t, s, "a"), repository(t, s, "b")
		layer := mustUpload(t, s, "a", []byte("layer"))
		content := manifestOf("", []digest.Digest{layer}, nil, "")
		manifest := put(t, a, content)
		for name, use := range map[string]func() error{
			"a layer is read": func() error {
				f, err := a.OpenLayer(ctx, layer)
				return errors.Join(err, f.Close())
			},
			"a layer is mounted": func() error { return b.MountLayer(ctx, a, layer) },
			"distribution looks": func() error {
				_, err := s.Driver().GetContent(ctx, linkPath(a.path+"/_layers/", layer))
				return err
			},
		} {
			age(t, s)
			condemnAll(t, s)
			if !condemnedLayer(t, a, layer) {
				t.Fatalf("%s: not condemned", name)
			}
			if err := use(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if condemnedLayer(t, a, layer) {
				t.Errorf("%s: not brought back", name)
			}
			if _, err := s.pass(ctx, time.Hour, graceOf(s)); err != nil {
				t.Fatal(err)
			}
			if !a.HasLayer(t.Context(), layer) {
				t.Errorf("%s: deleted after all", name)
			}
			put(t, a, content)
		}
		// A manifest that is pushed again under a tag brings all of it back.
		age(t, s)
		condemnAll(t, s)
		put(t, a, content, "t")
		collectAll(t, s)
		if blobs, litter := stored(t, s); !blobs[layer] || !blobs[manifest] || litter != nil {
			t.Errorf("stored %v, %q", blobs, litter)
		}
		if !a.HasLayer(t.Context(), layer) {
			t.Error("the layer of what is tagged is gone")
		}
	})
}

func TestBlobComesBackFromLimbo(t *testing.T) {
	s := collector(t, t.TempDir())
	a := repository(t, s, "a")
	d := mustUpload(t, s, "a", []byte("blob"))
	if err := a.DeleteLayer(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	age(t, s)
	condemnAll(t, s)
	if _, err := os.Lstat(s.path(blobPath(d))); err == nil {
		t.Fatal("not condemned")
	}
	if err := a.LinkLayer(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	// And so does one that nobody looked for before linking to it.
	if err := s.onDisk().limbo(filepath.Dir(blobPath(d))); err != nil {
		t.Fatal(err)
	}
	if err := s.Driver().PutContent(t.Context(), linkPath(repositoriesRoot+"b/_layers/", d), []byte(d)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(s.path(blobPath(d))); err != nil {
		t.Error(err)
	}
	// And so does one whose link nobody but the collector has looked at.
	if err := s.onDisk().limbo(filepath.Dir(blobPath(d))); err != nil {
		t.Fatal(err)
	}
	collectAll(t, s)
	if _, err := os.Lstat(s.path(blobPath(d))); err != nil {
		t.Error(err)
	}
	gone := digest.FromString("gone")
	if err := s.Driver().PutContent(t.Context(), linkPath(repositoriesRoot+"b/_layers/", gone), []byte(gone)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("linked to what is not there: %v", err)
	}
}

// What was pushed stays until the parent has it, however long that takes.
func TestCollectKeepsWhatTheParentLacks(t *testing.T) {
	eachMediumInTime(t, func(t *testing.T, open func() *Store) {
		s := asCollector(open())
		a := repository(t, s, "a")
		layer := mustUpload(t, s, "a", []byte("layer"))
		content := manifestOf("", []digest.Digest{layer}, nil, "")
		d := digest.FromBytes(content)
		err := s.Journal().Record(t.Context(), Change{Action: ActionPush, Repository: "a", Digest: d}, func() error {
			return a.PutManifest(t.Context(), d, content)
		})
		if err != nil {
			t.Fatal(err)
		}
		age(t, s)
		collectAll(t, s)
		if blobs, _ := stored(t, s); !blobs[d] || !blobs[layer] {
			t.Fatalf("stored: %v", blobs)
		}
		if err := s.Journal().Done(t.Context(), entries(t, s, 0)[0].ID); err != nil {
			t.Fatal(err)
		}
		collectAll(t, s)
		if blobs, _ := stored(t, s); len(blobs) != 0 {
			t.Errorf("stored: %v", blobs)
		}
	})
}

// What cannot be read may refer to anything.
func TestDamageStopsCollection(t *testing.T) {
	eachMediumInTime(t, func(t *testing.T, open func() *Store) {
		s := asCollector(open())
		a := repository(t, s, "a")
		layer := mustUpload(t, s, "a", []byte("layer"))
		content := manifestOf("", []digest.Digest{layer}, nil, "")
		d := put(t, a, content, "t")
		flip(t, s, d)
		age(t, s)
		if got := collectAll(t, s); got.Skipped["a"] == "" {
			t.Errorf("not skipped: %+v", got)
		}
		if _, err := s.scrub(t.Context(), 1<<30); err != nil {
			t.Fatal(err)
		}
		if got := collectAll(t, s); got.Skipped["a"] == "" {
			t.Errorf("not skipped when it is in quarantine: %+v", got)
		}
		if !a.HasLayer(t.Context(), layer) {
			t.Error("layer of a damaged manifest collected")
		}
		put(t, a, content, "t")
		if got := collectAll(t, s); len(got.Skipped) != 0 {
			t.Errorf("skipped: %+v", got.Skipped)
		}
		if f, err := a.OpenLayer(t.Context(), layer); err != nil {
			t.Error(err)
		} else {
			f.Close()
		}
	})
}

// A manifest that is used in the very moment in which it is condemned stays, and
// what hangs on it, too.
func TestUseWhileBeingCondemned(t *testing.T) {
	eachMediumInTime(t, func(t *testing.T, open func() *Store) {
		s := asCollector(open())
		a := repository(t, s, "a")
		layer := mustUpload(t, s, "a", []byte("layer"))
		d := put(t, a, manifestOf("", []digest.Digest{layer}, nil, ""))
		age(t, s)
		have, err := s.contents(t.Context(), a)
		if err != nil {
			t.Fatal(err)
		}
		now := time.Now()
		c := &collection{store: s, cutoff: now.Add(-time.Hour), settled: now, linked: make(map[digest.Digest]bool)}
		keep, err := s.mark(t.Context(), have, c.cutoff)
		if err != nil || len(keep) != 0 {
			t.Fatal(keep, err)
		}
		if err := a.UseManifest(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		if err := c.condemn(t.Context(), append(have.revisions, have.layers...), keep); err != nil {
			t.Fatal(err)
		}
		if _, err := a.store.medium.readLink(t.Context(), linkPath(a.path+"/_manifests/revisions/", d)); err != nil || !a.HasLayer(t.Context(), layer) {
			t.Errorf("taken away while it was used: %v", err)
		}
		// The same between the marking and the deletion from limbo.
		age(t, s)
		condemnAll(t, s)
		if have, err = s.contents(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		if err := a.UseManifest(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		c.settled = time.Now().Add(time.Hour)
		if err := c.delete(t.Context(), have, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := s.pass(t.Context(), time.Hour, graceOf(s)); err != nil {
			t.Fatal(err)
		}
		if f, err := a.OpenLayer(t.Context(), layer); err != nil {
			t.Error(err)
		} else {
			f.Close()
		}
	})
}

func TestSweep(t *testing.T) {
	s := collector(t, t.TempDir())
	old, young := "_uploads/0a/data", "_uploads/0b/data"
	for _, name := range []string{
		"docker/registry/v2/repositories/a/" + old, "docker/registry/v2/repositories/a/_uploads/0a/startedat",
		"docker/registry/v2/repositories/a/_uploads/0b/startedat",
		".write-test-1", journalDir + "/.new-1", usageDir + "/.new-1", quarantineDir + "/x", partialDir + "/y", trashDir + "/t/deleted/z",
		"docker/registry/v2/blobs/sha256/ab/ab" + strings.Repeat("0", 62) + "/data.1.tmp",
		"docker/registry/v2/repositories/a/_layers/sha256/ab" + strings.Repeat("0", 62) + "/link.1.tmp",
	} {
		file := filepath.Join(s.root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	age(t, s)
	upload := filepath.Join(s.root, "docker/registry/v2/repositories/a", young)
	then := time.Now().Add(-48 * time.Hour)
	if err := os.Chtimes(filepath.Join(s.root, "docker/registry/v2/repositories/a", old), then, then); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(upload, []byte("going on"), 0o644); err != nil {
		t.Fatal(err)
	}
	// The age of what is set aside is that of its being set aside.
	got, err := s.sweep(t.Context(), 24*time.Hour, graceOf(s))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Swept{Uploads: 1, Temporary: 1}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	collectAll(t, s)
	var left []string
	filepath.WalkDir(s.root, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			left = append(left, strings.TrimPrefix(path, s.root+"/"))
		}
		return err
	})
	slices.Sort(left)
	want := []string{
		".write-test-1", // these are too young by their inode, which nobody can set back
		"docker/registry/v2/repositories/a/" + young, "docker/registry/v2/repositories/a/_uploads/0b/startedat",
		"journal/.new-1", "partial/y", "usage/.new-1",
	}
	if diff := cmp.Diff(want, left); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
}

func TestScrub(t *testing.T) {
	s := collector(t, t.TempDir())
	a := repository(t, s, "a")
	good, bad := mustUpload(t, s, "a", random(100_000)), mustUpload(t, s, "a", random(100_000))
	unheld := mustUpload(t, s, "b", random(1000))
	if err := repository(t, s, "b").DeleteLayer(t.Context(), unheld); err != nil {
		t.Fatal(err)
	}
	for _, d := range []digest.Digest{bad, unheld} {
		flip(t, s, d)
		seal := SealTime(d)
		if err := os.Chtimes(s.path(blobPath(d)), seal, seal); err != nil { // as decay of the medium leaves it
			t.Fatal(err)
		}
	}
	got, err := s.scrub(t.Context(), 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Scrubbed{Blobs: 3, Bytes: 201_000, Corrupt: 2, Finished: true}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if _, err := a.OpenLayer(t.Context(), bad); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("corrupt blob: %v", err)
	}
	if f, err := a.OpenLayer(t.Context(), good); err != nil {
		t.Error(err)
	} else {
		f.Close()
	}
	damaged, err := open(t, s.root).Damaged(t.Context())
	if err != nil || len(damaged) != 1 || damaged[0].Digest != bad || damaged[0].Since.IsZero() {
		t.Fatalf("damaged: %+v, %v", damaged, err)
	}
	if diff := cmp.Diff([]string{"a"}, damaged[0].Repositories); diff != "" {
		t.Error(diff)
	}
}

func TestRepairedLeavesTheList(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		content := random(1000)
		d := mustUpload(t, s, "a", content)
		flip(t, s, d)
		if _, err := s.scrub(t.Context(), 1<<30); err != nil {
			t.Fatal(err)
		}
		if list, err := s.Damaged(t.Context()); len(list) != 1 || err != nil {
			t.Fatal(list, err)
		}
		mustUpload(t, s, "a", content)
		for range 2 {
			if list, err := s.Damaged(t.Context()); len(list) != 0 || err != nil {
				t.Fatal(list, err)
			}
		}
		if _, err := s.medium.readNote(t.Context(), damagedDir+"/"+entryName(d)); err == nil {
			t.Error("the mark is still there")
		}
	})
}

func TestScrubGoesOnWhereItStopped(t *testing.T) {
	s := open(t, t.TempDir())
	for range 8 {
		mustUpload(t, s, "a", random(1000))
	}
	seen := 0
	for round := 0; ; round++ {
		ctx, cancel := context.WithCancel(t.Context())
		stop := hookContext{ctx, nil}
		n := 0
		stop.hook = func() {
			if n++; n > 12 {
				cancel()
			}
		}
		got, err := s.scrub(stop, 1<<30)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		seen += got.Blobs
		if got.Finished {
			if round == 0 {
				t.Error("was never stopped")
			}
			break
		}
	}
	if seen != 8 {
		t.Errorf("read %d blobs, want each once", seen)
	}
	if got, err := s.scrub(t.Context(), 1<<30); err != nil || got.Blobs != 8 {
		t.Errorf("the next time: %+v, %v", got, err)
	}
}

func TestScrubKeepsItsRate(t *testing.T) {
	s := open(t, t.TempDir())
	mustUpload(t, s, "a", random(300_000))
	began := time.Now()
	if _, err := s.scrub(t.Context(), 1_000_000); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < 200*time.Millisecond {
		t.Errorf("300 kB at 1 MB/s took %v", took)
	}
}

func TestUsage(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s, other := open(), open()
		want := func(s *Store, repository string, of, total int64) {
			t.Helper()
			s.usage.reread()
			gotOf, gotTotal, err := s.Used(t.Context(), repository)
			if err != nil || gotOf != of || gotTotal != total {
				t.Errorf("%s has %d, total %d, %v; want %d and %d", repository, gotOf, gotTotal, err, of, total)
			}
		}
		mustUpload(t, s, "a", random(1000))
		want(s, "a", 1000, 1000) // counted
		d := mustUpload(t, s, "a", random(500))
		want(s, "a", 1500, 1500) // kept
		if err := repository(t, other, "b").MountLayer(t.Context(), repository(t, other, "a"), d); err != nil {
			t.Fatal(err)
		}
		other.usage.close()
		s.usage.close()
		want(s, "b", 500, 1500)
		want(other, "a", 1500, 1500)
		content := manifestOf("", []digest.Digest{d}, nil, "")
		put(t, repository(t, other, "b"), content, "t")
		size := int64(len(content))
		want(other, "b", 500+size, 1500+size)
		put(t, repository(t, other, "b"), content, "again")
		want(other, "b", 500+size, 1500+size)
		if err := repository(t, s, "a").DeleteLayer(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		other.Close()
		u, err := s.recount(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(map[string]int64{"a": 1000, "b": 500 + size}, u.Repositories); diff != "" || u.Total != 1500+size {
			t.Errorf("total %d, (-want +got):\n%s", u.Total, diff)
		}
	})
}

func TestMaintain(t *testing.T) {
	eachMediumInTime(t, func(t *testing.T, open func() *Store) {
		s := asCollector(open())
		a := repository(t, s, "a")
		kept := put(t, a, manifestOf("", nil, nil, "kept"), "t")
		put(t, a, manifestOf("", nil, nil, "gone"))
		age(t, s)
		did, err := s.Maintain(t.Context(), Maintenance{MinAge: time.Hour, Grace: graceOf(s)})
		if err != nil {
			t.Fatal(err)
		}
		if did.Collected.Manifests != 1 || did.Collected.Blobs != 1 || !did.Scrubbed.Finished || did.Scrubbed.Blobs != 1 || did.Usage.Total == 0 {
			t.Errorf("did %+v", did)
		}
		if blobs, _ := stored(t, s); !blobs[kept] || len(blobs) != 1 {
			t.Errorf("stored %v", blobs)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		stop := fmt.Errorf("no leader any more")
		cancel(stop)
		if _, err := s.Maintain(ctx, Maintenance{}); !errors.Is(err, stop) {
			t.Errorf("ended with %v", err)
		}
	})
}
