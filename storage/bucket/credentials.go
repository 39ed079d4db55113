package bucket

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// maxCredential is more than any credential has, in bytes.
const maxCredential = 64 << 10

// recheck is how often the files with credentials are looked at.
const recheck = 5 * time.Second

// reloading is something made of the files of a directory, and made again when
// they change. While they cannot be read, what was made last is good.
type reloading[T any] struct {
	dir   string
	names []string
	make  func(files map[string]string) (T, error)

	mu      sync.Mutex
	checked time.Time
	files   map[string]string
	made    *T
}

func (r *reloading[T]) get() (T, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.made != nil && time.Since(r.checked) < recheck {
		return *r.made, nil
	}
	made, err := r.load()
	if err != nil && r.made == nil {
		var none T
		return none, err
	}
	if err == nil {
		r.made = made
	}
	r.checked = time.Now()
	return *r.made, nil
}

func (r *reloading[T]) load() (*T, error) {
	files := map[string]string{}
	for _, name := range r.names {
		data, err := os.ReadFile(filepath.Join(r.dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("credentials: %w", err)
		}
		if len(data) > maxCredential {
			return nil, fmt.Errorf("credentials: %s/%s has more than %d bytes: put the credential alone there", r.dir, name, maxCredential)
		}
		if text := strings.TrimSpace(string(data)); text != "" {
			files[name] = text
		}
	}
	if r.made != nil && maps.Equal(files, r.files) {
		return r.made, nil
	}
	made, err := r.make(files)
	if err != nil {
		return nil, fmt.Errorf("credentials: %s: %w", r.dir, err)
	}
	r.files = files
	return &made, nil
}
