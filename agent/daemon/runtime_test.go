package daemon

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
)

// lookedAt is a runtime that counts looks; one that is allowed lasts until its
// context ends.
type lookedAt struct {
	looks, changes atomic.Int64
}

func (l *lookedAt) Look(ctx context.Context, allowed bool, _ Turn) (RuntimeFindings, error) {
	l.looks.Add(1)
	if !allowed {
		return RuntimeFindings{Report: `{"verdict":"fault"}`}, errors.New("left to do")
	}
	l.changes.Add(1)
	<-ctx.Done()
	return RuntimeFindings{}, ctx.Err()
}

// TestRuntimeWatch: a fault is looked at again, leave to change the runtime is
// taken up at once, and leaving ends what is under way.
func TestRuntimeWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		runtime := &lookedAt{}
		in := newInputs()
		w := &runtimeWatch{runtime: runtime, tell: in.runtimeIs, woken: make(chan struct{}, 1)}
		if got := w.first(t.Context()); got.Report == "" || got.err == nil {
			t.Errorf("the first look gave %+v", got)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			w.run(ctx)
		}()
		time.Sleep(4 * runtimeRetry)
		synctest.Wait()
		if n := runtime.looks.Load(); n < 3 || n > 6 {
			t.Errorf("%d looks in four minutes", n)
		}
		if got := in.take().runtime; got == nil || got.Report == "" || got.err == nil {
			t.Errorf("told %+v", got)
		}
		w.allow(true)
		synctest.Wait()
		if n := runtime.changes.Load(); n != 1 {
			t.Fatalf("%d changes after leave to change, want 1", n)
		}
		w.leave()
		looks := runtime.looks.Load()
		time.Sleep(time.Hour)
		if n := runtime.looks.Load(); n != looks {
			t.Errorf("%d looks after leaving", n-looks)
		}
		w.allow(false)
		synctest.Wait()
		if n := runtime.looks.Load(); n == looks {
			t.Error("no look after staying")
		}
		cancel()
		<-ended
	})
}

// TestTurn: a Lease is taken by one node until it runs out or is given back.
func TestTurn(t *testing.T) {
	now := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	lease := &coordinationv1.Lease{Spec: turnSpec("a", now, turnDuration)}
	for _, test := range []struct {
		node  string
		after time.Duration
		taken bool
	}{
		{"b", 0, true},
		{"b", turnDuration - time.Second, true},
		{"b", turnDuration, false},
		{"a", 0, false},
	} {
		if got := isTaken(lease, test.node, now.Add(test.after)); got != test.taken {
			t.Errorf("for %s after %v: taken %v, want %v", test.node, test.after, got, test.taken)
		}
	}
	lease.Spec = turnSpec("a", now.Add(-time.Second), time.Second)
	if isTaken(lease, "b", now) {
		t.Error("taken although it was given back")
	}
	if isTaken(&coordinationv1.Lease{}, "b", now) {
		t.Error("taken although nobody ever had it")
	}
}
