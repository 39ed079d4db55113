package notify

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strconv"
	"time"
)

// serve sends what waits for one receiver, in order, until ctx ends.
func (n *Notifier) serve(ctx context.Context, id string, r *receiver) {
	for ctx.Err() == nil {
		names, err := n.spool.list(ctx, id)
		if err != nil {
			n.config.Logger.Error("events cannot be read", "receiver", id, "error", err)
			wait(ctx, longBackoff, nil)
			continue
		}
		for _, name := range names {
			n.deliver(ctx, id, r, name)
		}
		if len(names) == 0 {
			wait(ctx, time.Hour, r.more)
		}
	}
}

// deliver sends one event until it is taken, given up, or ctx ends.
func (n *Notifier) deliver(ctx context.Context, id string, r *receiver, name string) {
	m, err := n.spool.read(ctx, id, name)
	switch {
	case err == nil:
	case errors.Is(err, fs.ErrNotExist):
		return
	case errors.Is(err, errMessage):
		n.giveUp(ctx, id, name, err)
		return
	default:
		n.config.Logger.Error("an event cannot be read", "receiver", id, "event", name, "error", err)
		wait(ctx, firstBackoff, nil)
		return
	}
	for backoff := firstBackoff; ctx.Err() == nil; backoff = min(2*backoff, longBackoff) {
		err := n.post(ctx, r, m)
		if ctx.Err() != nil {
			return
		}
		n.note(err)
		if err == nil {
			// However late: it would be sent again.
			if err := n.spool.remove(context.WithoutCancel(ctx), id, name); err != nil {
				n.config.Logger.Error("an event that was sent cannot be removed, and will be sent again", "receiver", id, "error", err)
			}
			return
		}
		if final(err) || time.Since(m.Time)+backoff > n.config.TTL {
			n.giveUp(ctx, id, name, err)
			return
		}
		n.config.Logger.Debug("an event was not taken", "receiver", id, "event", m.ID, "error", err)
		wait(ctx, max(backoff, after(err)), nil)
	}
}

func (n *Notifier) note(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stats.LastError = ""
	if err != nil {
		n.stats.LastError = err.Error()
		return
	}
	n.stats.Delivered++
	n.delivered.Inc()
}

func (n *Notifier) giveUp(ctx context.Context, id, name string, why error) {
	n.bury(1)
	n.config.Logger.Warn("an event is given up", "receiver", id, "event", name, "error", why)
	if err := n.spool.bury(ctx, id, name); err != nil {
		n.config.Logger.Error("a dead letter cannot be put away", "receiver", id, "error", err)
	}
}

// errStatus is a receiver's refusal.
type errStatus struct {
	status int
	after  time.Duration
}

func (e errStatus) Error() string { return fmt.Sprintf("the receiver answered %d", e.status) }

// final reports whether a receiver has said that it will never take this event
// (CloudEvents HTTP webhook specification, "Delivery response").
func final(err error) bool {
	s, ok := errors.AsType[errStatus](err)
	if !ok {
		return false
	}
	switch s.status {
	case http.StatusBadRequest, http.StatusGone, http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity:
		return true
	}
	return false
}

// after is what the receiver asks to wait, an hour at most.
func after(err error) time.Duration {
	s, _ := errors.AsType[errStatus](err)
	return min(s.after, time.Hour)
}

// post sends an event once. Its error quotes neither URL nor answer.
func (n *Notifier) post(ctx context.Context, r *receiver, m message) error {
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.URL, bytes.NewReader(body))
	if err != nil {
		return errors.New("the receiver's URL is none")
	}
	req.Header.Set("Content-Type", "application/cloudevents+json; charset=UTF-8")
	req.Header.Set("User-Agent", "connected-registry")
	if r.Authorization != "" {
		req.Header.Set("Authorization", r.Authorization)
	}
	resp, err := n.client.Do(req)
	if err != nil {
		return fmt.Errorf("the receiver cannot be reached: %w", innermost(err))
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, maxReply) // so that the connection can be used again
	if resp.StatusCode >= 200 && resp.StatusCode < 300 {
		return nil
	}
	seconds, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
	return errStatus{resp.StatusCode, time.Duration(max(seconds, 0)) * time.Second}
}

// innermost strips the layers of an error that quote the URL.
func innermost(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}

// wait waits for d, for a value in more, or for the end of ctx.
func wait(ctx context.Context, d time.Duration, more <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-more:
	}
}
