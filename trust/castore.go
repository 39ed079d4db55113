package trust

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"
)

// rebuildTime bounds one run of the node's own program, hooks included: the
// Java key store takes some seconds, a hanging hook must not hold us for ever.
const rebuildTime = time.Minute

// systemStore is how a family of distributions keeps its trusted certificates.
type systemStore struct {
	// program is the node's own; it also runs the hooks that other packages
	// have put there.
	program string
	update  []string // arguments to add
	fresh   []string // arguments to remove
	// dir is for the administrator's certificates, one per file: a file with
	// several gets no hash link on Debian.
	dir    string
	bundle string
	// partial is where the program puts the bundle together. Debian's appends to
	// what a run that was killed has left there. Empty: it does not matter.
	partial string
}

// systemStores are tried in this order. Alpine is as Debian; Azure Linux and
// Fedora are as RHEL.
var systemStores = [...]systemStore{
	{
		program: "/usr/sbin/update-ca-certificates",
		// Without --fresh, Debian's leaves the links of removed files behind.
		fresh:   []string{"--fresh"},
		dir:     "/usr/local/share/ca-certificates",
		bundle:  "/etc/ssl/certs/ca-certificates.crt",
		partial: "/etc/ssl/certs/ca-certificates.crt.new",
	},
	{
		program: "/usr/bin/update-ca-trust",
		update:  []string{"extract"},
		fresh:   []string{"extract"},
		dir:     "/etc/pki/ca-trust/source/anchors",
		bundle:  "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
	},
}

// rebuildKind is how much of the store has to be made anew.
type rebuildKind string

const (
	rebuildNone   rebuildKind = ""
	rebuildUpdate rebuildKind = "update" // certificates were added
	rebuildFresh  rebuildKind = "fresh"  // certificates were removed
)

func (k rebuildKind) and(o rebuildKind) rebuildKind {
	if k == rebuildFresh || o == rebuildFresh {
		return rebuildFresh
	}
	return max(k, o)
}

// rebuilder runs a program of the node's in its root, and returns what it said.
type rebuilder func(ctx context.Context, nodeRoot string, argv []string) (output string, err error)

// errNotRun says that the program could not even be tried.
var errNotRun = errors.New("only root can run a program inside another node root")

// systemStore returns what is on the node, nil if nothing known is.
func (s *session) systemStore() *systemStore {
	for _, store := range systemStores {
		name, err := s.resolve(store.program)
		if err != nil {
			continue
		}
		if info, err := s.root.Lstat(name); err == nil && info.Mode().IsRegular() {
			return &store
		}
	}
	return nil
}

func (s *session) planSystemTrust(want State, p *plan) error {
	dir := plannedDir{owner: SystemTrustOwner}
	if want.SystemTrust && !want.SystemCAs.Empty() {
		p.system = s.systemStore()
		if p.system == nil {
			s.note("no known system trust store on this node: pulls do not need it, other programs have to be given the CA by other means")
		} else {
			var err error
			if dir, err = s.planSystemFiles(*p.system, want.SystemCAs); err != nil {
				return err
			}
			p.dirs = append(p.dirs, dir)
			p.rebuild = s.needsUpdate(*p.system, dir)
		}
	}
	for _, f := range s.record.Files {
		if f.Owner == SystemTrustOwner && !slices.ContainsFunc(dir.files, func(w plannedFile) bool { return w.path == f.Path }) {
			p.rebuild = rebuildFresh
		}
	}
	return nil
}

// planSystemFiles names files by fingerprint: the same name with new content
// would leave Debian's hash links stale.
func (s *session) planSystemFiles(store systemStore, cas Bundle) (dir plannedDir, err error) {
	dir.owner = SystemTrustOwner
	if dir.path, err = s.resolve(store.dir); err != nil {
		return dir, err
	}
	if dir.missing, err = s.missing(dir.path); err != nil {
		return dir, err
	}
	for _, cert := range cas.certs {
		name := foreignPrefix + hash(cert.Raw)[:32] + ".crt"
		dir.files = append(dir.files, plannedFile{path: path.Join(dir.path, name), data: encodeCertificate(cert), mode: 0o644})
	}
	return dir, nil
}

