package storage

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/distribution/distribution/v3"
	"github.com/distribution/reference"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

func repository(t *testing.T, s *Store, name string) Repository {
	t.Helper()
	r, err := s.Repository(name)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestPutManifest(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		r := repository(t, s, "a/b")
		content := []byte(`{"schemaVersion":2}`)
		for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
			d := alg.FromBytes(content)
			tags := []string{"one-" + alg.String(), "two-" + alg.String()}
			for range 2 { // again is the same
				if err := r.PutManifest(t.Context(), d, content, tags...); err != nil {
					t.Fatal(err)
				}
			}
			for _, tag := range tags {
				if got, err := r.Tag(t.Context(), tag); err != nil || got != d {
					t.Errorf("tag %s: %s, %v", tag, got, err)
				}
			}
			f, err := r.OpenManifest(t.Context(), d)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(f)
			f.Close()
			if err != nil || string(got) != string(content) || !f.sealed {
				t.Errorf("%s: %q, sealed %v, %v", d, got, f.sealed, err)
			}
		}
	})
}

func TestPutManifestRefuses(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		r := repository(t, s, "a")
		content := []byte("{}")
		d := digest.FromBytes(content)
		if err := r.PutManifest(t.Context(), digest.FromString("other"), content, "t"); !errors.Is(err, ErrCorrupt) {
			t.Errorf("other content: %v", err)
		}
		if err := r.PutManifest(t.Context(), d, content, "../t"); !errors.Is(err, ErrName) {
			t.Errorf("impossible tag: %v", err)
		}
		if err := r.PutManifest(t.Context(), "nonsense", content); err == nil {
			t.Error("invalid digest")
		}
		if _, err := s.medium.list(t.Context(), r.path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("something was stored: %v", err)
		}
		// Content that is stored already does not excuse other content.
		if err := r.PutManifest(t.Context(), d, content); err != nil {
			t.Fatal(err)
		}
		if err := r.PutManifest(t.Context(), d, []byte("[]")); !errors.Is(err, ErrCorrupt) {
			t.Errorf("other content under a stored digest: %v", err)
		}
	})
}

func TestLinkLayer(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		d := mustUpload(t, s, "from", []byte("blob"))
		to := repository(t, s, "to")
		if _, err := to.OpenLayer(t.Context(), d); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("before: %v", err)
		}
		if err := to.LinkLayer(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		f, err := to.OpenLayer(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		if err := to.LinkLayer(t.Context(), digest.FromString("absent")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("absent: %v", err)
		}
		if err := to.DeleteLayer(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		if _, err := to.OpenLayer(t.Context(), d); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("deleted: %v", err)
		}
		if _, err := repository(t, s, "from").OpenLayer(t.Context(), d); err != nil {
			t.Errorf("in the other repository: %v", err)
		}
	})
}

// What a power failure leaves of a link on a file system that does not order
// writes.
func TestDamagedLinkIsAbsent(t *testing.T) {
	s := open(t, t.TempDir())
	r := repository(t, s, "a")
	content := []byte("{}")
	d := digest.FromBytes(content)
	for _, damage := range []string{"", strings.Repeat("\x00", 71), "sha256:", d.String() + "\n", strings.Repeat("x", 1000)} {
		if err := r.PutManifest(t.Context(), d, content, "t"); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(s.path(r.tagLink("t")), []byte(damage), 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := r.Tag(t.Context(), "t"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %s, %v; want ErrNotExist", damage, got, err)
		}
	}
}

func TestTags(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		r := repository(t, s, "a")
		if _, _, err := r.Tags(t.Context(), "", -1); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("none yet: %v", err)
		}
		all := []string{"V1", "_", "v1", "v1.0", "v10", "v2"}
		for _, tag := range all {
			if err := r.PutManifest(t.Context(), digest.FromString("{}"), []byte("{}"), tag); err != nil {
				t.Fatal(err)
			}
		}
		// Foreign things in the directory are no tags.
		if err := s.medium.putFile(t.Context(), r.path+"/_manifests/tags/.snapshot/x", nil); err != nil {
			t.Fatal(err)
		}
		for _, test := range []struct {
			last string
			n    int
			want []string
			more bool
		}{
			{"", -1, all, false},
			{"", 6, all, false},
			{"", 5, all[:5], true},
			{"v1", 2, all[3:5], true},
			{"v1", 3, all[3:], false},
			{"v1.", -1, all[3:], false},
			{"zzz", -1, []string{}, false},
			{"", 0, []string{}, true},
		} {
			got, more, err := r.Tags(t.Context(), test.last, test.n)
			if diff := cmp.Diff(test.want, got); diff != "" || more != test.more || err != nil {
				t.Errorf("Tags(%q, %d): more %v, %v (-want +got):\n%s", test.last, test.n, more, err, diff)
			}
		}
	})
}

