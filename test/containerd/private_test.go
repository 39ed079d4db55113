package containerd

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestPrivate pulls with a pull secret from a registry that asks for tokens, by
// way of the cache alone: first all of it, then from the cache, then with the
// registry gone. Who has no secret, or a wrong one, gets nothing at any time.
func TestPrivate(t *testing.T) {
	h := startHops(t, systemConfig{Private: true})
	secrets := map[string]*cri.AuthConfig{
		"none":    nil,
		"wrong":   {Username: privateUser, Password: "wrong"},
		"unknown": {Username: "nobody", Password: privatePassword},
	}
	for _, phase := range []string{"cold cache", "warm cache", "registry stopped"} {
		if phase == "registry stopped" {
			h.registry.stop(t)
		}
		for name, secret := range secrets {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			if _, err := h.daemon.pullAs(ctx, h.own(), secret); err == nil {
				t.Errorf("%s: with the secret %q the pull succeeded", phase, name)
			}
			cancel()
		}
		h.daemon.exchanges(t)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		id, err := h.daemon.pullAs(ctx, h.own(), &cri.AuthConfig{Username: privateUser, Password: privatePassword})
		cancel()
		if err != nil {
			t.Fatalf("%s: %v", phase, err)
		}
		check(t, h.daemon, h.own(), id, h.image)
		if diff := cmp.Diff([]string{h.cacheHost()}, h.daemon.exchanges(t).served()); diff != "" {
			t.Errorf("%s: hosts that served (-want +got):\n%s", phase, diff)
		}
		h.daemon.remove(t, h.own())
	}
}
