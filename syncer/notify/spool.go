package notify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

// Notes are small files in folders, of which every process that may come to send
// events sees the same.
type Notes interface {
	// Read returns what a note says. The error is fs.ErrNotExist when there is
	// none.
	Read(ctx context.Context, name string) ([]byte, error)
	// Write puts a note in one step in the place of what there is, durably.
	Write(ctx context.Context, name string, content []byte) error
	// List returns what is below a path that is empty or ends in a slash,
	// sorted; folders end in a slash. The path need not be there.
	List(ctx context.Context, path string) ([]string, error)
	// Remove removes a note or an empty folder. What is not there is no error.
	Remove(ctx context.Context, name string) error
}

// spool is where events wait:
//
//	<receiver>/<nanoseconds, 20 digits>-<id>.json
//	dead/<the same>
//
// One process writes it, the leader.
type spool struct {
	notes Notes

	// adding is held until a message is stored: they come in the order of their
	// names.
	adding sync.Mutex
	last   int64 // nanoseconds of the latest name; guarded by adding

	mu      sync.Mutex
	waiting map[string]int // by receiver; guarded by mu
}

const (
	deadDir = "dead/"
	suffix  = ".json"
	// cutShort ends the names of what earlier versions were writing when their
	// process died.
	cutShort = ".new"
)

func openSpool(ctx context.Context, notes Notes) (*spool, error) {
	s := &spool{notes: notes, waiting: make(map[string]int)}
	receivers, err := s.receivers(ctx)
	if err != nil {
		return nil, err
	}
	for _, r := range receivers {
		if err := s.clear(ctx, r); err != nil {
			return nil, err
		}
		names, err := s.list(ctx, r)
		if err != nil {
			return nil, err
		}
		s.waiting[r] = len(names)
	}
	return s, nil
}

func (s *spool) receivers(ctx context.Context) ([]string, error) {
	entries, err := s.notes.List(ctx, "")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if name, folder := strings.CutSuffix(e, "/"); folder && e != deadDir {
			names = append(names, name)
		}
	}
	return names, nil
}

// list names what waits for a receiver, the earliest first.
func (s *spool) list(ctx context.Context, receiver string) ([]string, error) {
	return s.ending(ctx, receiver+"/", suffix)
}

// ending lists the notes in a folder whose names end so.
func (s *spool) ending(ctx context.Context, folder, end string) ([]string, error) {
	entries, err := s.notes.List(ctx, folder)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if strings.HasSuffix(e, end) {
			names = append(names, e)
		}
	}
	return names, nil
}

func (s *spool) count(receiver string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting[receiver]
}

// add keeps a message: whole and durable under its name, or not at all.
func (s *spool) add(ctx context.Context, receiver string, m message) error {
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	s.adding.Lock()
	defer s.adding.Unlock()
	s.last = max(s.last+1, time.Now().UnixNano())
	s.changed(receiver, +1)
	err = s.notes.Write(ctx, fmt.Sprintf("%s/%020d-%s%s", receiver, s.last, m.ID, suffix), body)
	if err != nil {
		s.changed(receiver, -1)
	}
	return err
}

// changed counts what waits for a receiver.
func (s *spool) changed(receiver string, by int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting[receiver] += by
}

// read returns a message. Its error wraps fs.ErrNotExist when it is gone, and
// errMessage when it is not one.
func (s *spool) read(ctx context.Context, receiver, name string) (message, error) {
	body, err := s.notes.Read(ctx, receiver+"/"+name)
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
func (s *spool) remove(ctx context.Context, receiver, name string) error {
	err := s.notes.Remove(ctx, receiver+"/"+name)
	if err == nil {
		s.changed(receiver, -1)
	}
	return err
}

// bury keeps a message to be looked at, the latest maxDead of them.
func (s *spool) bury(ctx context.Context, receiver, name string) error {
	body, err := s.notes.Read(ctx, receiver+"/"+name)
	if err == nil {
		err = s.notes.Write(ctx, deadDir+name, body)
	}
	if err == nil {
		err = s.remove(ctx, receiver, name)
	}
	if err != nil {
		return err
	}
	dead, err := s.ending(ctx, deadDir, suffix)
	if err != nil {
		return err
	}
	for _, old := range dead[:max(len(dead)-maxDead, 0)] {
		err = errors.Join(err, s.notes.Remove(ctx, deadDir+old))
	}
	return err
}

// forget buries what waits for receivers other than those given.
func (s *spool) forget(ctx context.Context, known map[string]*receiver) (buried int, err error) {
	receivers, err := s.receivers(ctx)
	if err != nil {
		return 0, err
	}
	for _, r := range receivers {
		if known[r] != nil {
			continue
		}
		names, err := s.list(ctx, r)
		if err != nil {
			return buried, err
		}
		for _, name := range names {
			if err := s.bury(ctx, r, name); err != nil {
				return buried, err
			}
			buried++
		}
		if err := s.notes.Remove(ctx, r+"/"); err != nil {
			return buried, err
		}
	}
	return buried, nil
}

// clear removes what was being written when a process died.
func (s *spool) clear(ctx context.Context, receiver string) error {
	names, err := s.ending(ctx, receiver+"/", cutShort)
	for _, name := range names {
		err = errors.Join(err, s.notes.Remove(ctx, receiver+"/"+name))
	}
	return err
}
