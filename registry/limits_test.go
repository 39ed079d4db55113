package registry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

// TestUploadsAreBounded sends one upload more than are served at once.
func TestUploadsAreBounded(t *testing.T) {
	store := openStore(t)
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, Config{Store: store, MaxUploads: 1})
		start := func(body io.Reader) *httptest.ResponseRecorder {
			w := httptest.NewRecorder()
			s.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v2/app/blobs/uploads/?digest=sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", body))
			return w
		}
		done, err := s.admit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		w := start(http.NoBody)
		if w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") == "" || !strings.Contains(w.Body.String(), "TOOMANYREQUESTS") {
			t.Errorf("%d %s", w.Code, w.Body)
		}
		done()
		if w := start(http.NoBody); w.Code != http.StatusCreated {
			t.Errorf("%d %s", w.Code, w.Body)
		}
	})
}

// TestDenialsAreBounded makes more requests that are denied than the log takes.
func TestDenialsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		s := newServer(t, Config{ReadOnly: func() bool { return true }, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		for range 10 * logBurst {
			s.Handler().ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodPut, "/v2/app/manifests/v1", http.NoBody))
		}
		if n := strings.Count(log.String(), "\n"); n < logBurst || n > 2*logBurst {
			t.Errorf("%d lines for %d denied requests", n, 10*logBurst)
		}
	})
}

// TestFaultsAreBounded has a storage that is gone fail more requests than the log
// takes.
func TestFaultsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		store := openStore(t)
		s := newServer(t, Config{Store: store, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		uploads := filepath.Join(store.Root(), "docker/registry/v2/repositories/app")
		if err := os.WriteFile(uploads, nil, 0o600); err != nil { // a file where a directory belongs
			t.Fatal(err)
		}
		for range 10 * logBurst {
			w := httptest.NewRecorder()
			s.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v2/app/blobs/uploads/", http.NoBody))
			if w.Code != http.StatusInternalServerError {
				t.Fatalf("%d %s", w.Code, w.Body)
			}
		}
		if n := strings.Count(log.String(), "\n"); n < logBurst || n > 2*logBurst {
			t.Errorf("%d lines for %d requests that failed", n, 10*logBurst)
		}
		time.Sleep(time.Minute)
		s.Handler().ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v2/app/blobs/uploads/", http.NoBody))
		if want := fmt.Sprintf("requests=%d", 9*logBurst); !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %s", want)
		}
	})
}

// TestTraces finds a request's span below the one that its client names.
func TestTraces(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	provider := trace.NewTracerProvider(trace.WithSpanProcessor(spans))
	defer func() { _ = provider.Shutdown(context.WithoutCancel(t.Context())) }()
	s := newServer(t, Config{Traces: provider})
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v2/team/app/manifests/v1", nil)
	r.Header.Set("Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	r.SetBasicAuth("ci", "hunter2")
	s.Handler().ServeHTTP(httptest.NewRecorder(), r)
	ended := spans.Ended()
	if len(ended) != 1 {
		t.Fatalf("%d spans", len(ended))
	}
	span := ended[0]
	if span.Name() != "GET manifest" || span.SpanContext().TraceID().String() != "0af7651916cd43dd8448eb211c80319c" {
		t.Errorf("%s %s", span.Name(), span.SpanContext().TraceID())
	}
	got := make(map[string]string)
	for _, a := range span.Attributes() {
		got[string(a.Key)] = a.Value.String()
		if strings.Contains(a.Value.String(), "hunter2") {
			t.Errorf("a password in %s", a.Key)
		}
	}
	if got["oci.repository"] != "team/app" || got["oci.reference"] != "v1" || got["http.response.status_code"] != "404" {
		t.Errorf("attributes %v", got)
	}
}
