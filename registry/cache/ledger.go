package cache

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// nodeKey keys the hashes under which facts about registries, repositories and
// credentials are stored. It is random and never leaves the node.
type nodeKey struct {
	macs sync.Pool // of hash.Hash, HMAC-SHA256 under the key
}

const nodeKeySize = 32

func newNodeKey(b []byte) *nodeKey {
	k := new(nodeKey)
	k.macs.New = func() any { return hmac.New(sha256.New, b) }
	return k
}

// factKey stands for a fact, such as "this credential may read this
// repository", without telling it.
type factKey [16]byte

func (k *nodeKey) fact(parts ...string) factKey {
	mac := k.macs.Get().(hash.Hash)
	defer k.macs.Put(mac)
	mac.Reset()
	buf := make([]byte, 0, 256)
	for _, p := range parts {
		buf = binary.BigEndian.AppendUint64(buf, uint64(len(p)))
		buf = append(buf, p...)
	}
	mac.Write(buf)
	return factKey(mac.Sum(buf[:0])[:len(factKey{})])
}

// reader is the fact that a credential, "" for none, may read a repository.
func (k *nodeKey) reader(host, repo, auth string) factKey {
	return k.fact("reader", host, repo, auth)
}

// member is the fact that content is of a repository.
func (k *nodeKey) member(host string, rt route) factKey {
	return k.fact("member", host, rt.repo, rt.kind.String(), rt.digest.String())
}

// loadNodeKey reads the key at path, and makes a new one if there is none or it
// is damaged: what was remembered under the old one is then forgotten. A new
// key that cannot be written serves until the cache stops.
func loadNodeKey(path string, log *slog.Logger) (*nodeKey, error) {
	key, err := os.ReadFile(path)
	if err == nil && len(key) == nodeKeySize {
		return newNodeKey(key), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading the node key: %w", err)
	}
	key = make([]byte, nodeKeySize)
	rand.Read(key)
	if err := replaceFile(path, key, true); err != nil {
		log.Warn("cannot write the node key; permissions are forgotten when the cache stops", "path", path, "error", err)
	}
	return newNodeKey(key), nil
}

// ledger remembers when each fact was last confirmed. It is an append-only
// file of fixed records, so that a crash tears at most the last one, and is
// rewritten when it has grown too long.
type ledger struct {
	path string
	keep time.Duration // older facts are dropped
	now  func() time.Time
	log  *slog.Logger

	mu      sync.Mutex // guards everything below
	seen    map[factKey]int64
	file    *os.File // nil after a write error, until the next rewrite
	records int
	failed  time.Time // of the last write error
}

// A record is an operation, a fact, the time in Unix seconds and a checksum.
const (
	recordSize = 32
	opConfirm  = 1
	opRevoke   = 2
)

func appendRecord(b []byte, op byte, k factKey, at int64) []byte {
	start := len(b)
	b = append(b, op)
	b = append(b, k[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(at))
	b = append(b, 0, 0, 0)
	return binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b[start:]))
}

func parseRecord(b []byte) (op byte, k factKey, at int64, ok bool) {
	sum := binary.BigEndian.Uint32(b[recordSize-4:])
	if crc32.ChecksumIEEE(b[:recordSize-4]) != sum {
		return 0, k, 0, false
	}
	return b[0], factKey(b[1:17]), int64(binary.BigEndian.Uint64(b[17:25])), true
}

// replay applies the records in b; damaged ones are passed over.
func replay(b []byte) map[factKey]int64 {
	seen := make(map[factKey]int64)
	for ; len(b) >= recordSize; b = b[recordSize:] {
		switch op, k, at, ok := parseRecord(b[:recordSize]); {
		case !ok:
		case op == opConfirm:
			seen[k] = at
		case op == opRevoke:
			delete(seen, k)
		}
	}
	return seen
}

// openLedger reads the ledger at path. A disk that cannot be written to is no
// error: a full one must not keep the cache from serving.
func openLedger(path string, keep time.Duration, now func() time.Time, log *slog.Logger) (*ledger, error) {
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading the permissions seen: %w", err)
	}
	l := &ledger{path: path, keep: keep, now: now, log: log, seen: replay(b)}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.rewrite(); err != nil {
		l.fail(err)
	}
	return l, nil
}

// rewrite replaces the file by what is still worth knowing. l.mu is held.
func (l *ledger) rewrite() error {
	oldest := l.now().Add(-l.keep).Unix()
	var b bytes.Buffer
	for k, at := range l.seen {
		if at < oldest {
			delete(l.seen, k)
			continue
		}
		b.Write(appendRecord(b.AvailableBuffer(), opConfirm, k, at))
	}
	if err := replaceFile(l.path, b.Bytes(), false); err != nil {
		return err
	}
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	if l.file != nil {
		l.file.Close()
	}
	l.file, l.records = f, len(l.seen)
	return nil
}

// confirm records that the fact holds now.
func (l *ledger) confirm(k factKey) {
	now := l.now().Unix()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.seen[k] == now {
		return
	}
	l.seen[k] = now
	l.append(opConfirm, k, now)
}

// revoke records that the fact no longer holds.
func (l *ledger) revoke(k factKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.seen[k]; !ok {
		return
	}
	delete(l.seen, k)
	l.append(opRevoke, k, l.now().Unix())
}

// append writes one record. When it cannot, memory stays right and the file is
// rewritten once that works again. l.mu is held.
func (l *ledger) append(op byte, k factKey, at int64) {
	if l.file == nil && l.now().Sub(l.failed).Abs() < rewriteRetry {
		return
	}
	if err := l.write(op, k, at); err != nil {
		l.fail(err)
	}
}

// fail stops writing for a while. l.mu is held.
func (l *ledger) fail(err error) {
	l.log.Warn("cannot record permissions; they are remembered until the cache stops", "error", err)
	l.failed = l.now()
	if l.file != nil {
		l.file.Close()
		l.file = nil // a torn record must not be appended to
	}
}

func (l *ledger) write(op byte, k factKey, at int64) error {
	if l.file == nil || l.records >= 2*len(l.seen)+4096 {
		return l.rewrite()
	}
	var buf [recordSize]byte
	_, err := l.file.Write(appendRecord(buf[:0], op, k, at))
	l.records++
	return err
}

// fresh reports whether the fact was confirmed no longer than age ago. A time in
// the future, left by a clock that was wrong, is not fresh.
func (l *ledger) fresh(k factKey, age time.Duration) bool {
	d, ok := l.age(k)
	return ok && d >= 0 && d <= age
}

// known reports whether the fact was confirmed within age of now, on either
// side: a clock that jumped must not lock out what the node relies on offline.
func (l *ledger) known(k factKey, age time.Duration) bool {
	d, ok := l.age(k)
	return ok && d.Abs() <= age
}

func (l *ledger) age(k factKey) (time.Duration, bool) {
	l.mu.Lock()
	at, ok := l.seen[k]
	l.mu.Unlock()
	return l.now().Sub(time.Unix(at, 0)), ok
}

func (l *ledger) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		l.file.Close()
		l.file = nil
	}
}

// replaceFile puts b at path at once: temporary file, rename. With durable set
// it is flushed first; otherwise a power cut may lose or empty it, which the
// readers of such files allow for.
func replaceFile(path string, b []byte, durable bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil && durable {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// removeTemporary removes what a crash left of replaceFile in dir.
func removeTemporary(dir string) {
	files, _ := os.ReadDir(dir) // nothing to remove where nothing can be listed
	for _, f := range files {
		if strings.HasPrefix(f.Name(), ".tmp-") {
			os.Remove(filepath.Join(dir, f.Name()))
		}
	}
}
