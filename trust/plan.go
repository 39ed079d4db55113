package trust

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"syscall"
)

const (
	hostsFile = "hosts.toml"
	// foreignPrefix begins the names of our CA files in a directory that is
	// not ours, where they must neither replace an operator's nor be read by
	// containerd as long as no hosts.toml names them: hence .pem, not .crt.
	foreignPrefix = "connected-registry-"
	// keptPrefix begins the names of copies of an operator's CA files.
	keptPrefix = "kept-"
)

// plannedFile is a file as it should be.
type plannedFile struct {
	path   string
	data   []byte
	mode   fs.FileMode
	before *formerFile // what has to come back at the end
}

// plannedDir is a directory of which files are ours, in the order of writing.
type plannedDir struct {
	owner   string
	path    string
	missing []string // directories to create, parents first
	files   []plannedFile
}

type plan struct {
	dirs []plannedDir
	// held are owners whose files are to be left as they are.
	held []string
	// system is the node's trust store, nil if it is unknown or not used.
	system *systemStore
	// rebuild says how the trust store's bundle has to be made anew.
	rebuild rebuildKind
}

// keeps reports whether a recorded file is still wanted.
func (p plan) keeps(f *recordedFile) bool {
	if f.Owner == RuntimeOwner || slices.Contains(p.held, f.Owner) {
		return true
	}
	return slices.ContainsFunc(p.dirs, func(d plannedDir) bool {
		return slices.ContainsFunc(d.files, func(want plannedFile) bool { return want.path == f.Path })
	})
}

// plan reads the node and decides; it changes nothing there. What cannot be done
// is held and reported.
func (s *session) plan(want State) (p plan, faults ownerErrors) {
	for _, r := range want.Registries {
		name := r.Hosts.Registry
		if r.Hold {
			p.held = append(p.held, name)
			continue
		}
		dir, err := s.planRegistry(r)
		if err != nil {
			p.held = append(p.held, name)
			faults = append(faults, &OwnerError{name, err})
			continue
		}
		p.dirs = append(p.dirs, dir)
	}
	if want.HoldSystemTrust {
		p.held = append(p.held, SystemTrustOwner)
		return p, faults
	}
	if err := s.planSystemTrust(want, &p); err != nil {
		p.held = append(p.held, SystemTrustOwner)
		faults = append(faults, &OwnerError{SystemTrustOwner, err})
	}
	return p, faults
}

func (s *session) planRegistry(r Registry) (plannedDir, error) {
	dir := plannedDir{owner: r.Hosts.Registry}
	var err error
	if dir.path, err = s.chooseDirectory(r.Hosts.Registry); err != nil {
		return dir, err
	}
	if dir.missing, err = s.missing(dir.path); err != nil {
		return dir, err
	}
	found := s.looksOurs(dir.path)
	if found {
		s.record.create([]string{dir.path})
	}
	own := len(dir.missing) > 0 || s.record.created(dir.path)

	hosts := path.Join(dir.path, hostsFile)
	before, err := s.original(hosts)
	if err != nil {
		return dir, err
	}
	if !own {
		r = r.renamed()
	}
	theirs, kept, err := s.foreignConfig(dir.path, own, before)
	if err != nil {
		return dir, err
	}
	text, notes, err := r.Hosts.merge(theirs)
	if err != nil {
		return dir, err
	}
	for _, n := range notes {
		s.note("registry %s: %s", r.Hosts.Registry, n)
	}
	files := r.encodedCAs()
	maps.Copy(files, kept)
	if err := s.planCAs(&dir, files, found); err != nil {
		return dir, err
	}
	mode := fs.FileMode(0o644)
	if theirs.mode != 0 {
		// A file with credentials in a header is readable by root alone, and
		// so must be the one that repeats them.
		mode = theirs.mode
	}
	dir.files = append(dir.files, plannedFile{path: hosts, data: text, mode: mode, before: before})
	return dir, nil
}

// encodedCAs are the files to write by name.
func (r Registry) encodedCAs() map[string][]byte {
	files := make(map[string][]byte, len(r.CAs))
	for name, b := range r.CAs {
		files[name] = b.PEM()
	}
	return files
}

// planCAs adds files of certificates, by name, to dir. In a directory that was
// found to be ours although there is no record of it, they replace nobody's.
func (s *session) planCAs(dir *plannedDir, files map[string][]byte, found bool) (err error) {
	for _, name := range slices.Sorted(maps.Keys(files)) {
		f := plannedFile{path: path.Join(dir.path, name), data: files[name], mode: 0o644}
		if !found {
			if f.before, err = s.originalCA(f.path); err != nil {
				return err
			}
		}
		dir.files = append(dir.files, f)
	}
	return nil
}

// looksOurs recognises a directory of ours of which there is no record, for it
// was lost: everything in it bears our marker or a name that we give.
func (s *session) looksOurs(dir string) bool {
	if s.record.file(path.Join(dir, hostsFile)) != nil {
		return false
	}
	text, err := s.read(path.Join(dir, hostsFile))
	if err != nil || !bearsMarker(text) || len(unmerge(text)) > 0 {
		return false
	}
	names, err := s.list(dir)
	return err == nil && !slices.ContainsFunc(names, func(n string) bool {
		ours := n == hostsFile || strings.HasPrefix(n, keptPrefix) || bytes.Contains(text, []byte(`"`+n+`"`))
		return !ours || strings.HasPrefix(n, foreignPrefix)
	})
}

