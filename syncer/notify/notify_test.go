package notify

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const someDigest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func patterns(t *testing.T, all ...string) (parsed []v1alpha1.EventPattern) {
	t.Helper()
	for _, s := range all {
		p, err := v1alpha1.ParseEventPattern(s)
		if err != nil {
			t.Fatal(err)
		}
		parsed = append(parsed, p)
	}
	return parsed
}

// remote answers as a function says and remembers what it was sent.
type remote struct {
	answer func(n int) (status int, header http.Header, err error) // of the n-th request; nil: 204

	mu       sync.Mutex
	subjects []string
	times    []time.Time
}

func (r *remote) RoundTrip(req *http.Request) (*http.Response, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var m message
	if err := json.NewDecoder(req.Body).Decode(&m); err != nil {
		return nil, err
	}
	r.subjects, r.times = append(r.subjects, m.Subject), append(r.times, time.Now())
	status, header := http.StatusNoContent, http.Header{}
	if r.answer != nil {
		var err error
		if status, header, err = r.answer(len(r.subjects) - 1); err != nil {
			return nil, err
		}
	}
	return &http.Response{StatusCode: status, Header: header, Body: http.NoBody, Request: req}, nil
}

func (r *remote) got() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.subjects...)
}

// folder is that of the notes in a store.
const folder = "notifications"

func notesIn(t *testing.T, dir string) Notes {
	t.Helper()
	store, err := storage.Open(t.Context(), storage.Config{Root: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() }) // never fails
	return store.Notes(folder)
}

func mustNew(t *testing.T, c Config) *Notifier {
	t.Helper()
	c.Source = "/connectedregistries/edge"
	n, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// run runs n until stop is called.
func run(t *testing.T, n *Notifier) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func push(tag string) Event {
	return Event{Time: time.Now(), Repository: "team/app", Tag: tag}
}

// TestSend posts over a real connection what a receiver of CloudEvents reads.
func TestSend(t *testing.T) {
	got := make(chan *http.Request, 1)
	bodies := make(chan []byte, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got <- r
		bodies <- body
		w.WriteHeader(http.StatusAccepted)
	}))
	defer server.Close()
	n := mustNew(t, Config{Notes: notesIn(t, t.TempDir()), Metrics: prometheus.NewRegistry(), Receivers: []Receiver{{
		Patterns: patterns(t, "team/*:push"), URL: server.URL + "/hook?key=hunter2", Authorization: "Bearer hunter3",
	}}})
	stop := run(t, n)
	defer stop()
	for _, e := range []Event{
		{Time: time.Now(), Repository: "other/app", Tag: "v1"},
		{Time: time.Now(), Repository: "team/app", Tag: "v1", Delete: true},
		{Time: time.Date(2026, 1, 31, 13, 0, 0, 0, time.FixedZone("", 3600)), Repository: "team/app", Tag: "v1", Digest: someDigest, MediaType: "application/x", Size: 7, Actor: "ci"},
	} {
		if err := n.Add(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	r := <-got
	if r.URL.String() != "/hook?key=hunter2" || r.Header.Get("Authorization") != "Bearer hunter3" || r.Header.Get("Content-Type") != "application/cloudevents+json; charset=UTF-8" {
		t.Errorf("%s %v", r.URL, r.Header)
	}
	var m map[string]any
	if err := json.Unmarshal(<-bodies, &m); err != nil {
		t.Fatal(err)
	}
	if id, _ := m["id"].(string); len(id) != 24 {
		t.Errorf("id %q", id)
	}
	delete(m, "id")
	want := map[string]any{
		"specversion": "1.0", "source": "/connectedregistries/edge", "type": "io.connectedregistry.push",
		"subject": "team/app:v1@" + someDigest, "time": "2026-01-31T12:00:00Z", "datacontenttype": "application/json",
		"data": map[string]any{"action": "push", "repository": "team/app", "tag": "v1", "digest": someDigest, "mediaType": "application/x", "size": 7.0, "actor": "ci"},
	}
	if diff := cmp.Diff(want, m); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// TestRetry keeps the order while a receiver fails in every way there is.
func TestRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		r := &remote{answer: func(n int) (int, http.Header, error) {
			switch n {
			case 0:
				return 0, nil, errors.New("connection refused by http://hunter2")
			case 1:
				return http.StatusServiceUnavailable, http.Header{"Retry-After": {"90"}}, nil
			case 2:
				return http.StatusTemporaryRedirect, http.Header{"Location": {"http://elsewhere.example"}}, nil
			}
			return http.StatusOK, nil, nil
		}}
		n := mustNew(t, Config{Notes: notesIn(t, t.TempDir()), Transport: r, Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})), Receivers: []Receiver{{
			Patterns: patterns(t, "*:*"), URL: "http://hunter2.example/hunter2", Authorization: "hunter2",
		}}})
		stop := run(t, n)
		for _, tag := range []string{"v1", "v2"} {
			if err := n.Add(t.Context(), push(tag)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(10 * time.Minute)
		stop()
		if diff := cmp.Diff([]string{"team/app:v1", "team/app:v1", "team/app:v1", "team/app:v1", "team/app:v2"}, r.got()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if waited := r.times[2].Sub(r.times[1]); waited != 90*time.Second {
			t.Errorf("Retry-After: 90 was followed by another attempt after %s", waited)
		}
		if got := n.Stats(); got.Delivered != 2 || got.Waiting != 0 || got.Dead != 0 || got.LastError != "" {
			t.Errorf("%+v", got)
		}
		if strings.Contains(strings.ReplaceAll(log.String(), "refused by http://hunter2", ""), "hunter2") {
			t.Errorf("a secret is in the log:\n%s", &log)
		}
	})
}

