package objects

import (
	"testing"

	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/storage/bucket/buckettest"
)

// minioConfig is of the bucket images of a MinIO.
func minioConfig(t *testing.T, s *Server) bucket.Config {
	return bucket.Config{
		S3:          &bucket.S3{Bucket: "images", Endpoint: s.URL, PathStyle: true},
		Credentials: directory(t, map[string]string{"accessKeyID": AccessKeyID, "secretAccessKey": SecretAccessKey}),
	}
}

func TestMinIO(t *testing.T) {
	s := startMinIO(t, MinIO{Buckets: []string{"images"}})
	c := minioConfig(t, s)
	t.Run("WholeBucket", func(t *testing.T) { buckettest.Run(t, open(t, c)) })
	t.Run("Prefix", func(t *testing.T) {
		c.S3.Prefix, c.S3.CopyLimit = "edge/images", 6<<20
		buckettest.Run(t, open(t, c))
	})
}

func TestVersityGW(t *testing.T) {
	s, err := StartVersityGW(t.Context(), t.TempDir(), "images")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	c := minioConfig(t, s)
	c.S3.Prefix, c.S3.CopyLimit = "edge/images", 6<<20
	buckettest.Run(t, open(t, c))
}