// renamed gives the CA files the names that they have in foreign directories.
func (r Registry) renamed() Registry {
	rename := func(name string) string {
		if name == "" {
			return ""
		}
		return foreignName(name)
	}
	cas := make(map[string]Bundle, len(r.CAs))
	for name, b := range r.CAs {
		cas[rename(name)] = b
	}
	r.CAs = cas
	r.Hosts.Hops = slices.Clone(r.Hosts.Hops)
	for i := range r.Hosts.Hops {
		r.Hosts.Hops[i].CA = rename(r.Hosts.Hops[i].CA)
	}
	r.Hosts.Server.CA = rename(r.Hosts.Server.CA)
	return r
}

func foreignName(name string) string {
	return foreignPrefix + strings.TrimSuffix(name, path.Ext(name)) + ".pem"
}

// chooseDirectory finds the directory that containerd reads for a registry, or
// will when it is made: the first that is there and not ours, since a directory
// of ours must not hide an operator's, nor be hidden by it.
func (s *session) chooseDirectory(registry string) (string, error) {
	names := DirectoryNames(registry)
	for _, name := range names {
		dir := path.Join(s.certs, name)
		info, err := s.root.Lstat(dir)
		if errors.Is(err, fs.ErrNotExist) || err == nil && s.record.created(dir) && info.IsDir() {
			continue
		}
		switch {
		case err != nil:
			return "", err
		case info.Mode().Type() == fs.ModeSymlink:
			return "", fmt.Errorf("/%s is a symbolic link, and what is written through it would serve other registries too: replace it by a directory", dir)
		case !info.IsDir():
			return "", fmt.Errorf("/%s is not a directory: move it away", dir)
		}
		return dir, nil
	}
	return path.Join(s.certs, names[len(names)-1]), nil
}

// original returns what stood at the path of a hosts.toml before us, as it has
// to come back. A file that is neither recorded nor bears our marker is
// somebody's, and takes the place of what they had before.
func (s *session) original(name string) (*formerFile, error) {
	now, err := s.former(name)
	if err != nil {
		return nil, err
	}
	rec := s.record.file(name)
	switch {
	case now == nil && rec == nil:
		return nil, nil
	case now == nil:
		return rec.Before, nil
	case rec != nil && rec.isOurs(now.Data):
		return rec.Before, nil
	case bearsMarker(now.Data):
		// The record is lost; what we merged can be taken apart again.
		if now.Data = unmerge(now.Data); len(now.Data) == 0 {
			return nil, nil
		}
		s.note("/%s was written by connected-registry, but there is no record of it in %s: what was there before was taken out of it", name, RecordPath)
	}
	return now, nil
}

// originalCA does the same for a file of certificates. It bears no marker:
// once recorded, the path is ours, and in foreign directories the name is.
func (s *session) originalCA(name string) (*formerFile, error) {
	if rec := s.record.file(name); rec != nil {
		return rec.Before, nil
	}
	if strings.HasPrefix(path.Base(name), foreignPrefix) {
		return nil, nil
	}
	return s.former(name)
}

var errNotFile = errors.New("not a file")

// former reads a file with all that is needed to put it back; nil if there is
// none.
func (s *session) former(name string) (*formerFile, error) {
	info, err := s.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f := &formerFile{Mode: info.Mode().Perm()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		f.UID, f.GID = int(st.Uid), int(st.Gid)
	}
	if info.Mode().Type() == fs.ModeSymlink {
		if f.Link, err = s.root.Readlink(name); err != nil {
			return nil, err
		}
		f.Mode = 0
		name, err = s.resolve(name)
		if err != nil {
			return f, nil //nolint:nilerr // a link to nowhere is an absent file to containerd
		}
		if info, err = s.root.Lstat(name); err == nil {
			f.Mode = info.Mode().Perm()
		}
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("/%s is %w: move it away", name, errNotFile)
	}
	f.Data, err = s.read(name)
	return f, err
}

// foreignConfig is what containerd would go by in dir if we were not there, and
// the copies of CA files that it needs. In a directory of our own that is
// _default, which our directory hides.
func (s *session) foreignConfig(dir string, own bool, before *formerFile) (f foreign, copies map[string][]byte, err error) {
	if before != nil && len(before.Data) > 0 {
		f, err = parseForeign(before.Data)
		if err == nil {
			if !f.insertable {
				// containerd 2.3 ignores inline hosts, and would take ours:
				// they must not fail over a CA that was never there.
				f, copies = s.carry(f, dir, "", own)
				f.text = before.Data
			}
			f.mode = before.Mode
			return f, copies, nil
		}
		s.note("/%s/%s: %s", dir, hostsFile, unreadable(err))
		f, copies, err = s.certificateDir(dir, "", own)
		f.text, f.mode = before.Data, before.Mode
		return f, copies, err
	}
	if !own {
		return s.certificateDir(dir, "", own)
	}
	return s.defaultConfig(dir)
}

