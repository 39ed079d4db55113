package storage

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// The journal is a folder with one note for each change that clients made and
// the parent has not been told of yet:
//
//	journal/<nanoseconds, 20 digits>-<random>.json
//
// and the same with the suffix .pending while the change is being made. One
// file each, because replicas on several machines write at the same time and
// share no lock, and because what is done is then simply removed.

// ErrJournalFull is wrapped by the error that refuses a change because too many
// are waiting for the parent already.
var ErrJournalFull = errors.New("too many changes are waiting to be brought to the parent registry")

const (
	journalDir     = "journal"
	journalSuffix  = ".json"
	pendingSuffix  = ".pending"
	maxJournal     = 100_000 // entries, about: some 400 MB on most file systems
	journalRecount = 500     // changes after which a replica counts the entries again
)

// settleTime is how long a change may take to be made. One that is pending for
// longer is that of a process that died, and may have been made or not.
const settleTime = 15 * time.Minute

// ChangeAction is what was done.
type ChangeAction string

// The actions.
const (
	ActionPush   ChangeAction = "push"
	ActionDelete ChangeAction = "delete"
)

// Change is one thing that a client changed. It is a reason to look, not an
// instruction: what the store holds by the time that the entry is read is what
// counts, for a later change may have its entry before or after this one.
type Change struct {
	// Action is what was done.
	Action ChangeAction `json:"action"`
	// Repository is where. A deletion with neither Tag nor Digest is that of
	// the whole repository.
	Repository string `json:"repository"`
	// Tag was pushed or deleted. Empty: a manifest without one was.
	Tag string `json:"tag,omitempty"`
	// Digest is that of the manifest: of the one that was pushed or deleted, or
	// that the deleted tag named.
	Digest digest.Digest `json:"digest,omitempty"`
	// Previous is what Tag named before. Empty: nothing.
	Previous digest.Digest `json:"previous,omitempty"`
	// MediaType and Size, in bytes, are the manifest's, when it was pushed.
	MediaType string `json:"mediaType,omitempty"`
	Size      int64  `json:"size,omitempty"`
	// Actor is the name of the client token. Empty: a client without one.
	Actor string `json:"actor,omitempty"`
}

// Entry is a change in the journal.
type Entry struct {
	// ID names the entry for Done. Entries sort by it in the order of the
	// clocks of those who wrote them.
	ID string
	// Time is when the change was begun.
	Time time.Time
	Change
}

// Journal holds what clients changed until the syncer has dealt with it. Its
// methods may be called concurrently, and by several processes at a time.
type Journal struct {
	store *Store
	limit int // maxJournal, but for tests

	mu   sync.Mutex
	last int64 // nanoseconds of the latest entry written here; guarded by mu
	room int   // changes until the entries are counted again; guarded by mu

	memory entryMemory
}

func newJournal(s *Store) *Journal {
	return &Journal{store: s, limit: maxJournal}
}

// Journal is the journal of the clients' changes.
func (s *Store) Journal() *Journal { return s.journal }

// Record makes a change by calling apply, and sees to it that the journal has it
// if it was made: durably, before Record returns. Nothing is changed when the
// journal cannot take the entry. When the process dies on the way, the change
// was not acknowledged, and the entry appears once it is clear that nobody will
// finish it.
//
// Errors: that of apply; one that wraps ErrJournalFull; what the file system
// reported.
func (j *Journal) Record(ctx context.Context, c Change, apply func() error) error {
	id, content, err := j.begin(ctx, c)
	if err != nil {
		return fmt.Errorf("recording the %s of %s for the parent registry: %w", c.Action, c.Repository, err)
	}
	settled := context.WithoutCancel(ctx) // whoever asked for it may be gone by now
	if err := apply(); err != nil {
		return errors.Join(err, j.store.medium.removeNote(settled, noteOf(id, pendingSuffix)))
	}
	// If it took so long that it was taken for dead, and has been dealt with, it
	// is there again.
	err = j.store.medium.moveNote(settled, noteOf(id, pendingSuffix), noteOf(id, journalSuffix), content)
	if err != nil {
		return fmt.Errorf("recording the %s of %s for the parent registry: %w", c.Action, c.Repository, err)
	}
	return nil
}

// noteOf is the name of the note that holds an entry.
func noteOf(id, suffix string) string { return journalDir + "/" + id + suffix }

// begin writes a pending entry and returns its id and content.
func (j *Journal) begin(ctx context.Context, c Change) (id string, content []byte, err error) {
	if id, err = j.reserve(ctx); err != nil {
		return "", nil, err
	}
	if content, err = json.Marshal(c); err != nil {
		return "", nil, err
	}
	return id, content, j.store.medium.writeNote(ctx, noteOf(id, pendingSuffix), content, true)
}

// reserve makes an id later than all before, if there is room for an entry.
func (j *Journal) reserve(ctx context.Context) (string, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.room == 0 {
		names, err := j.names(ctx)
		if err != nil {
			return "", err
		}
		if len(names) >= j.limit {
			return "", fmt.Errorf("%w: %d; see that the parent can be reached and takes pushes", ErrJournalFull, len(names))
		}
		j.room = min(journalRecount, j.limit-len(names))
	}
	j.room--
	j.last = max(time.Now().UnixNano(), j.last+1)
	var unique [6]byte
	rand.Read(unique[:])
	return fmt.Sprintf("%020d-%s", j.last, hex.EncodeToString(unique[:])), nil
}

