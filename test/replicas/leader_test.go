package replicas

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/connected-registry/connected-registry/storage"
	"github.com/connected-registry/connected-registry/storage/bucket"
)

// leaderVariable makes the test's executable the leader: its value is the root of
// the storage.
const leaderVariable = "REPLICAS_TEST_LEADER"

// onceVariable, when it is set, has the leader take everything for old, and end
// when nothing is left to collect.
const onceVariable = "REPLICAS_TEST_ONCE"

// objectsVariable has it lead on an object store: its value is a storage.yaml.
// There nobody can make anything look old, and so nothing is collected but what
// has been there for hours.
const objectsVariable = "REPLICAS_TEST_OBJECTS"

const (
	// restTime is for how long nobody may have used a link before the leader makes
	// it look old: longer than a client takes from looking for a blob to pushing
	// the manifest, as the reserve age is in life.
	restTime = 20 * time.Second
	oldAge   = 3 * time.Hour
)

// lead does what the leader does for the content, with hours made into seconds:
// it takes what clients changed out of the journal, and prints it; it collects
// garbage, and reads all blobs again. It ends with ctx.
func lead(ctx context.Context, root string) error {
	config := storage.Config{Root: root}
	objects := os.Getenv(objectsVariable)
	if objects != "" {
		named, err := bucket.Load(objects)
		if err != nil {
			return err
		}
		if config.Bucket, err = bucket.Open(ctx, named); err != nil {
			return err
		}
	}
	store, err := storage.Open(ctx, config)
	if err != nil {
		return err
	}
	defer store.Close()
	rest := restTime
	if os.Getenv(onceVariable) != "" {
		rest = 0
	}
	for ctx.Err() == nil {
		if err := drain(ctx, store); err != nil && ctx.Err() == nil {
			return err
		}
		if rest == 0 {
			if err := tellWaiting(ctx, store); err != nil {
				return err
			}
		}
		if objects == "" {
			if err := makeOld(root, rest); err != nil {
				return err
			}
		}
		did, err := store.Maintain(ctx, storage.Maintenance{MinAge: time.Millisecond, Grace: 250 * time.Millisecond, ScrubRate: 64 << 20})
		if err != nil && ctx.Err() == nil {
			return err
		}
		report(did)
		if rest == 0 && did.Collected.Waiting == 0 {
			return nil
		}
		wait(ctx, 100*time.Millisecond)
	}
	return nil
}

// tellWaiting prints of which tags the journal has changes that were begun by
// replicas that died: they become entries when it is sure that nobody goes on. A
// client who looks before it pushes again finds the tag as it wants it.
func tellWaiting(ctx context.Context, store *storage.Store) error {
	tags, err := store.Journal().Tags(ctx)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(line{Waiting: tags})
}

// line is what the leader prints.
type line struct {
	Entry      *storage.Change            `json:"entry,omitempty"`
	Waiting    map[string]map[string]bool `json:"waiting,omitempty"`
	Maintained *storage.Maintained        `json:"maintained,omitempty"`
}

func drain(ctx context.Context, store *storage.Store) error {
	entries, err := store.Journal().Entries(ctx, 0)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := json.NewEncoder(os.Stdout).Encode(line{Entry: &e.Change}); err != nil {
			return err
		}
		if err := store.Journal().Done(ctx, e.ID); err != nil {
			return err
		}
	}
	return nil
}

func report(did storage.Maintained) {
	_ = json.NewEncoder(os.Stdout).Encode(line{Maintained: &did})
}

// makeOld sets back the time of use of links that nobody has used for rest.
func makeOld(root string, rest time.Duration) error {
	old := time.Now().Add(-oldAge)
	return filepath.WalkDir(filepath.Join(root, "docker/registry/v2/repositories"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Name() == "link" && !e.IsDir() {
			var fi fs.FileInfo
			if fi, err = e.Info(); err == nil && time.Since(fi.ModTime()) > rest {
				err = os.Chtimes(path, old, old)
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
}

// leader is a process that leads, and what it has said.
type leader struct {
	t    *testing.T
	root string
	file string // storage.yaml; empty: the root is a directory
	log  *tail

	mu      sync.Mutex
	process *process
	heard   map[storage.Change]bool // guarded by mu
	passes  int                     // guarded by mu
	blobs   int                     // that were freed; guarded by mu
	corrupt int                     // guarded by mu
	skipped map[string]string       // guarded by mu
	reading sync.WaitGroup
}

func newLeader(s *site, root string) *leader {
	return &leader{t: s.t, root: root, file: s.storage, log: &s.log, heard: make(map[storage.Change]bool), skipped: make(map[string]string)}
}

func (l *leader) start(env ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close()
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), leaderVariable+"="+l.root, objectsVariable+"="+l.file)
	cmd.Env = append(cmd.Env, env...)
	cmd.Stdout, cmd.Stderr = w, l.log
	p, err := start(cmd)
	if err != nil {
		r.Close()
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.process = p
	l.reading.Go(func() {
		defer r.Close()
		for lines := bufio.NewScanner(r); lines.Scan(); {
			l.take(lines.Bytes())
		}
	})
	return nil
}

func (l *leader) take(text []byte) {
	var said line
	if json.Unmarshal(text, &said) != nil {
		return // cut short by a kill
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if said.Entry != nil {
		l.heard[change(said.Entry.Repository, said.Entry.Tag, said.Entry.Action)] = true
	}
	for repository, tags := range said.Waiting {
		for tag := range tags {
			l.heard[change(repository, tag, storage.ActionPush)] = true
			l.heard[change(repository, tag, storage.ActionDelete)] = true
		}
	}
	if did := said.Maintained; did != nil {
		l.passes++
		l.blobs += did.Collected.Blobs
		l.corrupt += did.Scrubbed.Corrupt
		for name, why := range did.Collected.Skipped {
			l.skipped[name] = why
		}
	}
}

// change is a change by what the test knows of it.
func change(repository, tag string, action storage.ChangeAction) storage.Change {
	return storage.Change{Repository: repository, Tag: tag, Action: action}
}

// again kills the leader, as one that loses its node, and has another take over.
func (l *leader) again() error {
	l.process.kill()
	return l.start()
}

// settle has a leader collect all that nothing needs any more.
func (l *leader) settle() error {
	if err := l.start(onceVariable + "=1"); err != nil {
		return err
	}
	select {
	case <-l.process.stopped:
	case <-time.After(2 * time.Minute):
		l.process.kill()
	}
	l.reading.Wait()
	return *l.process.err
}

// stop ends the leader, and checks that it met no fault.
func (l *leader) stop() {
	l.process.terminate(l.t)
	l.reading.Wait()
	if err := *l.process.err; err != nil {
		l.t.Errorf("the leader: %v\n%s", err, l.log)
	}
	if l.corrupt > 0 || len(l.skipped) > 0 {
		l.t.Errorf("the leader found %d corrupt blobs and could not read %s", l.corrupt, l.skipped)
	}
	if l.passes < 2 || l.blobs == 0 && l.file == "" {
		l.t.Errorf("the leader collected %d blobs in %d passes", l.blobs, l.passes)
	}
	l.t.Log(strings.TrimSpace(fmt.Sprintf("the leader freed %d blobs in %d passes", l.blobs, l.passes)))
}
