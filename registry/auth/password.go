package auth

import (
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
)

// Passwords are stored as PBKDF2-HMAC-SHA256, in the PHC string format
//
//	$pbkdf2-sha256$i=<iterations>$<salt>$<key>
//
// with salt and key in unpadded standard base64. The iterations are those that
// OWASP's password storage cheat sheet asks for; they cost about a tenth of a
// second, once for each password and replica.
const (
	hashPrefix     = "$pbkdf2-sha256$i="
	hashIterations = 600_000
	maxIterations  = 10_000_000
	saltSize       = 16
	keySize        = sha256.Size
)

// hash is a password as it is stored.
type hash struct {
	text       string
	iterations int
	salt, key  []byte
}

// HashPassword returns what a token file holds in place of a password. Each call
// salts anew.
func HashPassword(password string) (string, error) {
	salt := make([]byte, saltSize)
	rand.Read(salt)
	key, err := pbkdf2.Key(sha256.New, password, salt, hashIterations, keySize)
	if err != nil {
		return "", fmt.Errorf("hashing password: %w", err)
	}
	return formatHash(hashIterations, salt, key), nil
}

// PasswordMatches reports whether text, from HashPassword, is that of password.
// It takes as long as hashing.
func PasswordMatches(text, password string) bool {
	h, err := parseHash(text)
	return err == nil && h.matches(password)
}

func formatHash(iterations int, salt, key []byte) string {
	enc := base64.RawStdEncoding
	return hashPrefix + strconv.Itoa(iterations) + "$" + enc.EncodeToString(salt) + "$" + enc.EncodeToString(key)
}

// parseHash reads a stored password. Its errors do not quote it.
func parseHash(text string) (hash, error) {
	rest, ok := strings.CutPrefix(text, hashPrefix)
	parts := strings.Split(rest, "$")
	if !ok || len(parts) != 3 {
		return hash{}, errors.New("is not of the form " + hashPrefix + "<iterations>$<salt>$<key>")
	}
	h := hash{text: text}
	var err error
	if h.iterations, err = strconv.Atoi(parts[0]); err != nil || h.iterations < 1 || h.iterations > maxIterations {
		return hash{}, fmt.Errorf("has a number of iterations that is not between 1 and %d", maxIterations)
	}
	enc := base64.RawStdEncoding.Strict()
	if h.salt, err = enc.DecodeString(parts[1]); err != nil || len(h.salt) < 8 {
		return hash{}, errors.New("has a salt that is not base64 of at least 8 bytes")
	}
	if h.key, err = enc.DecodeString(parts[2]); err != nil || len(h.key) != keySize {
		return hash{}, fmt.Errorf("has a key that is not base64 of %d bytes", keySize)
	}
	return h, nil
}

func (h hash) matches(password string) bool {
	key, err := pbkdf2.Key(sha256.New, password, h.salt, h.iterations, keySize)
	return err == nil && subtle.ConstantTimeCompare(key, h.key) == 1
}

// maxRemembered bounds how many passwords that were right are remembered.
const maxRemembered = 4096

// checker checks passwords, and remembers those that were right: not the
// passwords but a keyed hash of each, under a key that this process made and
// shows nobody. So a client that sends its password with each request pays for
// the slow hash once.
type checker struct {
	key     [32]byte
	hashing chan struct{} // bounds slow hashes at a time

	mu    sync.Mutex
	right map[[sha256.Size]byte]bool // guarded by mu
}

func newChecker(parallel int) *checker {
	c := &checker{hashing: make(chan struct{}, parallel), right: make(map[[sha256.Size]byte]bool)}
	rand.Read(c.key[:])
	return c
}

// digest is a keyed hash of the parts, each of which is told from the next.
func (c *checker) digest(parts ...string) (sum [sha256.Size]byte) {
	mac := hmac.New(sha256.New, c.key[:])
	for _, part := range parts {
		fmt.Fprintf(mac, "%d:%s", len(part), part)
	}
	mac.Sum(sum[:0])
	return sum
}

// remembered reports whether the password is known to be right. What is
// remembered depends on what is stored, so that a password that is replaced is
// forgotten.
func (c *checker) remembered(h hash, password string) bool {
	sum := c.digest(h.text, password)
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.right[sum]
}

// check hashes the password and remembers it when it is right.
func (c *checker) check(h hash, password string) bool {
	c.hashing <- struct{}{}
	defer func() { <-c.hashing }()
	if !h.matches(password) {
		return false
	}
	sum := c.digest(h.text, password)
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.right) >= maxRemembered {
		for old := range c.right { // whichever: forgetting costs a hash
			delete(c.right, old)
			break
		}
	}
	c.right[sum] = true
	return true
}
