package trust

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// DefaultCertsDir is where containerd's packages look for hosts directories.
const DefaultCertsDir = "/etc/containerd/certs.d"

// defaultGrace is far longer than containerd needs from reading a hosts.toml to
// reading the CA files that it names.
const defaultGrace = 100 * time.Millisecond

// StoreConfig says where a node's file system is found.
type StoreConfig struct {
	// NodeRoot is the directory in which it is found. Empty: "/".
	NodeRoot string
	// CertsDir is containerd's hosts directory, inside NodeRoot. Empty:
	// DefaultCertsDir. Cleanup does not need it.
	CertsDir string
	// Grace is waited between the moment when no hosts.toml names a CA file any
	// more and its removal, for a containerd that has just read the old one.
	// Zero: 100 ms. Negative: none.
	Grace time.Duration
	// BeforeStep, if set, is called ahead of every single change on disk with
	// a description of it. Tests stop the process there.
	BeforeStep func(step string)
}

// State is all that a node should hold.
type State struct {
	// Registries to configure, each once. Those that a node still holds from
	// before and that are not among them are undone.
	Registries []Registry
	// SystemTrust puts the certificates of SystemCAs into the system's trust
	// store. False: none of ours are in there.
	SystemTrust bool
	SystemCAs   Bundle
	// HoldSystemTrust leaves the trust store as it is found, for now.
	HoldSystemTrust bool
}

// Registry is one directory of containerd's.
type Registry struct {
	Hosts Hosts
	// CAs are the files that Hosts names as CA, by name. None may be empty:
	// containerd fails every pull over an empty one.
	CAs map[string]Bundle
	// Hold leaves the registry's files as they are found, for now.
	Hold bool
}

// Result is what Apply and Cleanup did.
type Result struct {
	Changed []Change
	// Notes are what an operator should know though nothing failed.
	Notes []string
	// CertsDir is the hosts directory without symbolic links, inside the node
	// root, with a leading slash. Empty after a Cleanup, and if Apply did not
	// get as far.
	CertsDir string
}

// OwnerError is a fault that concerns one registry, or the system trust store,
// alone. All errors of an Apply that did the rest of its work are made of it;
// see [OwnerErrors].
type OwnerError struct {
	Owner string // as in Change
	Err   error
}

func (e *OwnerError) Error() string { return e.Owner + ": " + e.Err.Error() }

// Unwrap returns the fault.
func (e *OwnerError) Unwrap() error { return e.Err }

// ownerErrors is one line for all of them.
type ownerErrors []*OwnerError

func (e ownerErrors) Error() string {
	lines := make([]string, len(e))
	for i, one := range e {
		lines[i] = one.Error()
	}
	return strings.Join(lines, "; ")
}

func (e ownerErrors) Unwrap() []error {
	errs := make([]error, len(e))
	for i, one := range e {
		errs[i] = one
	}
	return errs
}

// OwnerErrors returns the parts of an error of Apply that left the rest of the
// work done, and nil for any other.
func OwnerErrors(err error) []*OwnerError {
	if all, ok := errors.AsType[ownerErrors](err); ok {
		return all
	}
	return nil
}

// Change is one file that was written or removed.
type Change struct {
	// Owner is the registry for which the file stands, or SystemTrustOwner.
	Owner string
	// Path inside the node root, with a leading slash.
	Path string
}

// SystemTrustOwner is the Owner of files in the system trust store.
const SystemTrustOwner = "system trust store"

// Store puts a [State] on a node and takes it off again. All that it does is in
// the record at [RecordPath] before it is done, so that a process killed at any
// moment leaves a node on which containerd reads every directory, and on which
// both Apply and Cleanup find their way. Processes exclude one another by a
// lock on the record's directory.
type Store struct {
	nodeRoot string
	certsDir string
	grace    time.Duration
	before   func(string)
	rebuild  rebuilder

	mu    sync.Mutex // held by one Apply or Cleanup; guards swept
	swept bool
}

