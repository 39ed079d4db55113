package registry

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/registry/auth"
	"github.com/connected-registry/connected-registry/storage"
)

// Config says what a replica serves, and where.
type Config struct {
	// Store holds the content. Required. The caller opens it, and closes it
	// after Run has returned.
	Store *storage.Store
	// Listener is what Run serves on and closes. Required by Run; Handler
	// works without.
	Listener net.Listener
	// CertFile and KeyFile are the PEM files of the serving certificate, with
	// its chain, and of its key. They are read again when they change. Both
	// empty: plain HTTP.
	CertFile, KeyFile string
	// ReadOnly is asked on every request that would change something, so that
	// the mode can change while the replica serves; true refuses it. Nil:
	// writes are accepted.
	ReadOnly func() bool
	// Rules is asked on every request that would change something, like
	// ReadOnly. Nil: there are none.
	Rules func() *Rules
	// Auth decides who may do what. Run keeps its tokens up to date. Nil:
	// everybody may do everything that the mode allows.
	Auth *auth.Authority
	// Missing is told of manifests that clients who may read them asked for, by
	// tag or digest, and that are not here. It must not take long: the client
	// waits for its 404. Nil: nobody is told.
	Missing func(ctx context.Context, repository, reference string)
	// MaxUploads is how many requests that bring blobs are served at once; more
	// wait for a while and are then asked to come again. 0: 64.
	MaxUploads int
	// Traces takes a span for each request. Nil: nobody does.
	Traces trace.TracerProvider
	// DrainTime is how long Run lets requests in flight finish once it is told
	// to end, before it closes their connections. 0: four seconds.
	DrainTime time.Duration
	// Logger receives what was changed or denied at info level, every other
	// request at debug level, and faults at error level. Nil discards them.
	Logger *slog.Logger
	// Metrics is where the replica's metrics are registered. Nil: nowhere.
	Metrics prometheus.Registerer
}

// drainTime is Config.DrainTime where that says nothing.
const drainTime = 4 * time.Second

// stallTime is how long a client may send nothing in the middle of an upload.
// What has arrived is kept for it to go on from.
const stallTime = time.Minute

// silentTime is how long a connection may still bring its first request then.
const silentTime = 500 * time.Millisecond

// Server is one replica.
type Server struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	types   *typeCache
	stall   time.Duration // stallTime, but for tests
	keys    *keyPair      // nil for plain HTTP

	children children
	claims   claims
	turns    turns
	uploads  chan struct{} // holds a value for each upload that is served
	denials  *bounded
	faults   *bounded
}

// New validates the configuration, loads the key pair and registers the
// metrics. It starts nothing.
func New(cfg Config) (*Server, error) {
	if cfg.Store == nil {
		return nil, errors.New("registry: Store is nil")
	}
	if (cfg.CertFile == "") != (cfg.KeyFile == "") {
		return nil, errors.New("registry: CertFile and KeyFile go together: set both for TLS, neither for plain HTTP")
	}
	s := &Server{cfg: cfg, log: cfg.Logger, types: newTypeCache(), stall: stallTime}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.cfg.ReadOnly == nil {
		s.cfg.ReadOnly = func() bool { return false }
	}
	if s.cfg.Rules == nil {
		s.cfg.Rules = func() *Rules { return &Rules{} }
	}
	s.uploads = make(chan struct{}, cmp.Or(cfg.MaxUploads, maxUploads))
	s.denials, s.faults = newBounded(), newBounded()
	s.cfg.DrainTime = cmp.Or(s.cfg.DrainTime, drainTime)
	var err error
	if cfg.CertFile != "" {
		if s.keys, err = newKeyPair(cfg.CertFile, cfg.KeyFile, s.log); err != nil {
			return nil, err
		}
	}
	if s.metrics, err = newMetrics(cfg.Metrics, s); err != nil {
		return nil, fmt.Errorf("registering metrics: %w", err)
	}
	return s, nil
}

// Handler is the registry's API, without TLS.
func (s *Server) Handler() http.Handler {
	if s.cfg.Traces == nil {
		return http.HandlerFunc(s.serveHTTP)
	}
	return traced(http.HandlerFunc(s.serveHTTP), s.cfg.Traces)
}

// Run serves on Config.Listener until ctx ends, then refuses new connections,
// lets requests in flight finish for up to Config.DrainTime, and closes what is
// left. It returns nil for an orderly end, and joins everything it started. It
// may be called once.
func (s *Server) Run(ctx context.Context) error {
	if s.cfg.Listener == nil {
		return errors.New("registry: Listener is nil")
	}
	srv := s.httpServer()
	silent := newSilentConns()
	srv.ConnState = silent.track
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := s.serve(srv); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serving on %s: %w", s.cfg.Listener.Addr(), err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.DrainTime)
		defer cancel()
		defer time.AfterFunc(silentTime, silent.close).Stop()
		if srv.Shutdown(drain) == nil {
			return nil
		}
		s.log.Warn("closing connections that did not finish in time", "waited", s.cfg.DrainTime)
		return srv.Close()
	})
	if s.keys != nil {
		g.Go(func() error {
			s.keys.watch(ctx)
			return nil
		})
	}
	if s.cfg.Auth != nil {
		g.Go(func() error {
			s.cfg.Auth.Watch(ctx)
			return nil
		})
	}
	return g.Wait()
}

// httpServer sets limits on what a client may keep open without sending
// anything. There is no limit on how long a body may take in either direction:
// layers are large and links are slow.
func (s *Server) httpServer() *http.Server {
	srv := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	if s.keys != nil {
		srv.TLSConfig = &tls.Config{
			MinVersion:     tls.VersionTLS12,
			GetCertificate: s.keys.get,
		}
	}
	return srv
}

func (s *Server) serve(srv *http.Server) error {
	if s.keys == nil {
		return srv.Serve(s.cfg.Listener)
	}
	return srv.ServeTLS(s.cfg.Listener, "", "")
}
