package daemon

import (
	"fmt"
	"net/http"
	"sync"
	"time"
)

// stuckAfter is longer than the longest thing that is done in one step, the
// rebuilding of the system's trust store at a cleanup.
const stuckAfter = 5 * time.Minute

// health is what the probes are told.
type health struct {
	mu       sync.Mutex // guards everything below
	step     time.Time
	notReady string
}

func (h *health) stepped(notReady string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.step, h.notReady = time.Now(), notReady
}

// Healthz answers 200 while the daemon does its work, whatever comes of it, and
// 500 when it is stuck.
func (d *Daemon) Healthz(w http.ResponseWriter, _ *http.Request) {
	d.health.mu.Lock()
	step := d.health.step
	d.health.mu.Unlock()
	if since := time.Since(step); !step.IsZero() && since > stuckAfter {
		http.Error(w, fmt.Sprintf("stuck for %s", since.Round(time.Second)), http.StatusInternalServerError)
		return
	}
	fmt.Fprintln(w, "ok")
}

// Readyz answers 200 when the configuration and the registry's CA are applied to
// the node and the cache serves, and otherwise 503 and what is missing.
func (d *Daemon) Readyz(w http.ResponseWriter, _ *http.Request) {
	d.health.mu.Lock()
	why := d.health.notReady
	if d.health.step.IsZero() {
		why = "starting"
	}
	d.health.mu.Unlock()
	if c := d.cfg.Cache; why == "" && c != nil && !c.Serving() {
		why = "the cache does not serve: " + text(c.Fault())
	}
	if why != "" {
		http.Error(w, why, http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}
