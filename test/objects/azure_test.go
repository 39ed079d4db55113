package objects

import (
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"

	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/storage/bucket/buckettest"
)

// startAzurite runs an Azurite with the container images until the test ends.
func startAzurite(t *testing.T) *Server {
	t.Helper()
	s, err := StartAzurite(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	key, err := container.NewSharedKeyCredential(AzureAccount, AzureKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err := container.NewClientWithSharedKeyCredential(s.URL+"/images", key, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Create(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	return s
}

func azureConfig(t *testing.T, s *Server) bucket.Config {
	return bucket.Config{
		Azure:       &bucket.Azure{Account: AzureAccount, Container: "images", Endpoint: s.URL},
		Credentials: directory(t, map[string]string{"accountKey": AzureKey}),
	}
}

func TestAzurite(t *testing.T) {
	c := azureConfig(t, startAzurite(t))
	t.Run("Whole", func(t *testing.T) { buckettest.Run(t, open(t, c)) })
	t.Run("Prefix", func(t *testing.T) {
		c.Azure.Prefix = "edge/images"
		buckettest.Run(t, open(t, c))
	})
}
