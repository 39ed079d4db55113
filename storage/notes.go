package storage

import "context"

// Notes are small files that others keep beside what the Store stores, in a folder
// of their own: every process that uses the Store sees the same.
type Notes struct {
	medium notes
	folder string
}

// Notes returns the notes in a folder, which need not exist. Its name is a
// directory's name.
func (s *Store) Notes(folder string) Notes { return Notes{s.medium, folder} }

// Read returns what a note says. The error is fs.ErrNotExist when there is none.
func (n Notes) Read(ctx context.Context, name string) ([]byte, error) {
	return n.medium.readNote(ctx, n.path(name))
}

// Write puts a note in one step in the place of what there is, durably. Its name
// may have slashes inside, and must not begin with a dot.
func (n Notes) Write(ctx context.Context, name string, content []byte) error {
	return n.medium.writeNote(ctx, n.path(name), content, true)
}

// List returns the names of the notes below a path, which is empty or ends in a
// slash, sorted; folders there end in a slash.
func (n Notes) List(ctx context.Context, path string) ([]string, error) {
	infos, err := n.medium.listNotes(ctx, n.path(path))
	if err != nil {
		return nil, err
	}
	names := make([]string, len(infos))
	for i, info := range infos {
		names[i] = info.name
		if info.folder {
			names[i] += "/"
		}
	}
	return names, nil
}

// Remove removes a note, or a folder that is empty. What is not there is no error.
func (n Notes) Remove(ctx context.Context, name string) error {
	return n.medium.removeNote(ctx, n.path(name))
}

func (n Notes) path(name string) string {
	path := n.folder + "/" + name
	for path[len(path)-1] == '/' {
		path = path[:len(path)-1]
	}
	return path
}
