package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// lookInterval is for changes of the mounted configuration that the watch
	// does not see.
	lookInterval = 30 * time.Second
	// maxConfigBytes is what a ConfigMap can hold at most.
	maxConfigBytes = 1 << 20
)

// followFile tells what is in a file, now and after each change, until ctx ends.
// A mounted ConfigMap changes by a symbolic link in the file's directory, so it
// is that which is watched.
func followFile(ctx context.Context, file string, tell func(raw []byte, err error)) {
	var events <-chan fsnotify.Event
	watcher, err := fsnotify.NewWatcher()
	if err == nil {
		defer func() { _ = watcher.Close() }()
		events = watcher.Events
	}
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	for {
		if watcher != nil {
			// It may have been missing, or replaced, until now; if it cannot be
			// watched, there is still the ticker.
			_ = watcher.Add(filepath.Dir(file))
		}
		tell(readMounted(file))
		select {
		case <-ctx.Done():
			return
		case <-events:
			drain(ctx, events)
		case <-look.C:
		}
	}
}

// drain waits for the end of a burst.
func drain(ctx context.Context, events <-chan fsnotify.Event) {
	quiet := time.NewTimer(20 * time.Millisecond)
	defer quiet.Stop()
	for {
		select {
		case <-events:
		case <-quiet.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// readMounted reads the configuration that the kubelet brings.
func readMounted(file string) ([]byte, error) {
	raw, err := readLimited(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("the configuration %s is not there yet", file)
	case err != nil:
		return nil, fmt.Errorf("the configuration cannot be read: %w", err)
	}
	return raw, nil
}

func readLimited(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err != nil {
		return nil, err
	}
	if len(raw) > maxConfigBytes {
		return nil, fmt.Errorf("%s has more than %d bytes", file, maxConfigBytes)
	}
	return raw, nil
}

// sleep reports whether it was not cut short by the end of ctx.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// jitter returns between 80 and 100 per cent of d, so that a thousand agents do
// not come at once.
func jitter(d time.Duration) time.Duration {
	return d - time.Duration(rand.Int64N(int64(d)/5+1))
}
