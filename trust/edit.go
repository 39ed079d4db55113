package trust

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
)

// RuntimeOwner is the Owner of files that configure the container runtime.
const RuntimeOwner = "container runtime"

// Put writes a file that is none of a [State]'s, such as a part of the
// container runtime's configuration, with what stood there before in the
// record: Apply leaves it alone, Undo and Cleanup put back what was there,
// unless somebody has changed it since. Directories are made as needed. changed
// is false if the file already holds data.
func (s *Store) Put(ctx context.Context, name string, data []byte, mode fs.FileMode) (changed bool, err error) {
	run, done, err := s.begin(ctx, true)
	if err != nil {
		return false, s.explain(err)
	}
	defer done()
	if name, err = run.resolve(name); err == nil {
		err = run.put(name, data, mode)
	}
	return len(run.result.Changed) > 0, s.explain(err)
}

// Undo takes back a Put. A file that was never put, or that somebody has
// changed since, is left, and the latter noted in the result.
func (s *Store) Undo(ctx context.Context, name string) (Result, error) {
	run, done, err := s.begin(ctx, true)
	if err != nil {
		return Result{}, s.explain(err)
	}
	defer done()
	if name, err = run.resolve(name); err == nil {
		err = run.undoExcept(ctx, func(f *recordedFile) bool { return f.Path != name || f.Owner != RuntimeOwner })
	}
	return run.result, s.explain(errors.Join(err, run.save()))
}

func (s *session) put(name string, data []byte, mode fs.FileMode) error {
	before, err := s.former(name)
	if err != nil {
		return err
	}
	rec := s.record.file(name)
	if rec != nil && (before == nil || rec.wrote(before.Data)) {
		before = rec.Before
	}
	dir := plannedDir{owner: RuntimeOwner, path: path.Dir(name)}
	if dir.missing, err = s.missing(dir.path); err != nil {
		return err
	}
	dir.files = []plannedFile{{path: name, data: data, mode: mode, before: before}}
	s.record.create(dir.missing)
	s.record.put(RuntimeOwner, dir.files[0])
	if err := s.save(); err != nil {
		return err
	}
	if err := s.write(dir); err != nil {
		return err
	}
	s.record.settle(dir.files[0])
	return s.save()
}

// wrote reports whether data is what we have written there.
func (f *recordedFile) wrote(data []byte) bool { return slices.Contains(f.SHA256, hash(data)) }

// ReadFile reads a file inside a node root as a process would for which root is
// "/", whatever links lead to it. One that is no regular file, or larger than
// 4 MiB, is an error.
func ReadFile(root *os.Root, name string) ([]byte, error) {
	d := &disk{root: root}
	name, err := d.resolve(name)
	if err != nil {
		return nil, err
	}
	return d.read(name)
}

// ResolvePath returns name, a path inside a node root, without symbolic links:
// relative to the root, as a process sees it for which root is "/". What does
// not exist stays as it is.
func ResolvePath(root *os.Root, name string) (string, error) {
	return (&disk{root: root}).resolve(name)
}
