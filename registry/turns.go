package registry

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"
)

// An upload is written to by one request at a time, which the store sees to. A
// client whose connection broke comes back while the replica still waits for the
// rest of what it sent before; so within a replica the newer request takes the
// older one's turn. Another replica's it cannot take: there it waits, and is then
// asked to come again.

// turnTime is how long a request waits for the older one to end, which is nothing
// unless that is making a blob of the upload.
const turnTime = 10 * time.Second

// errUploadBusy is not 416, for that has a client ask how far the upload has come
// and send the rest at once, in vain again. Of 503, docker, containerd and
// go-containerregistry take that it is worth another attempt, containerd the same
// request and docker a new upload; docker gives up on 429, and all three on 409.
var errUploadBusy = &apiError{status: 503, code: "UNAVAILABLE", message: "another request is writing to this upload: try again"}

// errTurnTaken ends the older request.
var errTurnTaken = errors.New("a newer request goes on with the upload")

// turns are the requests that write to uploads, each upload's latest.
type turns struct {
	mu     sync.Mutex
	latest map[string]*turn // guarded by mu; by repository and upload
}

// turn is one request's.
type turn struct {
	conn   *http.ResponseController
	before *turn         // that this one waits for
	taken  chan struct{} // closed when a newer request wants it
	done   chan struct{} // closed when the request has ended

	mu      sync.Mutex
	reading bool // the client's bytes; guarded by mu
}

func newTurn(w http.ResponseWriter) *turn {
	return &turn{conn: http.NewResponseController(w), taken: make(chan struct{}), done: make(chan struct{})}
}

// take takes the turn at an upload from whoever has it, and waits until that one is
// done. end gives it up.
func (s *turns) take(ctx context.Context, w http.ResponseWriter, upload string) (t *turn, end func(), err error) {
	t = newTurn(w)
	s.mu.Lock()
	if s.latest == nil {
		s.latest = make(map[string]*turn)
	}
	t.before = s.latest[upload]
	s.latest[upload] = t
	if t.before != nil {
		t.before.breakOff()
	}
	s.mu.Unlock()
	end = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.latest[upload] == t {
			delete(s.latest, upload)
		}
		close(t.done)
	}
	if err := t.wait(ctx); err != nil {
		end()
		return nil, nil, err
	}
	return t, end, nil
}

// wait waits until those before have ended, of which some may have given up waiting
// themselves.
func (t *turn) wait(ctx context.Context) error {
	timer := time.NewTimer(turnTime)
	defer timer.Stop()
	for b := t.before; b != nil; b = b.before {
		select {
		case <-b.done:
			continue
		case <-t.taken:
		case <-ctx.Done():
		case <-timer.C:
		}
		return errUploadBusy
	}
	t.before = nil
	return nil
}

// breakOff is called once, by the next.
func (t *turn) breakOff() {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.taken)
	if t.reading {
		_ = t.conn.SetReadDeadline(time.Unix(1, 0))
	}
}

// read makes one read of the client's bytes, which takes no longer than stall, if
// it is still this request's turn.
func (t *turn) read(stall time.Duration, read func() (int, error)) (int, error) {
	t.mu.Lock()
	if t.lost() {
		t.mu.Unlock()
		return 0, errTurnTaken
	}
	// Not every ResponseWriter can; those that come from a connection do.
	_ = t.conn.SetReadDeadline(time.Now().Add(stall))
	t.reading = true
	t.mu.Unlock()
	n, err := read()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.reading = false
	return n, err
}

func (t *turn) lost() bool {
	select {
	case <-t.taken:
		return true
	default:
		return false
	}
}
