package auth

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
)

// Bearer tokens are JSON Web Tokens (RFC 7519) signed with HMAC-SHA256, of which
// this package reads only those that it writes: one algorithm, one header.
const (
	bearerHeader = `{"alg":"HS256","typ":"JWT"}`
	// BearerLifetime is how long a bearer token is valid. Clients fetch
	// another when it ends; a transfer under way goes on.
	BearerLifetime = 10 * time.Minute
	// clockSkew is how far apart the replicas' clocks may be.
	clockSkew = time.Minute
	// maxBearer bounds what is parsed; a header may hold 64 KiB.
	maxBearer = 32 << 10
)

var errBearer = errors.New("bearer token is invalid or has expired")

// claims is what a bearer token says.
type claims struct {
	Issuer  string  `json:"iss"`
	Subject string  `json:"sub"`           // the token's name; empty for anonymous
	Expires int64   `json:"exp"`           // seconds since the epoch
	Issued  int64   `json:"iat"`           // seconds since the epoch
	Key     string  `json:"key,omitempty"` // which password was shown; see passwordID
	Access  []grant `json:"access,omitempty"`
}

// grant is access to one resource, by distribution's token specification, with
// the actions of scope maps.
type grant struct {
	Type    string            `json:"type"`
	Name    string            `json:"name"`
	Actions []v1alpha1.Action `json:"actions"`
}

// covers reports whether the bearer token was issued for action on a
// repository.
func (c *claims) covers(repository string, action v1alpha1.Action) bool {
	return slices.ContainsFunc(c.Access, func(g grant) bool {
		return g.Type == "repository" && g.Name == repository && slices.Contains(g.Actions, action)
	})
}

// coversCatalogue reports whether the bearer token was issued for the list of
// repositories.
func (c *claims) coversCatalogue() bool {
	return slices.ContainsFunc(c.Access, func(g grant) bool { return g.Type == "registry" && g.Name == "catalog" })
}

// signer signs and verifies bearer tokens. Replicas with the same key accept
// each other's.
type signer struct{ key []byte }

func (s signer) sign(c claims) (string, error) {
	payload, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	enc := base64.RawURLEncoding
	text := enc.EncodeToString([]byte(bearerHeader)) + "." + enc.EncodeToString(payload)
	return text + "." + enc.EncodeToString(s.mac(text)), nil
}

// verify returns what a bearer token says if it is ours and valid at now.
func (s signer) verify(text string, now time.Time) (*claims, error) {
	if len(text) > maxBearer {
		return nil, errBearer
	}
	enc := base64.RawURLEncoding.Strict()
	signed, signature := cutLast(text)
	header, payload, _ := strings.Cut(signed, ".")
	mac, err := enc.DecodeString(signature)
	if err != nil || !hmac.Equal(mac, s.mac(signed)) {
		return nil, errBearer
	}
	if header != enc.EncodeToString([]byte(bearerHeader)) {
		return nil, errBearer
	}
	content, err := enc.DecodeString(payload)
	if err != nil {
		return nil, errBearer
	}
	var c claims
	if json.Unmarshal(content, &c) != nil || c.Issuer != service {
		return nil, errBearer
	}
	if now.Unix() >= c.Expires || now.Add(clockSkew).Unix() < c.Issued {
		return nil, errBearer
	}
	return &c, nil
}

func (s signer) mac(text string) []byte {
	m := hmac.New(sha256.New, s.key)
	m.Write([]byte(text))
	return m.Sum(nil)
}

// passwordID names a stored password without giving any of it away, so that a
// bearer token ends with the password that it was issued for.
func passwordID(h clienttoken.Hash) string {
	sum := sha256.Sum256([]byte("connected-registry password id\x00" + h.Text()))
	return base64.RawURLEncoding.EncodeToString(sum[:12])
}

// cutLast splits text at its last dot.
func cutLast(text string) (before, after string) {
	i := strings.LastIndexByte(text, '.')
	if i < 0 {
		return "", text
	}
	return text[:i], text[i+1:]
}