func TestRepositories(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		want := []string{"a", "a/b", "a/b/c", "a-b", "a.b/c", "a0", "ab", "b/c/d"}
		for _, name := range want {
			r := repository(t, s, name)
			if err := r.PutManifest(t.Context(), digest.FromString("{}"), []byte("{}")); err != nil {
				t.Fatal(err)
			}
		}
		mustUpload(t, s, "no/manifest", []byte("blob"))
		list := func(last string) []string {
			var names []string
			for name, err := range s.Repositories(t.Context(), last) {
				if err != nil {
					t.Fatal(err)
				}
				names = append(names, name)
			}
			return names
		}
		if diff := cmp.Diff(want, list("")); diff != "" {
			t.Errorf("all (-want +got):\n%s", diff)
		}
		for i, name := range want {
			if diff := cmp.Diff(want[i+1:], list(name), cmp.Transformer("", func(s []string) string { return strings.Join(s, " ") })); diff != "" {
				t.Errorf("after %s (-want +got):\n%s", name, diff)
			}
		}
		for last, first := range map[string]string{"a/a": "a/b", "a/b/z": "a-b", "a.b": "a.b/c", "../x": "a", "aa": "ab"} {
			if got := list(last); len(got) == 0 || got[0] != first {
				t.Errorf("after %q: %v, want %s first", last, got, first)
			}
		}
		for name := range s.Repositories(t.Context(), "") { // a consumer may stop
			if name == "a/b" {
				break
			}
		}
	})
}

// Names are paths on disk: what is valid must be what distribution's grammar,
// less a host, allows.
func FuzzNames(f *testing.F) {
	for _, name := range []string{"a", "a/b", "a__b", "a___b", "a..b", "a--b", "-a", "a-", "A", "a/../b", "_uploads", "a//b", "a.b_c-d/e"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		valid := ValidName(name)
		_, err := reference.WithName(name)
		host, _, _ := strings.Cut(name, "/")
		if lower := strings.ToLower(host) == host && !strings.ContainsAny(host, ":["); valid != (err == nil && lower) && len(name) <= 255 {
			// reference allows in the first component what a host may hold.
			if named, err := reference.WithName("x/" + name); err == nil != valid || (err == nil && named.Name() != "x/"+name) {
				t.Errorf("ValidName(%q) = %v, reference: %v", name, valid, err)
			}
		}
		if valid && (strings.Contains(name, "..") || slices.ContainsFunc(strings.Split(name, "/"), func(c string) bool { return c == "" || c[0] == '_' || c[0] == '.' })) {
			t.Errorf("ValidName(%q) = true", name)
		}
		if ValidTag(name) {
			if _, err := reference.WithTag(mustName("x"), name); err != nil {
				t.Errorf("ValidTag(%q) = true, reference: %v", name, err)
			}
		} else if _, err := reference.WithTag(mustName("x"), name); err == nil {
			t.Errorf("ValidTag(%q) = false, reference takes it", name)
		}
	})
}

func mustName(name string) reference.Named {
	n, err := reference.WithName(name)
	if err != nil {
		panic(err)
	}
	return n
}

// The layout is distribution's: what one writes the other reads.
func TestDistributionReadsWhatIsPut(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		r := repository(t, s, "a/b")
		config := mustUpload(t, s, "a/b", []byte("{}"))
		content := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":2},"layers":[]}`, config)
		d := digest.FromBytes(content)
		if err := r.PutManifest(t.Context(), d, content, "t"); err != nil {
			t.Fatal(err)
		}
		theirs, err := s.Namespace().Repository(t.Context(), mustName("a/b"))
		if err != nil {
			t.Fatal(err)
		}
		desc, err := theirs.Tags(t.Context()).Get(t.Context(), "t")
		if err != nil || desc.Digest != d {
			t.Errorf("tag: %v, %v", desc, err)
		}
		manifests, err := theirs.Manifests(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		m, err := manifests.Get(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		if _, got, _ := m.Payload(); string(got) != string(content) {
			t.Errorf("manifest %s", got)
		}
		if err := manifests.Delete(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		if _, err := r.OpenManifest(t.Context(), d); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after they deleted it: %v", err)
		}
	})
}

