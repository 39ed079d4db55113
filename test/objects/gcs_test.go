package objects

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/storage/bucket/buckettest"
)

// startFakeGCS runs a fake-gcs-server with the bucket images until the test ends.
func startFakeGCS(t *testing.T) *Server {
	t.Helper()
	s, err := StartFakeGCS(t.Context(), "images")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// serviceAccount is the JSON of one, whose tokens come from where this says.
func serviceAccount(t *testing.T, tokens string) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	account, err := json.Marshal(map[string]string{
		"type": "service_account", "project_id": "test", "client_email": "registry@test.example", "token_uri": tokens,
		"private_key_id": "1", "private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(account)
}

// tokens hands out bearer tokens, and counts them.
func tokens(t *testing.T) (url string, count *atomic.Int64) {
	count = new(atomic.Int64)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		count.Add(1)
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, `{"access_token": "token", "token_type": "Bearer", "expires_in": 3600}`) //nolint:errcheck // seen by who asks
	}))
	t.Cleanup(s.Close)
	return s.URL, count
}

func gcsConfig(t *testing.T, s *Server, tokens string) bucket.Config {
	return bucket.Config{
		GCS:         &bucket.GCS{Bucket: "images", Endpoint: s.URL},
		Credentials: directory(t, map[string]string{"credentials.json": serviceAccount(t, tokens)}),
	}
}

// TestFakeGCS leaves one thing out: Google answers 404 to a compose of parts that
// are not there; fake-gcs-server answers 500.
func TestFakeGCS(t *testing.T) {
	const except = "UnknownUpload"
	url, count := tokens(t)
	c := gcsConfig(t, startFakeGCS(t), url)
	t.Run("Whole", func(t *testing.T) { buckettest.Run(t, open(t, c), except) })
	t.Run("Prefix", func(t *testing.T) {
		c.GCS.Prefix = "edge/images"
		buckettest.Run(t, open(t, c), except)
	})
	if n := count.Load(); n != 2 {
		t.Errorf("%d tokens were fetched for two buckets", n)
	}
}
