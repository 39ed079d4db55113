package registry

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/registry/auth"
	"github.com/connected-registry/connected-registry/storage"
)

// TestHear takes note of children with credentials, and of nobody else.
func TestHear(t *testing.T) {
	store, err := storage.Open(t.Context(), storage.Config{Root: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	s, err := New(Config{Store: store})
	if err != nil {
		t.Fatal(err)
	}
	const good = `{"name":"site","mode":"ReadOnly","connectionState":"Online","loginServer":"site.example:5000","version":"v1","lastSyncTime":"2026-01-31T12:00:00Z"}`
	hear := func(header string, who caller) []storage.Child {
		t.Helper()
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v2/", nil)
		r.Header.Set(v1alpha1.HeaderChild, header)
		s.hear(r, who)
		children, err := store.Children(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return children
	}
	anybody, nobody := caller{&auth.Identity{}}, caller{}
	for _, c := range []struct {
		header string
		who    caller
	}{
		{good, anybody}, {good, nobody}, {"", anybody},
	} {
		if got := hear(c.header, c.who); len(got) != 0 {
			t.Errorf("heard %+v of %q", got, c.header)
		}
	}
	if !s.children.due("token\x00site", time.Now()) || s.children.due("token\x00site", time.Now()) || !s.children.due("token\x00site", time.Now().Add(childInterval)) {
		t.Error("a child is not heard once in an interval")
	}
	for _, bad := range []string{`{"name":"../x"}`, `{"name":"a","mode":"x"}`, `{"name":"a","loginServer":"http://x"}`, `{"name":"a","connectionState":"x"}`, `{"name":"a","version":"` + strings.Repeat("x", 200) + `"}`, `{}`} {
		var said v1alpha1.ChildHeader
		if err := json.Unmarshal([]byte(bad), &said); err == nil && said.Valid() {
			t.Errorf("%s is valid", bad)
		}
	}
}
