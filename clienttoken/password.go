package clienttoken

import (
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
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

// Hash is a password as it is stored.
type Hash struct {
	text       string
	iterations int
	salt, key  []byte
}

// HashPassword returns what a File holds in place of a password. Each call
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
	h, err := ParseHash(text)
	return err == nil && h.Matches(password)
}

func formatHash(iterations int, salt, key []byte) string {
	enc := base64.RawStdEncoding
	return hashPrefix + strconv.Itoa(iterations) + "$" + enc.EncodeToString(salt) + "$" + enc.EncodeToString(key)
}

// NoPassword is a hash that no password matches, which takes as long to find out
// as for others of so many iterations. 0: as many as HashPassword makes.
func NoPassword(iterations int) Hash {
	if iterations == 0 {
		iterations = hashIterations
	}
	return Hash{text: "none", iterations: iterations, salt: make([]byte, saltSize), key: make([]byte, keySize)}
}

// Text is the hash as it is stored.
func (h Hash) Text() string { return h.text }

// Iterations says how much work a comparison is.
func (h Hash) Iterations() int { return h.iterations }

// ParseHash reads a stored password. Its errors do not quote it.
func ParseHash(text string) (Hash, error) {
	rest, ok := strings.CutPrefix(text, hashPrefix)
	parts := strings.Split(rest, "$")
	if !ok || len(parts) != 3 {
		return Hash{}, errors.New("is not of the form " + hashPrefix + "<iterations>$<salt>$<key>")
	}
	h := Hash{text: text}
	var err error
	if h.iterations, err = strconv.Atoi(parts[0]); err != nil || h.iterations < 1 || h.iterations > maxIterations {
		return Hash{}, fmt.Errorf("has a number of iterations that is not between 1 and %d", maxIterations)
	}
	enc := base64.RawStdEncoding.Strict()
	if h.salt, err = enc.DecodeString(parts[1]); err != nil || len(h.salt) < 8 {
		return Hash{}, errors.New("has a salt that is not base64 of at least 8 bytes")
	}
	if h.key, err = enc.DecodeString(parts[2]); err != nil || len(h.key) != keySize {
		return Hash{}, fmt.Errorf("has a key that is not base64 of %d bytes", keySize)
	}
	return h, nil
}

// Matches reports whether the hash is that of password, in a time that does not
// depend on how far they differ.
func (h Hash) Matches(password string) bool {
	key, err := pbkdf2.Key(sha256.New, password, h.salt, h.iterations, keySize)
	return err == nil && subtle.ConstantTimeCompare(key, h.key) == 1
}