func TestReferrers(t *testing.T) {
	s := open(t, t.TempDir())
	r := repository(t, s, "a/b")
	subject := digest.FromString("subject") // need not be there
	list := func(r Repository, last digest.Digest) []string {
		t.Helper()
		got := []string{}
		for desc, err := range r.Referrers(t.Context(), subject, last) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, fmt.Sprintf("%s %s %s %v", desc.Digest, desc.MediaType, desc.ArtifactType, desc.Annotations))
		}
		return got
	}
	if diff := cmp.Diff([]string{}, list(r, "")); diff != "" {
		t.Errorf("none yet (-want +got):\n%s", diff)
	}
	var want []string
	var digests []digest.Digest
	for _, m := range []struct{ fields, mediaType, artifactType, annotations string }{
		{`"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"a/1","config":{"mediaType":"c/1"},"annotations":{"k":"v"}`, "application/vnd.oci.image.manifest.v1+json", "a/1", "map[k:v]"},
		{`"config":{"mediaType":"c/2"}`, "application/vnd.oci.image.manifest.v1+json", "c/2", "map[]"},
		{`"mediaType":"application/vnd.oci.image.index.v1+json","artifactType":"a/3","manifests":[]`, "application/vnd.oci.image.index.v1+json", "a/3", "map[]"},
		{`"manifests":[]`, "application/vnd.oci.image.index.v1+json", "", "map[]"},
	} {
		content := fmt.Appendf(nil, `{"schemaVersion":2,%s,"subject":{"digest":%q}}`, m.fields, subject)
		d := digest.FromBytes(content)
		if err := r.PutManifest(t.Context(), d, content); err != nil {
			t.Fatal(err)
		}
		digests = append(digests, d)
		want = append(want, fmt.Sprintf("%s %s %s %s", d, m.mediaType, m.artifactType, m.annotations))
	}
	slices.Sort(want)
	slices.Sort(digests)
	if diff := cmp.Diff(want, list(r, "")); diff != "" {
		t.Errorf("all (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(want[2:], list(r, digests[1])); diff != "" {
		t.Errorf("after the second (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{}, list(repository(t, s, "other"), "")); diff != "" {
		t.Errorf("in another repository (-want +got):\n%s", diff)
	}
	if err := r.DeleteManifest(t.Context(), digests[0]); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want[1:], list(r, "")); diff != "" {
		t.Errorf("after deleting the first (-want +got):\n%s", diff)
	}
	dir := s.path(r.referrersDir(subject))
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 3 {
		t.Errorf("entries %v, %v", entries, err)
	}
	for name, content := range map[string]string{entryName(digests[1]): "damaged", "nonsense": "", "sha256-" + strings.Repeat("0", 64): "{}"} {
		if err := os.WriteFile(dir+"/"+name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(want[2:], list(r, "")); diff != "" {
		t.Errorf("with damage (-want +got):\n%s", diff)
	}
	// Pushed again, it is put right.
	content, err := s.Driver().GetContent(t.Context(), blobPath(digests[1]))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.PutManifest(t.Context(), digests[1], content); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want[1:], list(r, "")); diff != "" {
		t.Errorf("pushed again (-want +got):\n%s", diff)
	}
}

// Whoever stores manifests by way of distribution need not know of the list.
func TestReferrersByWayOfDistribution(t *testing.T) {
	eachMedium(t, func(t *testing.T, open func() *Store) {
		s := open()
		theirs, err := s.Namespace().Repository(t.Context(), mustName("a"))
		if err != nil {
			t.Fatal(err)
		}
		manifests, err := theirs.Manifests(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		subject := digest.FromString("subject")
		content := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[],"artifactType":"a/b","subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":1,"digest":%q}}`, subject)
		m, desc, err := distribution.UnmarshalManifest("application/vnd.oci.image.index.v1+json", content)
		if err != nil {
			t.Fatal(err)
		}
		count := func() (n int) {
			for got, err := range repository(t, s, "a").Referrers(t.Context(), subject, "") {
				if err != nil || got.Digest != desc.Digest {
					t.Errorf("%v, %v", got, err)
				}
				n++
			}
			return n
		}
		if _, err := manifests.Put(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		if got := count(); got != 1 {
			t.Errorf("%d after putting, want 1", got)
		}
		if err := manifests.Delete(t.Context(), desc.Digest); err != nil {
			t.Fatal(err)
		}
		if got := count(); got != 0 {
			t.Errorf("%d after deleting, want 0", got)
		}
	})
}
