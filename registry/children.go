package registry

import (
	"encoding/json"
	"net/http"
	"sync"
	"time"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/storage"
)

const (
	// childInterval is how often a replica takes note of the same child.
	childInterval = 30 * time.Second
	// maxChildHeader bounds what a child says of itself, in bytes.
	maxChildHeader = 2 << 10
	// maxHeard bounds the children that a replica remembers to have heard of.
	maxHeard = 1000
)

// children takes note of the connected registries that have this one as their
// parent. They describe themselves in a header of requests that bear their
// credentials; see [v1alpha1.HeaderChild].
type children struct {
	mu    sync.Mutex
	heard map[string]time.Time // by token and name
}

// hear takes note of what a request says about the child that makes it.
func (s *Server) hear(r *http.Request, who caller) {
	header := r.Header.Get(v1alpha1.HeaderChild)
	if header == "" || len(header) > maxChildHeader || who.name() == "" {
		return
	}
	var said v1alpha1.ChildHeader
	if json.Unmarshal([]byte(header), &said) != nil || !said.Valid() {
		return
	}
	now := time.Now()
	if !s.children.due(who.name()+"\x00"+said.Name, now) {
		return
	}
	c := storage.Child{
		Token: who.name(), Name: said.Name, Mode: string(said.Mode), ConnectionState: string(said.ConnectionState),
		LoginServer: said.LoginServer, Version: said.Version, Seen: now.UTC(),
	}
	if said.LastSyncTime != nil {
		c.LastSync = said.LastSyncTime.UTC()
	}
	if err := s.cfg.Store.RecordChild(r.Context(), c); err != nil {
		s.log.Error("a child cannot be recorded", "error", err)
	}
}

func (c *children) due(key string, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now.Sub(c.heard[key]) < childInterval {
		return false
	}
	if c.heard == nil || len(c.heard) >= maxHeard {
		c.heard = make(map[string]time.Time)
	}
	c.heard[key] = now
	return true
}
