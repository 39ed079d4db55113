package storage

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"testing"

	"github.com/opencontainers/go-digest"
)

// What is remembered must not outlive what happens to the file, whoever does it.
func TestManifestIsNotRememberedTooLong(t *testing.T) {
	root := t.TempDir()
	s, other := open(t, root), open(t, root)
	r := repository(t, s, "a")
	content := manifestOf("", nil, nil, "remembered")
	d := put(t, r, content, "t")
	read := func() error {
		got, err := r.Manifest(t.Context(), d)
		if err == nil && !bytes.Equal(got, content) {
			t.Fatalf("read %q", got)
		}
		return err
	}
	for range 2 {
		if err := read(); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := s.manifests.get(t.Context(), s.medium, d); !ok {
		t.Fatal("not remembered")
	}
	flip(t, s, d)
	if err := read(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("corrupt: %v", err)
	}
	put(t, repository(t, other, "a"), content, "t")
	if err := read(); err != nil {
		t.Errorf("pushed again: %v", err)
	}
	if err := os.Remove(s.path(blobPath(d))); err != nil {
		t.Fatal(err)
	}
	if err := read(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without its blob: %v", err)
	}
	put(t, repository(t, other, "a"), content)
	if err := repository(t, other, "a").DeleteManifest(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if err := read(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("deleted by another replica: %v", err)
	}
	if err := repository(t, s, "b").PutManifest(t.Context(), d, content); err != nil {
		t.Fatal(err)
	}
	if err := read(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of another repository: %v", err)
	}
}

func TestManifestsRememberedAreBounded(t *testing.T) {
	s := open(t, t.TempDir())
	r := repository(t, s, "a")
	content := make([]byte, maxRememberedEach)
	for i := range maxRemembered/maxRememberedEach + 50 {
		d := digest.FromString(fmt.Sprint(i))
		s.manifests.put(d, version{}, content)
		s.manifests.put(d, version{}, content)
	}
	if s.manifests.bytes > maxRemembered || s.manifests.bytes != len(s.manifests.entries)*len(content) {
		t.Errorf("%d bytes in %d entries", s.manifests.bytes, len(s.manifests.entries))
	}
	big := manifestOf("", nil, nil, string(bytes.Repeat([]byte("x"), maxManifest)))
	d := digest.FromBytes(big)
	if err := r.PutManifest(t.Context(), d, big); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Manifest(t.Context(), d); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("larger than any manifest: %v", err)
	}
}

func TestValidDigest(t *testing.T) {
	for _, d := range []digest.Digest{
		digest.FromString("x"), digest.SHA512.FromString("x"), digest.SHA384.FromString("x"), "", "sha256:", "sha256:zz",
		"sha256:" + digest.Digest(bytes.Repeat([]byte("A"), 64)), "sha256:" + digest.Digest(bytes.Repeat([]byte("g"), 64)),
		"sha256:" + digest.Digest(bytes.Repeat([]byte("a"), 63)) + "/", "md5:0123", "../../x",
	} {
		if got, want := validDigest(d), d.Validate() == nil; got != want {
			t.Errorf("%q: %v", d, got)
		}
	}
}
