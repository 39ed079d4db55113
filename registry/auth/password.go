package auth

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"sync"

	"github.com/connected-registry/connected-registry/clienttoken"
)

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
func (c *checker) remembered(h clienttoken.Hash, password string) bool {
	sum := c.digest(h.Text(), password)
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.right[sum]
}

// check hashes the password and remembers it when it is right.
func (c *checker) check(h clienttoken.Hash, password string) bool {
	c.hashing <- struct{}{}
	defer func() { <-c.hashing }()
	if !h.Matches(password) {
		return false
	}
	sum := c.digest(h.Text(), password)
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