func (s *session) needsUpdate(store systemStore, dir plannedDir) rebuildKind {
	for _, f := range dir.files {
		if now, err := s.former(f.path); err != nil || now == nil || !bytes.Equal(now.Data, f.data) {
			return rebuildUpdate
		}
	}
	if s.checkBundle(store, dir.files) != nil {
		return rebuildUpdate
	}
	return rebuildNone
}

// rebuildSystemTrust runs the node's program if that is due, and makes sure
// that the bundle holds our certificates afterwards. The lock on the record
// serialises it: the program itself has none, and two runs at once mix up the
// bundle.
func (s *session) rebuildSystemTrust(ctx context.Context, store *systemStore) error {
	if s.record.Rebuild == rebuildNone {
		return nil
	}
	if store == nil {
		if store = s.systemStore(); store == nil {
			s.record.Rebuild = rebuildNone
			return nil
		}
	}
	argv := append([]string{store.program}, store.update...)
	if s.record.Rebuild == rebuildFresh {
		argv = append([]string{store.program}, store.fresh...)
	}
	if err := s.clearPartial(*store); err != nil {
		return err
	}
	// It takes seconds; to kill it at the end of ctx would leave it half done.
	limited, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), rebuildTime, fmt.Errorf("it took longer than %s", rebuildTime))
	defer cancel()
	output, err := s.rebuild(limited, s.nodeRoot, argv)
	if errors.Is(err, errNotRun) {
		s.note("system trust store: %s was not run, since %v: run it there as root", strings.Join(argv, " "), err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("running %s: %w: %s", strings.Join(argv, " "), err, lastLine(output))
	}
	var ours []plannedFile
	for _, f := range s.record.Files {
		if f.Owner == SystemTrustOwner {
			data, err := s.read(f.Path)
			if err != nil {
				return err
			}
			ours = append(ours, plannedFile{data: data})
		}
	}
	if err := s.checkBundle(*store, ours); err != nil {
		return fmt.Errorf("%s ran, but %w: %s", strings.Join(argv, " "), err, lastLine(output))
	}
	s.record.Rebuild = rebuildNone
	return nil
}

// clearPartial removes what a run that was killed has left: ours, if one was due
// before this session, or anybody's that has stopped growing long ago.
func (s *session) clearPartial(store systemStore) error {
	if store.partial == "" {
		return nil
	}
	dir, err := s.resolve(path.Dir(store.partial))
	if err != nil {
		return err
	}
	name := path.Join(dir, path.Base(store.partial))
	info, err := s.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !s.interrupted && time.Since(info.ModTime()) < rebuildTime {
		return nil // somebody else's run is under way
	}
	return s.root.Remove(name)
}

// checkBundle makes sure that each file's certificate is in the bundle.
func (s *session) checkBundle(store systemStore, files []plannedFile) error {
	name, err := s.resolve(store.bundle)
	if err != nil {
		return err
	}
	bundle, err := s.read(name)
	if err != nil {
		return err
	}
	// Programs break lines as they like.
	flat := bytes.ReplaceAll(bytes.ReplaceAll(bundle, []byte("\n"), nil), []byte("\r"), nil)
	for _, f := range files {
		block, _ := pem.Decode(f.data)
		if block == nil || !bytes.Contains(flat, []byte(base64.StdEncoding.EncodeToString(block.Bytes))) {
			return fmt.Errorf("%s lacks a certificate of the connected registry", store.bundle)
		}
	}
	return nil
}

// lastLine is the end of what a program said, fit for one line of a message.
func lastLine(output string) string {
	lines := strings.Split(strings.TrimSpace(output), "\n")
	line := plainLine(lines[len(lines)-1])
	if line == "" {
		return "it said nothing"
	}
	const limit = 300
	if len(line) > limit {
		line = strings.ToValidUTF8(line[:limit], "") + "…"
	}
	return line
}

// rebuildOnNode runs argv with the node root as its root. At the end of ctx the
// program goes with all that it started.
func rebuildOnNode(ctx context.Context, nodeRoot string, argv []string) (output string, err error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "HOME=/"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if path.Clean(nodeRoot) != "/" {
		if os.Geteuid() != 0 {
			return "", errNotRun
		}
		cmd.SysProcAttr.Chroot = nodeRoot
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return string(out), err
}
