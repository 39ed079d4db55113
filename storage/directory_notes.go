package storage

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// newPrefix begins the name of a note that is being written.
const newPrefix = ".new-"

func (m *directory) notePath(name string) string {
	return filepath.Join(m.root, filepath.FromSlash(name))
}

func (m *directory) readNote(_ context.Context, name string) ([]byte, error) {
	return os.ReadFile(m.notePath(name))
}

func (m *directory) writeNote(_ context.Context, name string, content []byte, durable bool) error {
	file := m.notePath(name)
	f, err := m.createIn(filepath.Dir(file))
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if durable {
		err = errors.Join(err, f.Sync())
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		os.Remove(f.Name())
		return err
	}
	if durable {
		return syncDir(filepath.Dir(file))
	}
	return nil
}

// createIn creates a file in a directory that may not be there yet. One that is
// part of the layout was there: where it is not, the volume is not.
func (m *directory) createIn(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, newPrefix+"*")
	if errors.Is(err, fs.ErrNotExist) && !m.inLayout(dir) {
		if err = mkdirDurable(dir); err == nil {
			f, err = os.CreateTemp(dir, newPrefix+"*")
		}
	}
	return f, err
}

func (m *directory) inLayout(dir string) bool {
	rel, err := filepath.Rel(m.root, dir)
	return err == nil && (rel == "." || slices.Contains(layoutDirs, rel))
}

func (m *directory) moveNote(ctx context.Context, from, to string, content []byte) error {
	err := os.Rename(m.notePath(from), m.notePath(to))
	if errors.Is(err, fs.ErrNotExist) { // or it has nowhere to go yet
		if err := m.writeNote(ctx, to, content, true); err != nil {
			return err
		}
		return m.removeNote(ctx, from)
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(m.notePath(to)))
}

func (m *directory) removeNote(_ context.Context, name string) error {
	return ignoreAbsent(os.Remove(m.notePath(name)))
}

func (m *directory) listNotes(_ context.Context, folder string) ([]noteInfo, error) {
	dir := m.notePath(folder)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) && !m.inLayout(dir) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	notes := make([]noteInfo, 0, len(entries))
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") { // being written
			notes = append(notes, noteInfo{entry{e.Name(), e.IsDir()}, modifiedOf(e)})
		}
	}
	return notes, nil
}
