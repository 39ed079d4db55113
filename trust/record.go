package trust

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
)

// RecordPath is where the node record lies inside a node root.
const RecordPath = "/var/lib/connected-registry/node.json"

const recordVersion = 1

// record is what was done to a node and what stood there before: all that is
// needed to undo it. It is written ahead of each change, so a file on disk is
// always either what it was before or one of those recorded.
type record struct {
	Version int `json:"version"`
	// Directories that were created, parents first.
	Directories []string        `json:"directories,omitempty"`
	Files       []*recordedFile `json:"files,omitempty"`
	// Rebuild: files of the system trust store were changed, or are about to
	// be, and its bundle has not been made anew since.
	Rebuild rebuildKind `json:"rebuild,omitempty"`
}

// recordedFile is one file of ours. Paths are relative to the node root and
// free of symbolic links.
type recordedFile struct {
	Path string `json:"path"`
	// Owner is the registry for which it was written.
	Owner string `json:"owner"`
	// SHA256 of our contents; more than one while a change is under way.
	SHA256 []string `json:"sha256"`
	// Before is what stood there; nil: nothing.
	Before *formerFile `json:"before,omitempty"`
}

// formerFile is a file that has to come back.
type formerFile struct {
	Mode fs.FileMode `json:"mode"`
	UID  int         `json:"uid"`
	GID  int         `json:"gid"`
	Data []byte      `json:"data,omitempty"`
	// Link is the target if it was a symbolic link; Data is then what the link
	// led to, and Mode that file's.
	Link string `json:"link,omitempty"`
}

func (r *record) file(path string) *recordedFile {
	for _, f := range r.Files {
		if f.Path == path {
			return f
		}
	}
	return nil
}

// put records that data is about to be written to path.
func (r *record) put(owner string, p plannedFile) {
	f := r.file(p.path)
	if f == nil {
		f = &recordedFile{Path: p.path}
		r.Files = append(r.Files, f)
	}
	f.Owner, f.Before = owner, p.before
	if sum := hash(p.data); len(f.SHA256) != 1 || f.SHA256[0] != sum {
		f.SHA256 = append(slices.DeleteFunc(f.SHA256, func(s string) bool { return s == sum }), sum)
	}
}

// settle forgets the contents that p has replaced.
func (r *record) settle(p plannedFile) {
	if f := r.file(p.path); f != nil {
		f.SHA256 = []string{hash(p.data)}
	}
}

func (r *record) drop(path string) {
	r.Files = slices.DeleteFunc(r.Files, func(f *recordedFile) bool { return f.Path == path })
}

func (r *record) created(dir string) bool { return slices.Contains(r.Directories, dir) }

func (r *record) create(dirs []string) {
	for _, d := range dirs {
		if !r.created(d) {
			r.Directories = append(r.Directories, d)
		}
	}
}

func (r *record) forgetDirectory(dir string) {
	r.Directories = slices.DeleteFunc(r.Directories, func(d string) bool { return d == dir })
}

// isOurs reports whether the hosts.toml that is there now is ours, be it changed
// since: something that we wrote, what bears our marker, or nothing at all,
// which is to containerd as if there was no file.
func (f *recordedFile) isOurs(data []byte) bool {
	if f.Owner == RuntimeOwner {
		return f.wrote(data)
	}
	return len(data) == 0 || slices.Contains(f.SHA256, hash(data)) || bearsMarker(data)
}

// encode is stable, so that an unchanged record is not written again.
func (r *record) encode() ([]byte, error) {
	slices.SortFunc(r.Files, func(a, b *recordedFile) int { return comparePaths(a.Path, b.Path) })
	slices.SortFunc(r.Directories, comparePaths)
	out, err := json.MarshalIndent(r, "", "  ")
	return append(out, '\n'), err
}

// comparePaths puts a directory before what is in it.
func comparePaths(a, b string) int {
	return slices.Compare(pathElements(a), pathElements(b))
}

func hash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// loadRecord returns an empty record if there is none yet.
func loadRecord(d *disk, name string) (*record, error) {
	data, err := d.readLimited(name, maxRecordBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return &record{Version: recordVersion}, nil
	}
	if err != nil {
		return nil, err
	}
	r := &record{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("/%s is damaged (%w): restore it, or move it away to begin anew without undoing what it recorded", name, err)
	}
	if r.Version != recordVersion {
		return nil, fmt.Errorf("/%s has version %d, this program knows version %d: use the program that wrote it", name, r.Version, recordVersion)
	}
	for _, f := range r.Files {
		if f == nil || !fs.ValidPath(f.Path) {
			return nil, fmt.Errorf("/%s is damaged (a path in it is not valid): restore it, or move it away", name)
		}
	}
	for _, dir := range r.Directories {
		if !fs.ValidPath(dir) {
			return nil, fmt.Errorf("/%s is damaged (a path in it is not valid): restore it, or move it away", name)
		}
	}
	return r, nil
}

// directories are all that hold, or held, something of ours, and their parents:
// where a killed process may have left something half-made.
func (r *record) directories() []string {
	set := map[string]bool{".": true}
	add := func(dir string) {
		for ; dir != "." && dir != ""; dir = path.Dir(dir) {
			set[dir] = true
		}
	}
	for _, f := range r.Files {
		add(path.Dir(f.Path))
	}
	for _, dir := range r.Directories {
		add(dir)
	}
	return slices.Sorted(maps.Keys(set))
}
