package main

import (
	"context"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
)

// TestStandaloneHealth asks a process that is everything how it fares.
func TestStandaloneHealth(t *testing.T) {
	dir, log := t.TempDir(), new(lines)
	parent := newParent(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, []string{
			"standalone", "--config", writeConfig(t, dir, parent.host), "--data", dir + "/data", "--listen", "127.0.0.1:0",
			"--cache-listen", "127.0.0.1:0", "--node-root", "", "--health-listen", "127.0.0.1:0",
		}, io.Discard, log)
	}()
	address := regexp.MustCompile(`msg=serving health=(\S+)`)
	waitFor(t, "serving", log, func() bool { return address.MatchString(log.String()) })
	health := "http://" + address.FindStringSubmatch(log.String())[1]
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) string {
		t.Helper()
		answer, err := client.Get(health + path)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if err != nil || answer.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s %v", path, answer.Status, err)
		}
		return string(body)
	}
	get("/healthz")
	get("/readyz")
	metrics := get("/metrics")
	for _, part := range []string{"connected_registry_certificate_not_after", "connected_registry_sync_", "connected_registry_outbox_", "connected_registry_gc_runs_total", "connected_registry_cache_", "process_resident_memory_bytes"} {
		if !strings.Contains(metrics, "\n"+part) {
			t.Errorf("no metric begins with %s", part)
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
