package standalone

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/connected-registry/connected-registry/api/v1alpha1"
	"github.com/connected-registry/connected-registry/clienttoken"
	"github.com/connected-registry/connected-registry/syncer"
	"github.com/connected-registry/connected-registry/trust"
)

// tokenSecretBytes is the size of what bearer tokens are signed with.
const tokenSecretBytes = 32

// renderTokens makes dir hold what the registry reads its client tokens from:
// hashed passwords and scope maps of the tokens that r names. A password that
// has not changed keeps its hash.
func renderTokens(ctx context.Context, r *v1alpha1.ConnectedRegistry, secrets syncer.Secrets, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making room for client tokens: %w: make --data writable, and move away what is no directory there", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("client tokens: %w", err)
	}
	defer root.Close()
	renderer := clienttoken.NewRenderer()
	var keep []string
	for i, t := range r.Spec.ClientTokens {
		passwords, err := syncer.Passwords(ctx, t.SecretRef.Name, secrets)
		if err != nil {
			return fmt.Errorf("spec.clientTokens[%d]: %w", i, err)
		}
		name := t.Name + clienttoken.Extension
		if err := renderToken(root, name, renderer, passwords, t.ScopeMap); err != nil {
			return fmt.Errorf("client token %s: %w", t.Name, err)
		}
		keep = append(keep, name)
	}
	return removeOthers(root, keep)
}

func renderToken(root *os.Root, name string, renderer *clienttoken.Renderer, passwords []string, scopes []v1alpha1.Scope) error {
	was, err := root.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	data, err := renderer.Render(passwords, scopes, was)
	if err != nil || bytes.Equal(data, was) {
		return err
	}
	_, err = trust.WriteFile(root, name, data, 0o600)
	return err
}

func removeOthers(root *os.Root, keep []string) error {
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), clienttoken.Extension) && !slices.Contains(keep, e.Name()) {
			if _, err := trust.RemoveFile(root, e.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// tokenSecret is what bearer tokens are signed with: made once and kept, so that
// clients need not log in again after a restart.
func tokenSecret(data string) ([]byte, error) {
	root, err := os.OpenRoot(data)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	const name = "token-secret"
	if secret, err := root.ReadFile(name); err == nil && len(secret) == tokenSecretBytes {
		return secret, nil
	}
	secret := make([]byte, tokenSecretBytes)
	rand.Read(secret) // never fails
	if _, err := trust.WriteFile(root, name, secret, 0o600); err != nil {
		return nil, fmt.Errorf("keeping the secret for bearer tokens in %s: %w: make it writable, and move away what is no file there", data, err)
	}
	return secret, nil
}
