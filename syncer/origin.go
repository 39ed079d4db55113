package syncer

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
)

// origin is one registry that content comes from, during a synchronisation.
type origin struct {
	parent    *parent
	selection selection
	err       error // why it could not be asked anything
}

// origins are the registries of a Config.
func (s *Syncer) origins() []*origin {
	var all []*origin
	self := s.self()
	for i, from := range s.upstreams {
		p := newParent(from.Parent, s.limits, s.dial, s.config.Logger)
		p.pace, p.bandwidth, p.self = s.paces[i], s.bandwidth, self
		all = append(all, &origin{parent: p, selection: s.selections[i]})
	}
	return all
}

// self is what this registry says of itself to a parent.
func (s *Syncer) self() string {
	if s.config.Name == "" {
		return ""
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	said, err := json.Marshal(v1alpha1.ChildHeader{
		Name:            s.config.Name,
		Mode:            s.mode(),
		ConnectionState: s.last.ConnectionState,
		LoginServer:     s.config.LoginServer,
		Version:         s.config.Version,
		LastSyncTime:    s.last.LastSyncTime,
	})
	if err != nil {
		return "" // cannot happen
	}
	return string(said)
}

func (s *Syncer) mode() v1alpha1.Mode {
	if s.config.ReadWrite {
		return v1alpha1.ModeReadWrite
	}
	return v1alpha1.ModeReadOnly
}

// local is the name here of one of a registry's repositories.
func (sel selector) local(remote string) string { return path.Join(sel.prefix, remote) }

// remote is the name that a repository here has at the registry, if the selector
// selects it.
func (sel selector) remote(local string) (string, bool) {
	name := local
	if sel.prefix != "" {
		var ok bool
		if name, ok = strings.CutPrefix(local, sel.prefix+"/"); !ok {
			return "", false
		}
	}
	return name, sel.repository.Match(name)
}

// here are the repositories here that a registry's repository goes to, by name:
// several where entries with different prefixes select it.
func (r *run) here(o *origin, remote string, err error) []*repository {
	parts := make(map[string]selection)
	for _, sel := range o.selection {
		if sel.repository.Match(remote) {
			local := sel.local(remote)
			parts[local] = append(parts[local], sel)
		}
	}
	var found []*repository
	for local, part := range parts {
		found = append(found, r.newRepository(o, local, remote, part, err))
	}
	return found
}

// locate finds where a repository here comes from, without asking anybody: nil
// when nothing selects it.
func (r *run) locate(local string) *repository {
	for _, o := range r.origins {
		part, remote := o.selection.of(local)
		if len(part) > 0 {
			return r.newRepository(o, local, remote, part, nil)
		}
	}
	return nil
}

// of is the part of the selection that is about one repository here, and what the
// registry calls that.
func (s selection) of(local string) (part selection, remote string) {
	for _, sel := range s {
		if name, ok := sel.remote(local); ok {
			part, remote = append(part, sel), name
		}
	}
	return part, remote
}

// find asks the registries which of their repositories are selected. A glob for
// which that cannot be found out stands for itself, with the error.
func (r *run) find(ctx context.Context) []*repository {
	var found []*repository
	for _, o := range r.origins {
		found = append(found, r.findAt(ctx, o)...)
	}
	slices.SortStableFunc(found, func(a, b *repository) int { return cmp.Compare(a.name, b.name) })
	for i := 1; i < len(found); i++ {
		if a, b := found[i-1], found[i]; a.name == b.name && b.err == nil {
			b.err = fmt.Errorf("repository %s would come both from %s of %s and from %s of %s: give one of them another prefix", a.name, a.remote, a.parent, b.remote, b.parent)
		}
	}
	r.mu.Lock()
	r.repositories = found
	r.mu.Unlock()
	return found
}

func (r *run) findAt(ctx context.Context, o *origin) []*repository {
	var found []*repository
	var names []string
	o.err = o.parent.ping(ctx)
	if wild := o.selection.wild(); len(wild) > 0 {
		catalog, err := []string(nil), o.err
		if err == nil {
			catalog, err = o.parent.catalog(ctx)
		}
		if err != nil {
			for _, sel := range wild {
				found = append(found, r.newRepository(o, sel.local(sel.repository.String()), sel.repository.String(), selection{sel}, err))
			}
		}
		names = slices.DeleteFunc(catalog, func(name string) bool {
			return !slices.ContainsFunc(wild, func(sel selector) bool { return sel.repository.Match(name) })
		})
	}
	names = append(names, o.selection.exact()...)
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		found = append(found, r.here(o, name, o.err)...)
	}
	return found
}

// unasked is why a registry could not be asked anything; the first's, if several
// could not.
func (r *run) unasked() error {
	for _, o := range r.origins {
		if o.err != nil {
			return o.err
		}
	}
	return nil
}
