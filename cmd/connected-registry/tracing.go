package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// newTracing sends spans by OTLP over HTTP when the environment names a
// collector, as OpenTelemetry's specification of environment variables has it;
// otherwise the provider is nil. stop sends what is left.
func newTracing(ctx context.Context) (provider trace.TracerProvider, stop func(), err error) {
	if os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") == "" && os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") == "" {
		return nil, func() {}, nil
	}
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("tracing: %w", err)
	}
	who := resource.NewSchemaless(attribute.String("service.name", "connected-registry"), attribute.String("service.version", version))
	if fromEnvironment, err := resource.New(ctx, resource.WithFromEnv()); err == nil {
		if merged, err := resource.Merge(who, fromEnvironment); err == nil {
			who = merged
		}
	}
	p := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(who))
	return p, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = p.Shutdown(ctx) // a collector that is away keeps nobody
	}, nil
}