// Entries returns up to n changes in order, oldest first; n <= 0 means all. A
// change that is still being made is not among them, those behind it are.
func (j *Journal) Entries(ctx context.Context, n int) ([]Entry, error) {
	names, err := j.names(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the journal: %w", err)
	}
	var entries []Entry
	for _, name := range names {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if n > 0 && len(entries) == n {
			break
		}
		e, err := j.read(ctx, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // done, or still being made
		}
		if err != nil {
			return nil, fmt.Errorf("reading the journal: %w", err)
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// Tags are the tags that have changed, or are being changed, by repository: those
// that nobody but clients may write until the parent has been told.
func (j *Journal) Tags(ctx context.Context) (map[string]map[string]bool, error) {
	names, err := j.names(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the journal: %w", err)
	}
	tags := make(map[string]map[string]bool)
	for _, name := range names {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		id, began, ok := parseEntryName(name)
		if !ok {
			continue
		}
		e, err := j.parse(ctx, name, id, began)
		if errors.Is(err, fs.ErrNotExist) {
			// It has settled, or is dealt with, by now.
			if e, err = j.parse(ctx, id+journalSuffix, id, began); errors.Is(err, fs.ErrNotExist) {
				continue
			}
		}
		if err != nil {
			return nil, fmt.Errorf("reading the journal: %w", err)
		}
		if tags[e.Repository] == nil {
			tags[e.Repository] = make(map[string]bool)
		}
		if e.Tag != "" {
			tags[e.Repository][e.Tag] = true
		}
	}
	return tags, nil
}

// read reads one entry. The error is fs.ErrNotExist when it does not count.
func (j *Journal) read(ctx context.Context, name string) (Entry, error) {
	id, began, ok := parseEntryName(name)
	if !ok || strings.HasSuffix(name, pendingSuffix) && time.Since(began) < settleTime {
		return Entry{}, fs.ErrNotExist
	}
	return j.parse(ctx, name, id, began)
}

func (j *Journal) parse(ctx context.Context, name, id string, began time.Time) (Entry, error) {
	if e, ok := j.memory.get(id); ok {
		return e, nil
	}
	content, err := j.store.medium.readNote(ctx, journalDir+"/"+name)
	if err != nil {
		return Entry{}, err
	}
	e := Entry{ID: id, Time: began}
	if err := json.Unmarshal(content, &e.Change); err != nil || !ValidName(e.Repository) {
		aside := quarantineDir + "/journal-" + name
		j.store.log.Error("damaged entry of the journal set aside; the next full synchronisation finds what it was about", "entry", name, "quarantine", aside)
		if err := j.store.medium.moveNote(ctx, journalDir+"/"+name, aside, content); err != nil {
			return Entry{}, err
		}
		return Entry{}, fs.ErrNotExist
	}
	j.memory.put(e)
	return e, nil
}

// Done removes entries that have been dealt with. Those that are not there are
// no error. Should the power fail, some may come back.
func (j *Journal) Done(ctx context.Context, ids ...string) error {
	var errs []error
	for _, id := range ids {
		if _, _, ok := parseEntryName(id + journalSuffix); !ok {
			errs = append(errs, fmt.Errorf("journal entry %q: %w", id, ErrName))
			continue
		}
		for _, suffix := range []string{journalSuffix, pendingSuffix} {
			errs = append(errs, j.store.medium.removeNote(ctx, noteOf(id, suffix)))
		}
	}
	return errors.Join(errs...)
}

// Backlog tells how many changes are waiting, and when the oldest was made; the
// zero time when none is.
func (j *Journal) Backlog(ctx context.Context) (n int, oldest time.Time, err error) {
	names, err := j.names(ctx)
	if err != nil {
		return 0, time.Time{}, fmt.Errorf("reading the journal: %w", err)
	}
	for _, name := range names {
		if _, began, ok := parseEntryName(name); ok {
			if n == 0 {
				oldest = began
			}
			n++
		}
	}
	return n, oldest, nil
}

// names lists what there is, sorted. An entry that was settled and is still called
// pending, too, is there once.
func (j *Journal) names(ctx context.Context) ([]string, error) {
	notes, err := j.store.medium.listNotes(ctx, journalDir)
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(notes))
	for _, n := range notes {
		id, pending := strings.CutSuffix(n.name, pendingSuffix)
		if pending && len(names) > 0 && names[len(names)-1] == id+journalSuffix {
			continue
		}
		names = append(names, n.name)
	}
	j.memory.keep(names)
	return names, nil
}

func parseEntryName(name string) (id string, began time.Time, ok bool) {
	id, ok = strings.CutSuffix(name, journalSuffix)
	if !ok {
		id, ok = strings.CutSuffix(name, pendingSuffix)
	}
	clock, unique, found := strings.Cut(id, "-")
	nanoseconds, err := strconv.ParseInt(clock, 10, 64)
	if !ok || !found || len(clock) != 20 || err != nil || nanoseconds < 0 || len(unique) != 12 || strings.ContainsAny(unique, "/.") {
		return "", time.Time{}, false
	}
	return id, time.Unix(0, nanoseconds), true
}

func ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
