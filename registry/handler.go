package registry

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/registry/auth"
	"github.com/connected-registry/connected-registry/storage"
)

// serveHTTP answers one request: it finds the endpoint, lets its handler answer
// or writes the error that it returned, and accounts for the outcome.
func (s *Server) serveHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	rt := parseRoute(r.URL.Path)
	if s.cfg.Auth != nil && (r.URL.Path == auth.TokenPath || r.URL.Path == auth.TokenPathShort) {
		rt.end = endToken
	}
	rec := &recorder{ResponseWriter: w}
	if isWrite(r.Method) {
		r.Body = &countedBody{r.Body, s.metrics.received.WithLabelValues(rt.end.String())}
	}
	defer func() { s.account(rec, r, rt, time.Since(start)) }()
	defer func() {
		if p := recover(); p != nil {
			s.recovered(rec, r, p)
		}
	}()
	if rt.end == endToken {
		s.cfg.Auth.ServeToken(rec, r)
		return
	}
	// What docker looks for to tell a registry from any other server.
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	if rt.end == endBase {
		w.Header().Set(v1alpha1.HeaderParent, v1alpha1.Version)
	}
	if err := s.handle(rec, r, rt); err != nil {
		s.fail(rec, r, err)
	}
}

// handle checks that a request may be made, and calls the handler of its
// endpoint.
func (s *Server) handle(w *recorder, r *http.Request, rt route) error {
	if rt.end == endUnknown || rt.end == endRepository && !isWrite(r.Method) {
		return errNotFound
	}
	registryWide := rt.end == endBase || rt.end == endCatalog
	if registryWide && isWrite(r.Method) {
		return s.notAllowed(w, rt)
	}
	var repo storage.Repository
	if !registryWide {
		var err error
		if repo, err = s.cfg.Store.Repository(rt.name); err != nil {
			return errNameInvalid.with(map[string]string{"name": rt.name})
		}
	}
	if isWrite(r.Method) && s.cfg.ReadOnly() {
		return errReadOnly
	}
	who, err := s.authorize(w, r, rt)
	w.user = who.name()
	if err != nil {
		return err
	}
	s.hear(r, who)
	if rt.end == endUploads || rt.end == endUpload && isWrite(r.Method) && r.Method != http.MethodDelete {
		done, err := s.admit(r.Context())
		if err != nil {
			w.Header().Set("Retry-After", "5")
			return err
		}
		defer done()
	}
	return s.dispatch(w, r, rt, repo, who)
}

// dispatch calls the handler of an endpoint.
func (s *Server) dispatch(w http.ResponseWriter, r *http.Request, rt route, repo storage.Repository, who caller) error {
	read := !isWrite(r.Method)
	switch {
	case rt.end == endBase:
		return writeJSON(w, r, struct{}{})
	case rt.end == endCatalog:
		return s.listRepositories(w, r, who)
	case rt.end == endManifest && read:
		return s.getManifest(w, r, repo, rt.ref)
	case rt.end == endManifest && r.Method == http.MethodPut:
		return s.putManifest(w, r, repo, rt.ref, who)
	case rt.end == endManifest && r.Method == http.MethodDelete:
		return s.deleteManifest(w, r, repo, rt.ref, who)
	case rt.end == endBlob && read:
		return s.getBlob(w, r, repo, rt.ref)
	case rt.end == endBlob && r.Method == http.MethodDelete:
		return s.deleteBlob(w, r, repo, rt.ref)
	case rt.end == endUploads && r.Method == http.MethodPost:
		return s.startUpload(w, r, repo, who)
	case rt.end == endUpload && read:
		return s.uploadProgress(w, r, repo, rt.ref)
	case rt.end == endUpload && r.Method == http.MethodPatch:
		return s.patchUpload(w, r, repo, rt.ref)
	case rt.end == endUpload && r.Method == http.MethodPut:
		return s.putUpload(w, r, repo, rt.ref)
	case rt.end == endUpload && r.Method == http.MethodDelete:
		return s.cancelUpload(w, r, repo, rt.ref)
	case rt.end == endRepository && r.Method == http.MethodDelete:
		return s.deleteRepository(w, r, repo, who)
	case rt.end == endTags && read:
		return s.listTags(w, r, repo)
	case rt.end == endReferrers && read:
		return s.listReferrers(w, r, repo, rt.ref)
	}
	return s.notAllowed(w, rt)
}

func (s *Server) notAllowed(w http.ResponseWriter, rt route) error {
	w.Header().Set("Allow", rt.end.methods())
	return errUnsupported
}

// fail answers with err, unless the answer has begun: then the connection is
// broken off, for a body that ends early must not look complete.
func (s *Server) fail(w *recorder, r *http.Request, err error) {
	answer, ours := asAPIError(err)
	if ours && r.Context().Err() == nil {
		s.logFault(r, err)
	}
	if w.status != 0 {
		panic(http.ErrAbortHandler)
	}
	writeError(w, r, answer)
}

// logFault writes why a request failed by our fault.
func (s *Server) logFault(r *http.Request, err error) {
	unsaid, ok := s.faults.say()
	if !ok {
		return
	}
	if unsaid > 0 {
		s.log.Error("requests failed that the log does not show", "requests", unsaid)
	}
	s.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
}

// recovered turns a panic into an answer and a log line. http.ErrAbortHandler is
// net/http's own way to break a connection off.
func (s *Server) recovered(w *recorder, r *http.Request, p any) {
	if p == http.ErrAbortHandler { //nolint:errorlint // net/http compares like this
		panic(p)
	}
	s.log.Error("request panicked", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
	if w.status != 0 {
		panic(http.ErrAbortHandler)
	}
	writeError(w, r, errInternal)
}

// account counts the request and writes the access log: at info level what
// changed something or was denied, which is the audit log, and the rest, by far
// the most, at debug level.
func (s *Server) account(w *recorder, r *http.Request, rt route, took time.Duration) {
	s.metrics.observe(rt.end, r.Method, w.status, w.bytes, took)
	level := slog.LevelDebug
	if w.status == http.StatusForbidden || changes(rt.end, r.Method) && w.status < 300 {
		level = slog.LevelInfo
	}
	if !s.log.Enabled(context.Background(), level) {
		return
	}
	if w.status == http.StatusForbidden {
		unsaid, ok := s.denials.say()
		if !ok {
			return
		}
		if unsaid > 0 {
			s.log.Warn("requests were denied that the log does not show", "requests", unsaid)
		}
	}
	s.log.Log(context.Background(), level, "request", "method", r.Method, "path", r.URL.Path, "status", w.status, "digest", w.Header().Get("Docker-Content-Digest"),
		"bytes", w.bytes, "took", took, "user", w.user, "client", r.RemoteAddr, "agent", r.UserAgent())
}

// changes reports whether a request that succeeded has changed what others see:
// not that it brought part of a blob, or was given a token.
func changes(end endpoint, method string) bool {
	return isWrite(method) && method != http.MethodPatch && end != endUploads && end != endToken
}

// recorder remembers the status and size of an answer. It passes ReadFrom on,
// without which a file would go through user space on its way out.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64
	user   string // who made the request, when known
}

func (w *recorder) WriteHeader(status int) {
	if w.status == 0 && status >= 200 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, err
}

func (w *recorder) ReadFrom(src io.Reader) (int64, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := io.Copy(w.ResponseWriter, src)
	w.bytes += n
	return n, err
}

// Unwrap lets http.ResponseController reach what is underneath.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

var _ io.ReaderFrom = (*recorder)(nil)
