package storage

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"
)

const (
	childrenDir = "children"
	maxChildren = 1000
	// childAge is how long a child that is silent is remembered.
	childAge = 90 * 24 * time.Hour
)

// Child is a connected registry whose parent this one is, as it describes
// itself.
type Child struct {
	// Token is the client token that it reads with.
	Token string `json:"token"`
	// Name is what it calls itself.
	Name string `json:"name"`
	// Mode, ConnectionState, LoginServer and Version are as in its own status.
	Mode            string `json:"mode,omitempty"`
	ConnectionState string `json:"connectionState,omitempty"`
	LoginServer     string `json:"loginServer,omitempty"`
	Version         string `json:"version,omitempty"`
	// LastSync is when its last synchronisation that brought everything ended;
	// the zero time when none has.
	LastSync time.Time `json:"lastSync,omitzero"`
	// Seen is when it was last heard of.
	Seen time.Time `json:"seen"`
}

// RecordChild remembers a child, in the place of what was known about it. The
// caller has seen its credentials. When there are too many already, a new one is
// refused with an error.
func (s *Store) RecordChild(ctx context.Context, c Child) error {
	sum := sha256.Sum256([]byte(c.Token + "\x00" + c.Name))
	name := childrenDir + "/" + hex.EncodeToString(sum[:16]) + ".json"
	if _, err := s.medium.readNote(ctx, name); errors.Is(err, fs.ErrNotExist) {
		children, err := s.Children(ctx)
		if err != nil {
			return err
		}
		if len(children) >= maxChildren {
			return fmt.Errorf("recording child %s: there are %d already", c.Name, len(children))
		}
	}
	body, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if err := s.medium.writeNote(ctx, name, body, false); err != nil {
		return fmt.Errorf("recording child %s: %w", c.Name, err)
	}
	return nil
}

// Children lists the children by name and token, and forgets those that have
// been silent for 90 days.
func (s *Store) Children(ctx context.Context) ([]Child, error) {
	notes, err := s.medium.listNotes(ctx, childrenDir)
	if err != nil {
		return nil, fmt.Errorf("listing children: %w", err)
	}
	var children []Child
	for _, n := range notes {
		name := childrenDir + "/" + n.name
		if heard, err := n.modified(); err == nil && time.Since(heard) > childAge {
			_ = s.medium.removeNote(ctx, name) // or next time
			continue
		}
		body, err := s.medium.readNote(ctx, name)
		var c Child
		if err == nil {
			err = json.Unmarshal(body, &c)
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err == nil && strings.HasSuffix(n.name, ".json") {
			children = append(children, c)
		}
	}
	slices.SortFunc(children, func(a, b Child) int {
		return strings.Compare(a.Name+"\x00"+a.Token, b.Name+"\x00"+b.Token)
	})
	return children, nil
}
