package standalone

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// maxSecretBytes is what Kubernetes allows a whole Secret to hold.
const maxSecretBytes = 1 << 20

// secrets is the directory that holds a directory for each Secret, with a file
// for each key, as Kubernetes mounts them.
type secrets string

// CredentialHelpers lets docker configurations name programs that give
// credentials: this machine's owner put both where they are.
func (secrets) CredentialHelpers() bool { return true }

// Secret reads one key. Errors name the file, never its content.
func (dir secrets) Secret(_ context.Context, secret, key string) ([]byte, error) {
	name := filepath.Join(string(dir), secret, key)
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("Secret %s: %w: let user %d read it", secret, err, os.Geteuid())
	}
	if err != nil {
		return nil, fmt.Errorf("Secret %s: %w: in standalone mode a Secret is a directory with a file for each key", secret, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSecretBytes+1))
	if err != nil {
		return nil, fmt.Errorf("Secret %s: %w: in standalone mode a Secret is a directory with a file for each key", secret, err)
	}
	if len(data) > maxSecretBytes {
		return nil, fmt.Errorf("Secret %s: %s is larger than a Secret may be (1 MiB): is it the right file?", secret, name)
	}
	return data, nil
}
