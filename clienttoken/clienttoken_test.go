package clienttoken

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

func TestPasswordHash(t *testing.T) {
	text, err := HashPassword("correct horse")
	if err != nil {
		t.Fatal(err)
	}
	other, err := HashPassword("correct horse")
	if err != nil || other == text {
		t.Errorf("not salted anew: %v", err)
	}
	if !PasswordMatches(text, "correct horse") || PasswordMatches(text, "battery staple") || PasswordMatches("nonsense", "") {
		t.Error("wrong answer")
	}
	if !strings.HasPrefix(text, "$pbkdf2-sha256$i=600000$") {
		t.Errorf("format %s", text)
	}
}

func TestRender(t *testing.T) {
	scopes := []v1alpha1.Scope{{Repositories: []string{"team/**"}, Actions: []v1alpha1.Action{v1alpha1.ActionContentRead}}}
	r := NewRenderer()
	render := func(r *Renderer, was []byte, scopes []v1alpha1.Scope, passwords ...string) ([]byte, File) {
		t.Helper()
		data, err := r.Render(passwords, scopes, was)
		if err != nil {
			t.Fatal(err)
		}
		var file File
		if err := json.Unmarshal(data, &file); err != nil {
			t.Fatal(err)
		}
		return data, file
	}
	first, file := render(r, nil, scopes, "one", "two")
	if len(file.Passwords) != 2 || !PasswordMatches(file.Passwords[0], "one") || !PasswordMatches(file.Passwords[1], "two") {
		t.Fatalf("passwords %q", file.Passwords)
	}
	if bytes.Contains(first, []byte("one")) || bytes.Contains(first, []byte("two")) {
		t.Error("a password in clear")
	}
	for _, again := range []*Renderer{r, NewRenderer()} {
		if data, _ := render(again, first, scopes, "one", "two"); !bytes.Equal(data, first) {
			t.Error("the same token made other bytes")
		}
	}
	_, changed := render(r, first, scopes, "three", "two")
	if changed.Passwords[1] != file.Passwords[1] {
		t.Error("a password that stayed was hashed anew")
	}
	if changed.Passwords[0] == file.Passwords[0] || !PasswordMatches(changed.Passwords[0], "three") {
		t.Error("a password that changed kept its hash")
	}
	if data, other := render(r, first, nil, "one", "two"); bytes.Equal(data, first) || other.Passwords[0] != file.Passwords[0] {
		t.Error("another scope map must change the file, and no hash")
	}
	if _, fresh := render(r, []byte("{"), scopes, "one"); !PasswordMatches(fresh.Passwords[0], "one") {
		t.Error("what cannot be read was in the way")
	}
}

func TestRendererForgets(t *testing.T) {
	r := NewRenderer()
	was, err := r.Render([]string{"one"}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Forget()
	if len(r.same) != 1 {
		t.Fatalf("%d remembered, expected the one that was used", len(r.same))
	}
	if _, err := r.Render([]string{"one"}, nil, was); err != nil {
		t.Fatal(err)
	}
	r.Forget()
	r.Forget()
	if len(r.same) != 0 {
		t.Errorf("%d remembered after nothing was used", len(r.same))
	}
}

func BenchmarkSlowHash(b *testing.B) {
	text, err := HashPassword("x")
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		PasswordMatches(text, "x")
	}
}
