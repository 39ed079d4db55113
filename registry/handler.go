package registry

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"time"
)

// serveHTTP answers one request: it finds the endpoint, lets its handler answer
// or writes the error that it returned, and accounts for the outcome.
func (s *Server) serveHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	rt := parseRoute(r.URL.Path)
	rec := &recorder{ResponseWriter: w}
	defer func() { s.account(rec, r, rt, time.Since(start)) }()
	defer func() {
		if p := recover(); p != nil {
			s.recovered(rec, r, p)
		}
	}()
	// What docker looks for to tell a registry from any other server.
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	if err := s.handle(rec, r, rt); err != nil {
		s.fail(rec, r, err)
	}
}

// handle calls the handler of an endpoint.
func (s *Server) handle(w http.ResponseWriter, r *http.Request, rt route) error {
	switch rt.end {
	case endUnknown:
		return errNotFound
	case endBase, endCatalog:
		if isWrite(r.Method) {
			return s.notAllowed(w, rt)
		}
		if rt.end == endCatalog {
			return s.listRepositories(w, r)
		}
		return writeJSON(w, r, struct{}{})
	}
	repo, err := s.cfg.Store.Repository(rt.name)
	if err != nil {
		return errNameInvalid.with(map[string]string{"name": rt.name})
	}
	if isWrite(r.Method) && s.cfg.ReadOnly() {
		return errReadOnly
	}
	read := !isWrite(r.Method)
	switch {
	case rt.end == endManifest && read:
		return s.getManifest(w, r, repo, rt.ref)
	case rt.end == endManifest && r.Method == http.MethodPut:
		return s.putManifest(w, r, repo, rt.ref)
	case rt.end == endManifest && r.Method == http.MethodDelete:
		return s.deleteManifest(w, r, repo, rt.ref)
	case rt.end == endBlob && read:
		return s.getBlob(w, r, repo, rt.ref)
	case rt.end == endBlob && r.Method == http.MethodDelete:
		return s.deleteBlob(w, r, repo, rt.ref)
	case rt.end == endUploads && r.Method == http.MethodPost:
		return s.startUpload(w, r, repo)
	case rt.end == endUpload && read:
		return s.uploadProgress(w, r, repo, rt.ref)
	case rt.end == endUpload && r.Method == http.MethodPatch:
		return s.patchUpload(w, r, repo, rt.ref)
	case rt.end == endUpload && r.Method == http.MethodPut:
		return s.putUpload(w, r, repo, rt.ref)
	case rt.end == endUpload && r.Method == http.MethodDelete:
		return s.cancelUpload(w, r, repo, rt.ref)
	case rt.end == endTags && read:
		return s.listTags(w, r, repo)
	case rt.end == endReferrers:
		return errNotFound
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
		s.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
	}
	if w.status != 0 {
		panic(http.ErrAbortHandler)
	}
	writeError(w, r, answer)
}

// recovered turns a panic into an answer and a log line. http.ErrAbortHandler is
// net/http's own way to break a connection off.
func (s *Server) recovered(w *recorder, r *http.Request, p any) {
	if p == http.ErrAbortHandler {
		panic(p)
	}
	s.log.Error("request panicked", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
	if w.status != 0 {
		panic(http.ErrAbortHandler)
	}
	writeError(w, r, errInternal)
}

// account writes the access log and counts the request.
func (s *Server) account(w *recorder, r *http.Request, rt route, took time.Duration) {
	s.metrics.observe(rt.end, r.Method, w.status, w.bytes, took)
	if !s.log.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	s.log.Debug("request", "method", r.Method, "path", r.URL.Path, "status", w.status, "bytes", w.bytes,
		"took", took, "client", r.RemoteAddr, "agent", r.UserAgent())
}

// recorder remembers the status and size of an answer. It passes ReadFrom on,
// without which a file would go through user space on its way out.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64
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