// TestDeadLetters gives up what a receiver will not take, at once or after TTL.
func TestDeadLetters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		r := &remote{answer: func(n int) (int, http.Header, error) {
			if n == 0 {
				return http.StatusUnprocessableEntity, nil, nil
			}
			return http.StatusInternalServerError, nil, nil
		}}
		n := mustNew(t, Config{Notes: notesIn(t, dir), Transport: r, TTL: time.Hour, Receivers: []Receiver{{Patterns: patterns(t, "*:*"), URL: "http://a.example"}}})
		stop := run(t, n)
		for _, tag := range []string{"v1", "v2"} {
			if err := n.Add(t.Context(), push(tag)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(2 * time.Hour)
		stop()
		if got := n.Stats(); got.Dead != 2 || got.Waiting != 0 || got.LastError != "the receiver answered 500" {
			t.Errorf("%+v", got)
		}
		if last := r.times[len(r.times)-1].Sub(r.times[1]); last > time.Hour {
			t.Errorf("the second event was tried for %s", last)
		}
		if dead, err := os.ReadDir(filepath.Join(dir, folder, deadDir)); err != nil || len(dead) != 2 {
			t.Errorf("dead letters kept: %v, %v", dead, err)
		}
	})
}

// TestRestart sends after a restart what was kept before, to those who are still
// to get it, and survives what a crash can leave.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		stays := Receiver{Patterns: patterns(t, "*:push"), URL: "http://stays.example"}
		goes := Receiver{Patterns: patterns(t, "*:*"), URL: "http://goes.example"}
		n := mustNew(t, Config{Notes: notesIn(t, dir), Receivers: []Receiver{stays, goes}})
		for i := range 12 {
			if err := n.Add(t.Context(), push(fmt.Sprintf("v%d", i))); err != nil {
				t.Fatal(err)
			}
		}
		if got := n.Stats().Waiting; got != 24 {
			t.Errorf("%d wait", got)
		}
		for name, content := range map[string]string{"9-cut.json.new": `{"specv`, "00000000000000000001-junk.json": "junk", "README": "mine"} {
			if err := os.WriteFile(filepath.Join(dir, folder, stays.id(), name), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		r := &remote{}
		n = mustNew(t, Config{Notes: notesIn(t, dir), Transport: r, Receivers: []Receiver{stays}})
		stop := run(t, n)
		time.Sleep(time.Minute)
		stop()
		var want []string
		for i := range 12 {
			want = append(want, fmt.Sprintf("team/app:v%d", i))
		}
		if diff := cmp.Diff(want, r.got()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if got := n.Stats(); got.Delivered != 12 || got.Waiting != 0 || got.Dead != 13 {
			t.Errorf("%+v", got)
		}
		if _, err := os.Stat(filepath.Join(dir, folder, stays.id(), "9-cut.json.new")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("what a crash left is still there: %v", err)
		}
	})
}

func TestTooMany(t *testing.T) {
	n := mustNew(t, Config{Notes: notesIn(t, t.TempDir()), Receivers: []Receiver{{Patterns: patterns(t, "*:*"), URL: "http://a.example"}}})
	n.spool.waiting[n.config.Receivers[0].id()] = maxWaiting
	if err := n.Add(t.Context(), push("v1")); err == nil || n.Stats().Dead != 1 {
		t.Errorf("error %v, %+v", err, n.Stats())
	}
}
