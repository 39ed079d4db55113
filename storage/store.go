package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/distribution/distribution/v3"
	dstorage "github.com/distribution/distribution/v3/registry/storage"
	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/factory"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// DriverName is the name under which distribution's driver factory knows the
// driver of a Store. See [Store.Parameters].
const DriverName = "connectedregistry"

// Config says where a Store lives.
type Config struct {
	// Root is the directory that holds the tree docker/registry/v2 and the
	// quarantine. It is created when absent. Required without a Bucket.
	// Several processes, on several machines, may share it.
	//
	// With a Bucket it holds what is on its way into that (see Partial) and
	// nothing else: it is made when it is first needed, belongs to this process,
	// and may be lost at any time.
	Root string
	// Bucket keeps everything in an object store, which several processes may
	// share. Nil: Root does.
	Bucket bucket.Bucket
	// Logger receives one line for each corrupt file and for each file that
	// has to be hashed again. Nil discards them.
	Logger *slog.Logger
}

// Stats counts what a Store has seen since it was opened.
type Stats struct {
	Rehashed    uint64 // blobs that came unsealed and were hashed before use
	Quarantined uint64 // blobs that were found corrupt and set aside
}

// Store is a content store in distribution's layout on a directory or in an object
// store. Its methods may be called concurrently.
type Store struct {
	root      string
	log       *slog.Logger
	medium    medium
	driver    *driver
	namespace distribution.Namespace
	journal   *Journal
	usage     *ledger
	manifests *manifestCache

	// quit ends what goes on behind requests; running counts it.
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

// Open prepares the directory, or the object store, and checks that it can be
// written to. The error names it and the remedy. The Store holds no lock. What it has
// to do behind the caller's back, to finish deletions and to hash files again, Close
// ends.
//
// Open mutes logrus's standard logger for the whole process.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	root, err := filepath.Abs(cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("data directory %s: %w", cfg.Root, err)
	}
	if cfg.Root == "" {
		root = ""
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	medium, err := openMedium(ctx, cfg.Bucket, root, log)
	if err != nil {
		return nil, err
	}
	muteLogrus()
	s := &Store{
		root:       root,
		log:        log,
		medium:     medium,
		quit:       make(chan struct{}),
		renewAfter: renewTime,
		hashing:    make(chan struct{}, runtime.GOMAXPROCS(0)),
		pending:    make(map[digest.Digest]*verification),
	}
	usageEvery := usageSave
	if cfg.Bucket != nil {
		usageEvery = usageSaveFar
	}
	s.journal, s.usage, s.manifests = newJournal(s), newLedger(s, usageEvery), newManifestCache()
	s.driver = &driver{StorageDriver: medium.driver(), store: s}
	// No descriptor cache: it would go stale when another replica deletes.
	// No validation that an index is complete: sparse ones are legal, and a
	// synchronised subset of the platforms is the normal case.
	s.namespace, err = dstorage.NewRegistry(ctx, s.driver, dstorage.EnableDelete)
	if err != nil {
		return nil, fmt.Errorf("opening the storage: %w", err)
	}
	if d, ok := medium.(*directory); ok {
		// However much was left to be deleted, nobody waits for it.
		s.running.Go(func() { d.emptyTrash(s.quit) })
	}
	return s, nil
}

func openMedium(ctx context.Context, b bucket.Bucket, root string, log *slog.Logger) (medium, error) {
	switch {
	case b != nil:
		return openObjects(ctx, b, log)
	case root != "":
		return openDirectory(root, log)
	default:
		return nil, errors.New("storage: Root is empty: name a directory for the registry's data")
	}
}

// muteLogrus silences the logger that distribution cannot be given a substitute
// for. It reports each request, and each client's mistake as an error; what
// fails is returned as an error, too.
var muteLogrus = sync.OnceFunc(func() {
	logrus.SetOutput(io.Discard)
	logrus.SetLevel(logrus.PanicLevel)
})

// Ready finds out whether what is stored can be read. The error names what
// cannot.
func (s *Store) Ready(ctx context.Context) error { return s.medium.ready(ctx) }

// Close ends what is under way behind requests and waits for it. Readers that were
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

// Root is the absolute path of the data directory, or of the one that is beside
// the object store.
func (s *Store) Root() string { return s.root }

// Stats returns the counters.
func (s *Store) Stats() Stats {
	return Stats{Rehashed: s.rehashed.Load(), Quarantined: s.quarantined.Load()}
}

// Driver is distribution's driver for where the Store lives, with integrity and
// durability added.
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

// StoreOf returns the Store that a driver belongs to, nil when it belongs to
// none.
func StoreOf(d storagedriver.StorageDriver) *Store {
	if d, ok := d.(*driver); ok {
		return d.store
	}
	return nil
}
