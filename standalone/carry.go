package standalone

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/archive"
	"github.com/connected-registry/connected-registry/storage"
	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/syncer"
)

// CarryConfig says what is carried between a data directory, or an object store,
// and an archive.
type CarryConfig struct {
	// Data is the data directory, as in Config. Required.
	Data string
	// Bucket is what the content lies in instead, as in Config. Nil: Data.
	Bucket bucket.Bucket
	// File is the archive. Required.
	File string
	// Logger takes the log. nil: none.
	Logger *slog.Logger
}

// Export writes the tags of the data directory that are wanted, nil for all, to
// the archive. The registry on that directory may go on running.
func Export(ctx context.Context, c CarryConfig, wanted func(repository, tag string) bool, progress func(done, total int64)) (archive.ExportResult, error) {
	root := filepath.Join(c.Data, "registry")
	if _, err := os.Stat(root); c.Bucket == nil && errors.Is(err, fs.ErrNotExist) {
		return archive.ExportResult{}, fmt.Errorf("there is no registry in %s: name the data directory with --data", c.Data)
	}
	store, err := storage.Open(ctx, storage.Config{Root: root, Bucket: c.Bucket, Logger: c.Logger})
	if err != nil {
		return archive.ExportResult{}, err
	}
	defer func() { _ = store.Close() }() // never fails
	return archive.Export(ctx, archive.ExportConfig{Store: store, File: c.File, Wanted: wanted, Progress: progress})
}

// Import brings everything in the archive, a file or a directory, into the data
// directory, as a synchronisation from a parent: what is there already is not
// read again, every byte is checked, and an import that was interrupted goes on
// where it was. It needs the data directory for itself.
func Import(ctx context.Context, c CarryConfig, progress func(syncer.Event)) (syncer.Result, error) {
	a, err := archive.Open(c.File)
	if err != nil {
		return syncer.Result{}, err
	}
	defer func() { _ = a.Close() }() // it was only read
	address, stop, err := serve(ctx, a)
	if err != nil {
		return syncer.Result{}, fmt.Errorf("reading the archive: %w", err)
	}
	defer stop()
	resource := &v1alpha1.ConnectedRegistry{}
	resource.Name = "import"
	resource.Spec.Parent = &v1alpha1.Parent{Endpoint: address, Insecure: true}
	resource.Spec.Repositories = a.Repositories()
	resource.SetDefaults()
	if errs := resource.Validate(); len(errs) > 0 {
		return syncer.Result{}, fmt.Errorf("reading the archive: %w", errs.ToAggregate())
	}
	from := func(err error) error {
		if err == nil {
			return nil
		}
		return carried{err, address, c.File}
	}
	told := func(e syncer.Event) {
		if e.Err = from(e.Err); progress != nil {
			progress(e)
		}
	}
	s, err := Open(ctx, Config{Resource: resource, Data: c.Data, Bucket: c.Bucket, Progress: told, Logger: c.Logger})
	if err != nil {
		return syncer.Result{}, err
	}
	defer s.Close()
	result, err := s.Syncer.Sync(ctx, v1alpha1.SyncTriggerManual)
	return result, from(err)
}

// carried is an error about the archive, which the syncer takes for a parent.
type carried struct {
	error
	address, file string
}

func (e carried) Error() string {
	text := e.error.Error()
	if named := strings.ReplaceAll(text, "parent "+e.address, "archive "+e.file); named != text {
		return named + ": copy it once more, or export again"
	}
	return text
}

func (e carried) Unwrap() error { return e.error }

// serve serves on a port of loopback until stop is called.
func serve(ctx context.Context, h http.Handler) (address string, stop func(), err error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	server := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l) // until stop
	}()
	return l.Addr().String(), func() {
		_ = server.Close()
		<-done
	}, nil
}
