package trust

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"
)

// cleanup undoes the whole record. Until its last step the record stays, so a
// killed cleanup is finished by the next one.
func (s *session) cleanup(ctx context.Context) error {
	if slices.ContainsFunc(s.record.Files, func(f *recordedFile) bool { return f.Owner == SystemTrustOwner }) {
		s.record.Rebuild = rebuildFresh
		if err := s.save(); err != nil {
			return err
		}
	}
	if err := s.undoExcept(ctx, func(*recordedFile) bool { return false }); err != nil {
		return err
	}
	if err := s.rebuildSystemTrust(ctx, nil); err != nil {
		return err
	}
	return s.removeRecord()
}

// undoExcept undoes the recorded files that keep does not claim, and the
// directories that were created for them. First no hosts.toml names them any
// more, then, after the grace, they go.
func (s *session) undoExcept(ctx context.Context, keep func(*recordedFile) bool) error {
	byDir := make(map[string][]*recordedFile)
	for _, f := range s.record.Files {
		if !keep(f) {
			byDir[path.Dir(f.Path)] = append(byDir[path.Dir(f.Path)], f)
		}
	}
	dirs := slices.SortedFunc(maps.Keys(byDir), comparePaths)
	waits := false
	for _, dir := range dirs {
		loosened, err := s.loosen(dir, byDir)
		if err != nil {
			return err
		}
		waits = waits || loosened
	}
	if waits {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(s.grace):
		}
	}
	for _, dir := range dirs {
		if err := s.undoDirectory(dir, byDir[dir]); err != nil {
			return err
		}
	}
	return s.removeEmptyDirectories()
}

// loosen makes the hosts.toml in dir name none of the files that are to go, and
// reports whether any of them may have been named just before.
func (s *session) loosen(dir string, byDir map[string][]*recordedFile) (loosened bool, err error) {
	files := byDir[dir]
	if files[0].Owner == SystemTrustOwner || files[0].Owner == RuntimeOwner {
		return false, nil
	}
	if !s.isWhollyOurs(dir, files) {
		for i, f := range files {
			if path.Base(f.Path) == hostsFile {
				byDir[dir] = slices.Delete(files, i, i+1)
				return true, s.undoAndDrop(f)
			}
		}
		return true, nil
	}
	// The directory will go as a whole, and with it the CA from under a
	// hosts.toml that containerd has just read. If nothing takes its place,
	// the same can be said without a CA before; only a _default cannot.
	fallback := path.Join(path.Dir(dir), DefaultHost)
	if _, goes := byDir[fallback]; !goes || !s.record.created(fallback) {
		if _, err := s.root.Lstat(fallback); !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
	}
	for _, f := range files {
		if path.Base(f.Path) == hostsFile {
			return s.disk.write(f.Path, []byte(header+"\n[host]\n"), 0o644)
		}
	}
	return false, nil
}

// undoDirectory undoes files after loosen.
func (s *session) undoDirectory(dir string, files []*recordedFile) error {
	if s.isWhollyOurs(dir, files) {
		retired, err := s.retire(dir, func() bool { return s.isWhollyOurs(dir, files) })
		if err != nil {
			return err
		}
		if retired {
			for _, f := range files {
				s.changed(f.Owner, f.Path)
				s.record.drop(f.Path)
			}
			return nil
		}
	}
	for _, f := range files {
		if err := s.undoAndDrop(f); err != nil {
			return err
		}
	}
	return nil
}

// isWhollyOurs reports whether a directory was created by us and holds nothing
// but files, all of them ours.
func (s *session) isWhollyOurs(dir string, files []*recordedFile) bool {
	names, err := s.list(dir)
	if err != nil || !s.record.created(dir) {
		return false
	}
	for _, name := range names {
		i := slices.IndexFunc(files, func(f *recordedFile) bool { return f.Path == path.Join(dir, name) })
		if i < 0 || files[i].Before != nil {
			return false
		}
		if name == hostsFile || files[i].Owner == RuntimeOwner {
			now, err := s.former(files[i].Path)
			if err != nil || !files[i].isOurs(now.Data) {
				return false
			}
		}
	}
	return true
}

// retire removes a directory with all that is in it, by renaming it away first:
// containerd must never see it half empty. still is asked right before. A
// directory that cannot be renamed, since something is mounted there, is left
// and retired is false.
func (d *disk) retire(dir string, still func() bool) (retired bool, err error) {
	temp := path.Join(path.Dir(dir), tempName())
	d.step("rename %s away", dir)
	if !still() {
		return false, nil
	}
	err = d.root.Rename(dir, temp)
	if errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.EXDEV) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	d.step("sync the directory of %s", dir)
	if err := d.syncDir(path.Dir(dir)); err != nil {
		return false, err
	}
	d.step("remove what was %s", dir)
	return true, d.root.RemoveAll(temp)
}

