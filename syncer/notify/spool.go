package notify

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// spool is the directory in which events wait:
//
//	<receiver>/<nanoseconds, 20 digits>-<id>.json
//	dead/<the same>
//
// One process writes it, the leader.
type spool struct {
	dir string

	mu      sync.Mutex
	waiting map[string]int // by receiver
	last    int64          // nanoseconds of the latest name
}

const (
	deadDir = "dead"
	suffix  = ".json"
)

func openSpool(dir string) (*spool, error) {
	if err := os.MkdirAll(filepath.Join(dir, deadDir), 0o755); err != nil {
		return nil, err
	}
	s := &spool{dir: dir, waiting: make(map[string]int)}
	receivers, err := s.receivers()
	if err != nil {
		return nil, err
	}
	for _, r := range receivers {
		if err := s.clear(r); err != nil {
			return nil, err
		}
		names, err := s.list(r)
		if err != nil {
			return nil, err
		}
		s.waiting[r] = len(names)
	}
	return s, nil
}

func (s *spool) receivers() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && e.Name() != deadDir {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// list names what waits for a receiver, the earliest first.
func (s *spool) list(receiver string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, receiver))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), suffix) {
			names = append(names, e.Name())
		}
	}
	return names, nil // sorted, as os.ReadDir does
}

func (s *spool) count(receiver string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting[receiver]
}

// add keeps a message: whole and durable under its name, or not at all.
func (s *spool) add(receiver string, m message) error {
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last+1, time.Now().UnixNano())
	dir := filepath.Join(s.dir, receiver)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	name := filepath.Join(dir, fmt.Sprintf("%020d-%s%s", s.last, m.ID, suffix))
	temporary := name + ".new" // a crash may leave one, which the next start removes
	if err := writeDurably(temporary, body); err != nil {
		_ = os.Remove(temporary)
		return err
	}
	if err := os.Rename(temporary, name); err != nil {
		return err
	}
	s.waiting[receiver]++
	return syncDir(dir)
}

// read returns a message. Its error wraps fs.ErrNotExist when it is gone, and
// errMessage when it is not one.
func (s *spool) read(receiver, name string) (message, error) {
	body, err := os.ReadFile(filepath.Join(s.dir, receiver, name))
	if err != nil {
		return message{}, err
	}
	var m message
	if json.Unmarshal(body, &m) != nil || m.ID == "" {
		return message{}, errMessage
	}
	return m, nil
}

var errMessage = errors.New("is not an event")

// remove takes away a message that was delivered.
func (s *spool) remove(receiver, name string) error {
	err := os.Remove(filepath.Join(s.dir, receiver, name))
	if err == nil {
		s.mu.Lock()
		s.waiting[receiver]--
		s.mu.Unlock()
	}
	return err
}

// bury keeps a message to be looked at, the latest maxDead of them.
func (s *spool) bury(receiver, name string) error {
	err := os.Rename(filepath.Join(s.dir, receiver, name), filepath.Join(s.dir, deadDir, name))
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.waiting[receiver]--
	s.mu.Unlock()
	dead, err := s.list(deadDir)
	if err != nil {
		return err
	}
	for _, old := range dead[:max(len(dead)-maxDead, 0)] {
		err = errors.Join(err, os.Remove(filepath.Join(s.dir, deadDir, old)))
	}
	return err
}

// forget buries what waits for receivers other than those given.
func (s *spool) forget(known map[string]*receiver) (buried int, err error) {
	receivers, err := s.receivers()
	if err != nil {
		return 0, err
	}
	for _, r := range receivers {
		if known[r] != nil {
			continue
		}
		names, err := s.list(r)
		if err != nil {
			return buried, err
		}
		for _, name := range names {
			if err := s.bury(r, name); err != nil {
				return buried, err
			}
			buried++
		}
		if err := os.Remove(filepath.Join(s.dir, r)); err != nil {
			return buried, err
		}
	}
	return buried, nil
}

// clear removes files that were being written when the process died.
func (s *spool) clear(receiver string) error {
	entries, err := os.ReadDir(filepath.Join(s.dir, receiver))
	if err != nil {
		return err
	}
	for _, e := range slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return !strings.HasSuffix(e.Name(), ".new") }) {
		if err := os.Remove(filepath.Join(s.dir, receiver, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func writeDurably(name string, data []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
