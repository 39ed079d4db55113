package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"github.com/connected-registry/connected-registry/standalone"
)

// readyTimeout bounds how long it takes to find out whether a process is ready:
// storage that is gone may answer nothing at all.
const readyTimeout = 2 * time.Second

// health is the server that the kubelet and Prometheus ask: /healthz says that
// the process runs, /readyz whether it should be sent requests, /metrics how it
// fares.
type health struct {
	listener net.Listener
	metrics  *prometheus.Registry
	// ready says why the process is not ready; see readyWhen.
	ready atomic.Pointer[func(context.Context) error]
	// turn holds a value while ready runs, which may hang.
	turn chan struct{}
}

func newHealth(addr string) (*health, error) {
	l, err := standalone.Listen(context.Background(), addr, "--health-listen")
	if err != nil {
		return nil, err
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	h := &health{listener: l, metrics: metrics, turn: make(chan struct{}, 1)}
	h.readyWhen(func(context.Context) error { return errors.New("it is only starting") })
	return h, nil
}

// readyWhen has ready say from now on why the process is not ready; nil when it
// is. It may take longer than its context.
func (h *health) readyWhen(ready func(context.Context) error) { h.ready.Store(&ready) }

// run serves until ctx ends.
func (h *health) run(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", h.serveReady)
	mux.Handle("GET /metrics", promhttp.HandlerFor(h.metrics, promhttp.HandlerOpts{}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := srv.Serve(h.listener); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serving health on %s: %w", h.listener.Addr(), err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		return srv.Close()
	})
	return g.Wait()
}

func (h *health) serveReady(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
	defer cancel()
	if err := h.ask(ctx); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}

// ask calls ready, and waits for it no longer than ctx lasts.
func (h *health) ask(ctx context.Context) error {
	late := errors.New("finding out takes too long: does the storage answer?")
	select {
	case h.turn <- struct{}{}:
	case <-ctx.Done():
		return late
	}
	answer := make(chan error, 1)
	go func() {
		answer <- (*h.ready.Load())(ctx)
		<-h.turn
	}()
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return late
	}
}