// NewStore checks cfg and touches nothing.
func NewStore(cfg StoreConfig) (*Store, error) {
	s := &Store{nodeRoot: cfg.NodeRoot, certsDir: cfg.CertsDir, grace: cfg.Grace, before: cfg.BeforeStep, rebuild: rebuildOnNode}
	if s.nodeRoot == "" {
		s.nodeRoot = "/"
	}
	if s.certsDir == "" {
		s.certsDir = DefaultCertsDir
	}
	if s.grace == 0 {
		s.grace = defaultGrace
	}
	if slices.Contains(pathElements(s.certsDir), "..") || len(pathElements(s.certsDir)) == 0 || strings.ContainsRune(s.certsDir, 0) {
		return nil, fmt.Errorf("hosts directory %q: give a path inside the node root, without \"..\"", s.certsDir)
	}
	return s, nil
}

// CheckState reports what is wrong with a state, without looking at a node.
func CheckState(want State) error {
	seen := make(map[string]bool)
	for _, r := range want.Registries {
		name := r.Hosts.Registry
		if err := r.check(); err != nil {
			return fmt.Errorf("registry %q: %w", name, err)
		}
		if seen[name] {
			return fmt.Errorf("registry %q is configured twice: name it once", name)
		}
		seen[name] = true
	}
	return nil
}

func (r Registry) check() error {
	if err := r.Hosts.validate(); err != nil {
		return err
	}
	for name, b := range r.CAs {
		if err := checkCAName(name); err != nil {
			return err
		}
		if b.Empty() {
			return fmt.Errorf("CA file %q would be empty, and containerd would fail every pull: leave it out", name)
		}
	}
	for _, hop := range append(slices.Clone(r.Hosts.Hops), r.Hosts.Server) {
		if _, ok := r.CAs[hop.CA]; hop.CA != "" && !ok {
			return fmt.Errorf("CA file %q is named but not given", hop.CA)
		}
	}
	return nil
}

// Apply brings the node to want: what differs is written, what is no longer
// wanted undone. A registry whose directory cannot be used (a symbolic link, a
// file) is reported and left as it is, and the others are done; an error of the
// file system ends the work, with all that worked in place.
func (s *Store) Apply(ctx context.Context, want State) (Result, error) {
	if err := CheckState(want); err != nil {
		return Result{}, err
	}
	run, done, err := s.begin(ctx, true)
	if err != nil {
		return Result{}, s.explain(err)
	}
	defer done()
	err = run.apply(ctx, want)
	return run.result, s.explain(err)
}

// Cleanup undoes all that the record on the node holds, byte for byte. It may
// be repeated, and finishes what a killed process began. Files that somebody
// else has replaced since are left, with a note.
func (s *Store) Cleanup(ctx context.Context) (Result, error) {
	run, done, err := s.begin(ctx, false)
	if errors.Is(err, fs.ErrNotExist) && run != nil {
		// No record: at most, something half-made lies about.
		defer done()
		return run.result, s.explain(run.sweepAll())
	}
	if err != nil {
		return Result{}, s.explain(err)
	}
	defer done()
	err = run.cleanup(ctx)
	return run.result, s.explain(err)
}

// session is one Apply or Cleanup, holding the lock.
type session struct {
	*disk
	certs      string // the hosts directory, resolved; empty for Cleanup
	recordName string
	record     *record
	rebuild    rebuilder
	grace      time.Duration
	nodeRoot   string
	result     Result
	// interrupted says that the system trust store was being rebuilt, or about to
	// be, when an earlier session ended.
	interrupted bool
}

