package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/distribution/distribution/v3"
	dstorage "github.com/distribution/distribution/v3/registry/storage"
	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/factory"
	"github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
)

// DriverName is the name under which distribution's driver factory knows the
// driver of a Store. See [Store.Parameters].
const DriverName = "connectedregistry"

// quarantineDir holds, beside the tree, what was found corrupt: one file per
// digest, the latest, so that it cannot grow past what is stored.
const quarantineDir = "quarantine"

// trashDir takes what is deleted, so that it vanishes from the tree in one step
// and is taken apart afterwards.
const trashDir = "trash"

// layoutDirs must exist for an empty registry to answer with empty lists
// rather than with "not found".
var layoutDirs = []string{
	"docker/registry/v2/blobs",
	"docker/registry/v2/repositories",
	quarantineDir,
	partialDir,
	journalDir,
	limboDir,
	usageDir,
	damagedDir,
	trashDir,
}

// Config says where a Store lives.
type Config struct {
	// Root is the directory that holds the tree docker/registry/v2 and the
	// quarantine. It is created when absent. Required. Several processes, on
	// several machines, may share it.
	Root string
	// Logger receives one line for each corrupt file and for each file that
	// has to be hashed again. Nil discards them.
	Logger *slog.Logger
}

// Stats counts what a Store has seen since it was opened.
type Stats struct {
	Rehashed    uint64 // blobs that came unsealed and were hashed before use
	Quarantined uint64 // blobs that were found corrupt and set aside
}

// Store is a content store in distribution's layout on a directory. Its methods
// may be called concurrently.
type Store struct {
	root      string
	log       *slog.Logger
	driver    *driver
	namespace distribution.Namespace
	journal   *Journal
	usage     *ledger
	manifests *manifestCache

	// quit ends the hashing that goes on behind requests; running counts it.
	quit    chan struct{}
	running sync.WaitGroup
	closed  sync.Once
	// renewAfter is renewTime, but for tests.
	renewAfter time.Duration
	// hashing bounds how many files are hashed at a time: after a restore
	// without times, everything is unsealed at once.
	hashing chan struct{}

	mu      sync.Mutex
	pending map[digest.Digest]*verification // guarded by mu

	rehashed, quarantined atomic.Uint64
}

// Open prepares the directory and checks that it can be written to. The error
// names the directory and the remedy. The Store holds no lock and starts no
// goroutine until a file has to be hashed again; Close ends it.
//
// Open mutes logrus's standard logger for the whole process.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.Root == "" {
		return nil, errors.New("storage: Root is empty: name a directory for the registry's data")
	}
	root, err := filepath.Abs(cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("data directory %s: %w", cfg.Root, err)
	}
	if err := prepare(root); err != nil {
		return nil, err
	}
	muteLogrus()
	s := &Store{
		root:       root,
		log:        cfg.Logger,
		quit:       make(chan struct{}),
		renewAfter: renewTime,
		hashing:    make(chan struct{}, runtime.GOMAXPROCS(0)),
		pending:    make(map[digest.Digest]*verification),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.journal, s.usage, s.manifests = newJournal(s), newLedger(s), newManifestCache()
	s.driver = &driver{
		StorageDriver: filesystem.New(filesystem.DriverParameters{RootDirectory: root, MaxThreads: maxThreads}),
		store:         s,
	}
	// No descriptor cache: it would go stale when another replica deletes.
	// No validation that an index is complete: sparse ones are legal, and a
	// synchronised subset of the platforms is the normal case.
	s.emptyTrash()
	s.namespace, err = dstorage.NewRegistry(ctx, s.driver, dstorage.EnableDelete)
	if err != nil {
		return nil, fmt.Errorf("data directory %s: %w", root, err)
	}
	return s, nil
}

// emptyTrash finishes deletions that a crash interrupted. Those that another
// process has under way end no differently.
func (s *Store) emptyTrash() {
	trash := filepath.Join(s.root, trashDir)
	entries, err := os.ReadDir(trash)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(trash, e.Name())))
	}
	if err != nil {
		s.log.Warn("deleted content still takes space", "directory", trash, "error", err)
	}
}

// muteLogrus silences the logger that distribution cannot be given a substitute
// for. It reports each request, and each client's mistake as an error; what
// fails is returned as an error, too.
var muteLogrus = sync.OnceFunc(func() {
	logrus.SetOutput(io.Discard)
	logrus.SetLevel(logrus.PanicLevel)
})

// maxThreads bounds concurrent driver calls, each of which may block a thread
// in a system call on a slow volume.
const maxThreads = 256

// prepare creates the layout and proves that a file can be written, synced and
// removed, which a directory that merely exists does not.
func prepare(root string) error {
	for _, dir := range layoutDirs {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o777); err != nil {
			return unusable(root, err)
		}
	}
	probe, err := os.CreateTemp(root, ".write-test-*")
	if err != nil {
		return unusable(root, err)
	}
	_, err = probe.WriteString("connected-registry\n")
	err = errors.Join(err, probe.Sync(), probe.Close(), os.Remove(probe.Name()))
	if err != nil {
		return unusable(root, err)
	}
	return nil
}

func unusable(root string, err error) error {
	return fmt.Errorf("data directory %s cannot be written: %w; make it writable for user %d, free space on its volume, or choose another directory", root, err, os.Getuid())
}

// Close ends the hashing that is under way and waits for it. Readers that were
// waiting for it get an error; open files stay usable.
func (s *Store) Close() error {
	s.closed.Do(func() {
		s.mu.Lock() // no verification may be added once the wait begins
		defer s.mu.Unlock()
		close(s.quit)
	})
	s.running.Wait()
	s.usage.close()
	return nil
}

// Root is the absolute path of the data directory.
func (s *Store) Root() string { return s.root }

// Stats returns the counters.
func (s *Store) Stats() Stats {
	return Stats{Rehashed: s.rehashed.Load(), Quarantined: s.quarantined.Load()}
}

// Driver is distribution's filesystem driver with integrity and durability
// added.
func (s *Store) Driver() storagedriver.StorageDriver { return s.driver }

// Namespace is the registry over Driver: deletion enabled, no descriptor cache.
func (s *Store) Namespace() distribution.Namespace { return s.namespace }

// Parameters are the driver parameters with which distribution's factory,
// asked for DriverName, returns this Store's driver. This is how
// handlers.NewApp, which knows drivers by name only, comes to use it.
func (s *Store) Parameters() map[string]any {
	registerFactory()
	return map[string]any{driverParameter: s.driver}
}

const driverParameter = "driver"

// registerFactory adds DriverName to distribution's table of drivers, which is
// global and refuses a second registration.
var registerFactory = sync.OnceFunc(func() { factory.Register(DriverName, driverFactory{}) })

type driverFactory struct{}

func (driverFactory) Create(_ context.Context, parameters map[string]any) (storagedriver.StorageDriver, error) {
	d, ok := parameters[driverParameter].(*driver)
	if !ok {
		return nil, fmt.Errorf("storage driver %s: parameters must come from Store.Parameters", DriverName)
	}
	return d, nil
}
