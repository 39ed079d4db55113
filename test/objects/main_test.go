package objects

import (
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startMinIO runs a MinIO until the test ends.
func startMinIO(t *testing.T, m MinIO) *Server {
	t.Helper()
	if m.Data == "" {
		m.Data = t.TempDir()
	}
	s, err := m.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// directory makes a directory of files.
func directory(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func open(t *testing.T, c bucket.Config) bucket.Bucket {
	t.Helper()
	b, err := bucket.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
