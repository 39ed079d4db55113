package clienttoken

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// File is the content of a token's file, in JSON. The file's name is the token's
// name with Extension after it.
type File struct {
	// Passwords are one or two, from HashPassword. Either opens; so one can be
	// replaced while clients use the other. None: nobody can log in.
	Passwords []string `json:"passwords"`
	// ScopeMap is what the token allows. Empty: it can log in and do nothing.
	ScopeMap []v1alpha1.Scope `json:"scopeMap"`
}

// Extension ends the name of a token's file.
const Extension = ".json"

// Renderer renders token files. A password that has not changed keeps its hash,
// so that the same token makes the same bytes. Finding that out costs as much as
// hashing, once for each password: the Renderer remembers, under a key that it
// shows nobody, which password belongs to which hash. It is for one goroutine.
type Renderer struct {
	key  []byte
	same map[[sha256.Size]byte]bool // found to match, by digest
	used map[[sha256.Size]byte]bool // since the last Forget
}

// NewRenderer returns a Renderer that remembers nothing.
func NewRenderer() *Renderer {
	r := &Renderer{key: make([]byte, sha256.Size), same: make(map[[sha256.Size]byte]bool), used: make(map[[sha256.Size]byte]bool)}
	rand.Read(r.key)
	return r
}

// Render returns the content of a token's file, and was itself when nothing has
// changed since. was is what the file holds now; nil, or what cannot be read, is
// no help.
func (r *Renderer) Render(passwords []string, scopes []v1alpha1.Scope, was []byte) ([]byte, error) {
	var before File
	_ = json.Unmarshal(was, &before) // what cannot be read is written anew
	now := File{ScopeMap: scopes}
	for _, password := range passwords {
		hash, err := r.hash(password, before.Passwords)
		if err != nil {
			return nil, err
		}
		now.Passwords = append(now.Passwords, hash)
	}
	if reflect.DeepEqual(now, before) {
		return was, nil
	}
	return json.Marshal(now)
}

// Forget drops what was not needed since the last call of Forget.
func (r *Renderer) Forget() {
	maps.DeleteFunc(r.same, func(digest [sha256.Size]byte, _ bool) bool { return !r.used[digest] })
	clear(r.used)
}

// hash returns the one of known that belongs to the password, or a new one.
func (r *Renderer) hash(password string, known []string) (string, error) {
	for _, text := range known {
		digest := r.digest(text, password)
		if r.same[digest] || PasswordMatches(text, password) {
			r.same[digest], r.used[digest] = true, true
			return text, nil
		}
	}
	text, err := HashPassword(password)
	if err != nil {
		return "", err
	}
	digest := r.digest(text, password)
	r.same[digest], r.used[digest] = true, true
	return text, nil
}

func (r *Renderer) digest(text, password string) (sum [sha256.Size]byte) {
	mac := hmac.New(sha256.New, r.key)
	fmt.Fprintf(mac, "%d:%s%s", len(text), text, password)
	mac.Sum(sum[:0])
	return sum
}
