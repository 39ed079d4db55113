package registry

import (
	"net/http"

	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// traced makes a span for each request, as the child of what the client's
// traceparent names (W3C Trace Context).
func traced(h http.Handler, provider trace.TracerProvider) http.Handler {
	annotated := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rt := parseRoute(r.URL.Path)
		span := trace.SpanFromContext(r.Context())
		span.SetName(r.Method + " " + rt.end.String())
		if rt.name != "" {
			span.SetAttributes(attribute.String("oci.repository", rt.name))
		}
		if rt.ref != "" && rt.end != endUpload { // an upload's state is the client's alone
			span.SetAttributes(attribute.String("oci.reference", rt.ref))
		}
		h.ServeHTTP(w, r)
	})
	return otelhttp.NewHandler(annotated, "registry",
		otelhttp.WithTracerProvider(provider),
		otelhttp.WithPropagators(propagation.TraceContext{}))
}