func (s *session) undoAndDrop(f *recordedFile) error {
	if err := s.undo(f); err != nil {
		return err
	}
	s.record.drop(f.Path)
	return nil
}

// undo puts back what stood at a file's place.
func (s *session) undo(f *recordedFile) error {
	isHosts := path.Base(f.Path) == hostsFile
	now, err := s.former(f.Path)
	if errors.Is(err, errNotFile) {
		s.note("/%s is no longer a file: it is left as it is", f.Path)
		return nil
	}
	if err != nil {
		return err
	}
	switch {
	case f.Owner == RuntimeOwner && (now == nil || !f.isOurs(now.Data)):
		// What the runtime is told by somebody else is theirs.
		if f.Before == nil != (now == nil) || now != nil && !bytes.Equal(now.Data, f.Before.Data) {
			s.note("/%s was changed by somebody: it is left as it is", f.Path)
		}
		return nil
	case isHosts && now != nil && !f.isOurs(now.Data):
		if f.Before == nil || !bytes.Equal(now.Data, f.Before.Data) {
			s.note("/%s was replaced by somebody: it is left as it is", f.Path)
		}
		return nil
	case f.Before != nil:
		return s.restore(f)
	case now == nil:
		return nil
	case !isHosts && s.isNamed(f.Path):
		s.note("/%s is left, since the hosts.toml beside it names it", f.Path)
		return nil
	}
	if _, err := s.remove(f.Path); err != nil {
		return err
	}
	s.changed(f.Owner, f.Path)
	return nil
}

// restore writes the former file with its mode and owner.
func (s *session) restore(f *recordedFile) error {
	missing, err := s.missing(path.Dir(f.Path))
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		s.note("/%s is not put back, since its directory was removed", f.Path)
		return nil
	}
	changed, err := s.restoreContent(f.Path, f.Before)
	if err != nil {
		return err
	}
	err = s.root.Lchown(f.Path, f.Before.UID, f.Before.GID)
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	if changed {
		s.changed(f.Owner, f.Path)
	}
	return nil
}

func (s *session) restoreContent(name string, before *formerFile) (changed bool, err error) {
	if before.Link == "" {
		return s.disk.write(name, before.Data, before.Mode)
	}
	if target, err := s.root.Readlink(name); err == nil && target == before.Link {
		return false, nil
	}
	return true, s.symlink(before.Link, name)
}

// isNamed reports whether a hosts.toml beside the file names it.
func (s *session) isNamed(name string) bool {
	text, err := s.read(path.Join(path.Dir(name), hostsFile))
	return err == nil && bytes.Contains(text, []byte(path.Base(name)))
}

// removeEmptyDirectories removes what was created and serves no recorded file
// any more. One that is not empty has become somebody's.
func (s *session) removeEmptyDirectories() error {
	for _, dir := range slices.Backward(slices.Clone(s.record.Directories)) {
		if s.isUsed(dir) {
			continue
		}
		if _, err := s.remove(dir); err != nil {
			if !isOccupied(err) {
				return err
			}
			s.note("/%s is left, since it is not empty or is in use", dir)
		}
		s.record.forgetDirectory(dir)
	}
	return nil
}

func (s *session) isUsed(dir string) bool {
	below := func(name string) bool { return strings.HasPrefix(name, dir+"/") }
	return below(s.recordName) || slices.ContainsFunc(s.record.Files, func(f *recordedFile) bool { return below(f.Path) })
}

func isOccupied(err error) bool {
	return errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST) ||
		errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.ENOTDIR)
}

// removeRecord is the end of a cleanup: the record goes, in one step with the
// directories that were created for it.
func (s *session) removeRecord() error {
	top, child := "", path.Base(s.recordName)
	for dir := path.Dir(s.recordName); s.record.created(dir); dir = path.Dir(dir) {
		names, err := s.list(dir)
		if err != nil {
			return err
		}
		if len(names) != 1 || names[0] != child {
			break
		}
		top, child = dir, path.Base(dir)
	}
	if top != "" {
		retired, err := s.retire(top, func() bool { return true })
		if retired || err != nil {
			return err
		}
	}
	_, err := s.remove(s.recordName)
	return err
}