// begin opens the node root, takes the lock and loads the record. With create,
// the record's directory is made if it is missing; otherwise that gives
// fs.ErrNotExist, with a session that has no record.
func (s *Store) begin(ctx context.Context, create bool) (run *session, done func(), err error) {
	s.mu.Lock()
	release := []func(){s.mu.Unlock}
	end := func() {
		for _, f := range slices.Backward(release) {
			f()
		}
	}
	// Also when a test ends a step by a panic.
	begun := false
	defer func() {
		if !begun {
			end()
		}
	}()
	root, err := os.OpenRoot(s.nodeRoot)
	if err != nil {
		if !errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w: create the directory, or choose another with --node-root", err)
		}
		return nil, nil, err
	}
	release = append(release, func() { _ = root.Close() })
	run = &session{
		disk:     &disk{root: root, before: s.before},
		rebuild:  s.rebuild,
		grace:    s.grace,
		nodeRoot: s.nodeRoot,
	}
	if create {
		if err := run.locate(s.certsDir); err != nil {
			return nil, nil, err
		}
	}
	unlock, err := run.open(ctx, create)
	if err == nil {
		release = append(release, unlock)
		err = run.prepare(s, create)
	}
	if err == nil || !create && run.record == nil && errors.Is(err, fs.ErrNotExist) {
		begun = true
		return run, end, err
	}
	return nil, nil, err
}

// locate finds the hosts directory, before anything is touched.
func (s *session) locate(certsDir string) (err error) {
	if s.certs, err = s.resolve(certsDir); err != nil {
		return err
	}
	s.result.CertsDir = "/" + s.certs
	_, err = s.missing(s.certs)
	return err
}

// open takes the lock. Another process may remove the directory between two
// steps, at the end of its cleanup: then all begins anew.
func (s *session) open(ctx context.Context, create bool) (unlock func(), err error) {
	for range 20 {
		name, err := s.resolve(path.Dir(RecordPath))
		if err != nil {
			return nil, err
		}
		s.recordName = path.Join(name, path.Base(RecordPath))
		if create {
			if err := s.createRecord(name); err != nil {
				return nil, err
			}
		}
		unlock, err = s.lock(ctx, name)
		if err == nil || !create || !errors.Is(err, fs.ErrNotExist) {
			return unlock, err
		}
	}
	return nil, fmt.Errorf("/%s keeps vanishing: another process removes it", path.Dir(s.recordName))
}

// createRecord makes the record's directory together with the record that says
// so, in one step.
func (s *session) createRecord(dir string) error {
	chain, err := s.missing(dir)
	if err != nil || len(chain) == 0 {
		return err
	}
	empty := &record{Version: recordVersion, Directories: chain}
	data, err := empty.encode()
	if err != nil {
		return err
	}
	err = s.publish(chain, []plannedFile{{path: s.recordName, data: data, mode: 0o600}})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EWOULDBLOCK) {
		// Another process was faster, or swept ours away at its start. Taking
		// the lock will tell.
		return nil
	}
	return err
}

func (s *session) prepare(store *Store, create bool) (err error) {
	if s.record, err = loadRecord(s.disk, s.recordName); err != nil {
		return err
	}
	s.interrupted = s.record.Rebuild != rebuildNone
	if !create || !store.swept {
		if err := s.sweepAll(); err != nil {
			return err
		}
		store.swept = true
	}
	return nil
}

