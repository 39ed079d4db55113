package controller

import (
	"context"
	"crypto/rand"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
)

// PrefetchSecret is what nodes show to the registry to prefetch what not
// everybody may read: the name and the password of a client token, mounted into
// the agents. It lets them read the repositories that something is prefetched
// of, and no other. What it brings is in the caches, which ask the registry about
// every client as ever. To shut out one that got away, delete it, and it is made
// anew.
const PrefetchSecret = "connected-registry-prefetch"

const (
	keyUsername = "username"
	keyPassword = "password"
	// nodeTokenName is none that spec.clientTokens may have.
	nodeTokenName = "_nodes"
)

// nodeToken is the client token of nodes. nil: they have none.
type nodeToken struct {
	password     string
	repositories []string
	known        bool // which repositories there are
}

// nodeToken returns the client token of nodes, with PrefetchSecret made for it,
// or removed if it is not needed.
func (l *loop) nodeToken(ctx context.Context, cr *v1alpha1.ConnectedRegistry, nodes *v1alpha1.NodeConfiguration, secrets *secretReader) (*nodeToken, error) {
	was, err := secrets.get(ctx, PrefetchSecret)
	if err != nil {
		return &nodeToken{}, err
	}
	if !cr.Spec.NodeCache.PrefetchWorkloads || cr.Spec.AnonymousPull || cr.Spec.TrustDistribution.Disabled {
		return nil, l.removeSecret(ctx, PrefetchSecret, was)
	}
	data := map[string][]byte{keyUsername: []byte(nodeTokenName), keyPassword: []byte(rand.Text())}
	if was != nil && len(was.Data[keyPassword]) >= minSecret {
		data[keyPassword] = was.Data[keyPassword]
	}
	t := &nodeToken{password: string(data[keyPassword])}
	if nodes != nil {
		t.repositories, t.known = ownRepositories(nodes), true
	}
	return t, l.writeSecret(ctx, cr, PrefetchSecret, was, data)
}

// addTo adds the token's file to what replicas are told, which is now as given.
// While it is not known what nodes need, it stays as it was.
func (t *nodeToken) addTo(data, now map[string][]byte, tokens *clienttoken.Renderer) error {
	const file = nodeTokenName + clienttoken.Extension
	switch {
	case t == nil:
		return nil
	case !t.known:
		if was := now[file]; was != nil {
			data[file] = was
		}
		return nil
	}
	var scopes []v1alpha1.Scope
	if len(t.repositories) > 0 {
		scopes = []v1alpha1.Scope{{
			Repositories: t.repositories,
			Actions:      []v1alpha1.Action{v1alpha1.ActionContentRead, v1alpha1.ActionMetadataRead},
		}}
	}
	content, err := tokens.Render([]string{t.password}, scopes, now[file])
	if err != nil {
		return err
	}
	data[file] = content
	return nil
}