// defaultConfig is an operator's _default, as seen from a directory of ours.
func (s *session) defaultConfig(dir string) (f foreign, copies map[string][]byte, err error) {
	fallback := path.Join(s.certs, DefaultHost)
	if dir == fallback || s.record.created(fallback) {
		return foreign{}, nil, nil
	}
	real, err := s.resolve(fallback)
	if err != nil {
		return foreign{}, nil, nil //nolint:nilerr // a link to nowhere is absent to containerd
	}
	before, err := s.original(path.Join(real, hostsFile))
	if err != nil {
		return foreign{}, nil, err
	}
	if before == nil || len(before.Data) == 0 {
		return s.certificateDir(real, "../"+DefaultHost, true)
	}
	if f, err = parseForeign(before.Data); err != nil {
		return s.certificateDir(real, "../"+DefaultHost, true)
	}
	f, copies = s.carry(f, real, "../"+DefaultHost, true)
	f.mode = before.Mode
	return f, copies, nil
}

// certificateDir is a directory without a hosts.toml that containerd can read.
func (s *session) certificateDir(dir, reference string, own bool) (f foreign, copies map[string][]byte, err error) {
	names, err := s.list(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return foreign{}, nil, err
	}
	names = slices.DeleteFunc(names, func(n string) bool {
		rec := s.record.file(path.Join(dir, n))
		return rec != nil && rec.Before == nil
	})
	f, copies = s.carry(certificateFiles(names), dir, reference, own)
	return f, copies, nil
}

// carry makes an operator's configuration fit for another file than its own.
// CA files become copies, since a pull fails as soon as a file named in
// hosts.toml is missing, and the operator does not know that we name theirs.
// Client certificates stay where they are: keys are not copied. dir is where
// the configuration is from, reference how a hosts.toml of ours names it.
func (s *session) carry(f foreign, dir, reference string, own bool) (foreign, map[string][]byte) {
	copies := make(map[string][]byte)
	carryOne := func(h foreignHop) (_ foreignHop, ok bool) {
		files, _ := h.fields.caFiles()
		pairs, _ := h.fields.clientPairs()
		h.fields.CA, h.fields.Client = nil, nil
		var ca, client []any
		for _, file := range files {
			name, data, err := s.copyCA(dir, file, own)
			if err != nil {
				s.note("/%s: its CA file %q is of no use (%v), so the host that names it is left out", dir, file, err)
				return h, false
			}
			copies[name] = data
			ca = append(ca, name)
		}
		for _, pair := range pairs {
			if err := s.checkPair(dir, pair); err != nil {
				s.note("/%s: its client certificate %q is of no use (%v), so the host that names it is left out", dir, pair[0], err)
				return h, false
			}
			client = append(client, rebasePair(reference, pair))
		}
		if ca != nil {
			h.fields.CA = ca
		}
		if client != nil {
			h.fields.Client = client
		}
		return h, true
	}
	var hops []foreignHop
	for _, h := range f.hops {
		if h, ok := carryOne(h); ok {
			hops = append(hops, h)
		}
	}
	f.hops = hops
	if f.top {
		var ok bool
		f.server, ok = carryOne(f.server)
		f.top = ok || f.server.url != ""
	}
	// The text is another file's.
	f.text, f.insertable = nil, false
	return f, copies
}

// copyCA reads the certificates of a CA file, and nothing else that is in it.
// The name of the copy follows its content, so that it never changes under a
// hosts.toml that names it.
func (s *session) copyCA(dir, file string, own bool) (name string, data []byte, err error) {
	raw, err := s.readNamed(dir, file)
	if err != nil {
		return "", nil, err
	}
	for block, rest := pem.Decode(raw); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err == nil {
			data = append(data, pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})...)
		}
	}
	if len(data) == 0 {
		return "", nil, errors.New("it holds no certificate")
	}
	sum := sha256.Sum256(data)
	name = keptPrefix + hex.EncodeToString(sum[:8]) + ".crt"
	if !own {
		name = foreignName(name)
	}
	return name, data, nil
}

func (s *session) checkPair(dir string, pair [2]string) error {
	cert, err := s.readNamed(dir, pair[0])
	if err != nil {
		return err
	}
	key := cert
	if pair[1] != "" {
		if key, err = s.readNamed(dir, pair[1]); err != nil {
			return err
		}
	}
	_, err = tls.X509KeyPair(cert, key)
	return err
}

// readNamed reads a file as a hosts.toml in dir names it.
func (s *session) readNamed(dir, file string) ([]byte, error) {
	if !path.IsAbs(file) {
		file = path.Join("/"+dir, file)
	}
	name, err := s.resolve(file)
	if err != nil {
		return nil, err
	}
	return s.read(name)
}

func rebasePair(reference string, pair [2]string) any {
	rebase := func(p string) string {
		if path.IsAbs(p) || reference == "" {
			return p
		}
		return path.Join(reference, p)
	}
	if pair[1] == "" {
		return rebase(pair[0])
	}
	return []any{rebase(pair[0]), rebase(pair[1])}
}