// sweepAll removes what killed processes left half-made, wherever they work.
// Without a record, and so without the lock, that can only be a directory on
// its way to hold the record, or on its way out.
func (s *session) sweepAll() error {
	all := &record{Directories: []string{path.Dir(path.Dir(s.recordName))}}
	if s.record != nil {
		all.Files = s.record.Files
		all.Directories = slices.Concat(s.record.Directories, []string{path.Dir(s.recordName), s.certs})
	}
	for _, dir := range all.directories() {
		info, err := s.root.Lstat(dir)
		if err != nil || !info.IsDir() {
			continue
		}
		if err := s.sweep(dir); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) apply(ctx context.Context, want State) error {
	plan, faults := s.plan(want)
	for _, dir := range plan.dirs {
		s.record.create(dir.missing)
		for _, f := range dir.files {
			s.record.put(dir.owner, f)
		}
	}
	s.record.Rebuild = s.record.Rebuild.and(plan.rebuild)
	if err := s.save(); err != nil {
		return err
	}
	for _, dir := range plan.dirs {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := s.write(dir); err != nil {
			return err
		}
	}
	if err := s.undoExcept(ctx, plan.keeps); err != nil {
		return err
	}
	if !want.HoldSystemTrust {
		if err := s.rebuildSystemTrust(ctx, plan.system); err != nil {
			faults = append(faults, &OwnerError{SystemTrustOwner, err})
		}
	}
	for _, dir := range plan.dirs {
		for _, f := range dir.files {
			s.record.settle(f)
		}
	}
	if err := s.save(); err != nil {
		return err
	}
	if len(faults) > 0 {
		return faults
	}
	return nil
}

// save writes the record if it has changed.
func (s *session) save() error {
	data, err := s.record.encode()
	if err != nil {
		return err
	}
	_, err = s.disk.write(s.recordName, data, 0o600)
	return err
}

// write puts one directory's files in place, hosts.toml last. A directory that
// does not exist appears with all of them at once: an empty one would hide
// _default, and one with nothing but a CA would lend that to the upstream.
func (s *session) write(dir plannedDir) error {
	if len(dir.missing) > 0 {
		missing, err := s.missing(dir.path)
		if err != nil {
			return err
		}
		if len(missing) > 0 {
			if err := s.publish(missing, dir.files); err != nil {
				return err
			}
			for _, f := range dir.files {
				s.changed(dir.owner, f.path)
			}
			return nil
		}
	}
	for _, f := range dir.files {
		changed, err := s.disk.write(f.path, f.data, f.mode)
		if err != nil {
			return err
		}
		if changed {
			s.changed(dir.owner, f.path)
		}
	}
	return nil
}

func (s *session) changed(owner, name string) {
	s.result.Changed = append(s.result.Changed, Change{Owner: owner, Path: "/" + name})
}

func (s *session) note(format string, args ...any) {
	s.result.Notes = append(s.result.Notes, fmt.Sprintf(format, args...))
}

// publish creates the directories of chain, parents first, with files in the
// last of them, by one rename of the first.
func (d *disk) publish(chain []string, files []plannedFile) error {
	temp := path.Join(path.Dir(chain[0]), tempName())
	if err := d.publishBy(temp, chain, files); err != nil {
		_ = d.root.RemoveAll(temp)
		return fmt.Errorf("creating %s: %w", chain[len(chain)-1], bare(err))
	}
	return nil
}

func (d *disk) publishBy(temp string, chain []string, files []plannedFile) error {
	top := chain[0]
	inside := func(name string) string { return path.Join(temp, strings.TrimPrefix(name, top)) }
	if err := d.mkdir(temp); err != nil {
		return err
	}
	// So that no other process sweeps it away.
	unlock, err := d.tryLock(temp)
	if err != nil {
		return err
	}
	defer unlock()
	for _, dir := range chain[1:] {
		if err := d.mkdir(inside(dir)); err != nil {
			return err
		}
	}
	for _, f := range files {
		if _, err := d.write(inside(f.path), f.data, f.mode); err != nil {
			return err
		}
	}
	for _, dir := range slices.Backward(chain) {
		if err := d.syncDir(inside(dir)); err != nil {
			return err
		}
	}
	d.step("rename into %s", top)
	if err := d.root.Rename(temp, top); err != nil {
		return err
	}
	d.step("sync the directory of %s", top)
	return d.syncDir(path.Dir(top))
}

// mkdir creates a directory whatever the umask.
func (d *disk) mkdir(name string) error {
	d.step("create the directory %s", name)
	if err := d.root.Mkdir(name, 0o755); err != nil {
		return err
	}
	return d.root.Chmod(name, 0o755)
}

// explain adds the remedy that fits an error of the file system.
func (s *Store) explain(err error) error {
	var remedy string
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrPermission):
		remedy = ": run as root, or choose a directory of your own with --node-root"
	case errors.Is(err, syscall.EROFS):
		remedy = ": the file system is read-only, mount it writable"
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		remedy = ": the file system is full, free some space; all that was there still is"
	}
	return fmt.Errorf("node root %s: %w%s", s.nodeRoot, err, remedy)
}
