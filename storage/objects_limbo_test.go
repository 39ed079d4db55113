package storage

import (
	"context"
	"errors"
	"io/fs"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/storage/internal/membucket"
)

// meeting is a link that was condemned long ago, a client that relies on it, and a
// collector that is about to delete it.
type meeting struct {
	t         *testing.T
	bucket    *membucket.Bucket
	objects   *objects
	link      link
	cutoff    time.Time
	client    context.Context
	collector context.Context
	met       atomic.Bool
}

// meet runs a meeting. prepare says where whom is interrupted, and what happens
// meanwhile.
func meet(t *testing.T, prepare func(m *meeting), run func(m *meeting)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m := &meeting{t: t, bucket: new(membucket.Bucket)}
		s := openWith(t, Config{Bucket: m.bucket})
		m.objects = s.medium.(*objects)
		d := digest.FromString("layer")
		m.link = link{name: d, path: linkPath(repositoriesRoot+"app/_layers/", d), target: d}
		if _, err := m.objects.putLink(t.Context(), m.link.path, d); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if _, err := m.objects.condemn(t.Context(), m.link); err != nil {
			t.Fatal(err)
		}
		m.cutoff = time.Now()
		time.Sleep(time.Hour)
		m.client, m.collector = new(process).as(t.Context()), new(process).as(t.Context())
		prepare(m)
		run(m)
		if !m.met.Load() {
			t.Error("they have not met")
		}
	})
}

// when makes a hook that does something at the first call that a process makes of
// a method with the link.
func (m *meeting) when(who context.Context, method string, do func(ctx context.Context) error) membucket.Hook {
	return func(ctx context.Context, called, key string) error {
		if called != method || key != objectKey(m.link.path) || ctx.Value(processKey{}) != who.Value(processKey{}) || m.met.Swap(true) {
			return nil
		}
		return do(ctx)
	}
}

func (m *meeting) reap() (bool, error) {
	return m.objects.reap(m.collector, []link{m.link}, m.cutoff)
}

func (m *meeting) there() bool {
	_, err := m.objects.readLink(m.t.Context(), m.link.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.t.Error(err)
	}
	return err == nil
}

// Who makes a link anew that is being deleted waits, and makes it after.
func TestObjectsLinkMadeWhileReaped(t *testing.T) {
	var made chan error
	meet(t, func(m *meeting) {
		made = make(chan error, 1)
		m.bucket.Before = m.when(m.collector, "Delete", func(context.Context) error {
			go func() {
				_, err := m.objects.putLink(m.client, m.link.path, m.link.target)
				made <- err
			}()
			time.Sleep(3 * time.Second)
			return nil
		})
	}, func(m *meeting) {
		if _, err := m.reap(); err != nil {
			t.Error(err)
		}
		if err := <-made; err != nil || !m.there() {
			t.Errorf("made, and there: %v, %v", m.there(), err)
		}
	})
}

// Who has renewed a link, and does not know yet what its tombstone says, is seen to
// have.
func TestObjectsLinkRenewedBeforeReaped(t *testing.T) {
	meet(t, func(m *meeting) {
		m.bucket.After = m.when(m.client, "Put", func(context.Context) error {
			if reaped, err := m.reap(); reaped || err != nil {
				t.Errorf("deleted: %v, %v", reaped, err)
			}
			return nil
		})
	}, func(m *meeting) {
		if err := m.objects.renew(m.client, m.link.path); err != nil || !m.there() {
			t.Errorf("renewed, and there: %v, %v", m.there(), err)
		}
	})
}

// A link that was deleted after it was looked at does not come back by being
// renewed.
func TestObjectsLinkRenewedAfterReaped(t *testing.T) {
	meet(t, func(m *meeting) {
		m.bucket.After = m.when(m.client, "Open", func(context.Context) error {
			if reaped, err := m.reap(); !reaped || err != nil {
				t.Errorf("deleted: %v, %v", reaped, err)
			}
			return nil
		})
	}, func(m *meeting) {
		if err := m.objects.renew(m.client, m.link.path); !errors.Is(err, fs.ErrNotExist) || m.there() {
			t.Errorf("there: %v, renewed: %v", m.there(), err)
		}
	})
}

// A collector that comes to its senses late, when others have stopped waiting for
// it, deletes nothing.
func TestObjectsLateReaper(t *testing.T) {
	meet(t, func(m *meeting) {
		m.bucket.Before = m.when(m.collector, "Delete", func(ctx context.Context) error {
			if !sleep(ctx, 3*reapTime) {
				return context.Cause(ctx)
			}
			return nil
		})
	}, func(m *meeting) {
		reaped := make(chan bool)
		go func() {
			ok, _ := m.reap() // it ran out of time
			reaped <- ok
		}()
		time.Sleep(reapTime + 10*time.Second)
		if err := m.objects.renew(m.client, m.link.path); err != nil {
			t.Error(err)
		}
		if <-reaped || !m.there() {
			t.Error("it was deleted after it was renewed")
		}
	})
}

// What one collector is deleting, another does not.
func TestObjectsTombstoneOfAnother(t *testing.T) {
	meet(t, func(m *meeting) { m.met.Store(true) }, func(m *meeting) {
		r := m.objects.reaper(m.collector)
		defer r.release()
		if ok, err := r.claim([]string{m.link.path}); !ok || err != nil {
			t.Fatalf("claimed: %v, %v", ok, err)
		}
		if ok, err := m.objects.reaper(m.client).claim([]string{m.link.path}); ok || err != nil {
			t.Errorf("claimed twice: %v, %v", ok, err)
		}
		g, err := m.objects.grave(t.Context(), m.link.path)
		if err != nil || g.State != stateReaping {
			t.Errorf("%+v, %v", g, err)
		}
		if _, err := m.objects.bury(t.Context(), m.link.path, stateRescued, grave{version: "another"}); !errors.Is(err, bucket.ErrCondition) {
			t.Error(err)
		}
	})
}
